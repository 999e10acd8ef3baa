"""SGLang as our server: started as a child, watched until it is ready and verified, drained, restarted.

SGLang schedules, caches and speaks HTTP. Here are its arguments and keys, the check that it is ready, and what its
exit means. Its processes and files are removed however it ends.
"""

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any

import httpx2

from ghostvis_cli import files, scratch
from ghostvis_cli.convert.directory import CONFIG, GENERATION_CONFIG, read_json
from ghostvis_cli.errors import EngineError, ExitCode, GhostvisError
from ghostvis_cli.sampling import Sampling
from ghostvis_cli.serve.listen import free_port, is_loopback_only, url_of
from ghostvis_cli.serve.settings import (
    CERTIFICATE,
    NO_GRAPHS,
    NO_PREFILL_GRAPHS,
    ServerSettings,
    SGLangSettings,
)
from ghostvis_cli.serve.stopping import stop_signals
from ghostvis_cli.sglang import runtime
from ghostvis_cli.sglang.child import Child
from ghostvis_cli.sglang.log import SGLangLog
from ghostvis_cli.sglang.plugin import (
    BACKGROUND_VARIABLE,
    GRAPHS_VARIABLE,
    HOSTS_VARIABLE,
    IMAGE_KEY_VARIABLE,
    WORKERS_VARIABLE,
)
from ghostvis_cli.sglang.probe import About, Probe
from ghostvis_cli.sglang.runtime import Value

if TYPE_CHECKING:
    from ghostvis_cli.profile import Profile

ADMIN_VARIABLE = "GHOSTVIS_ADMIN_API_KEY"
NOWHERE = "none.invalid"  # an empty list would allow every host
MODULE = "sglang.launch_server"  # in every release; `sglang serve` would guess the kind of model first
OF_WORKERS = "ghostvis_cli.sglang.plugin.launch"
# Without an answer for so long a worker is replaced; SGLang's 10 s can be less than its imports take.
PATIENCE_VARIABLE, WORKERS_PATIENCE_S = "SGLANG_UVICORN_WORKER_HEALTHCHECK_TIMEOUT", "120"
ABORTED_S = 12.0  # SGLang looks for the end of its requests every 5 s
RESTART_S, LONGEST_RESTART_S = 1.0, 60.0
STARTS_IN_VAIN = 5
FROM_MODEL = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class Launch:
    """What to serve, and how. `directory` is a converted one; the server's port was free a moment ago."""

    profile: "Profile"
    directory: Path
    name: str
    server: ServerSettings
    sglang: SGLangSettings
    admin_key: str | None = field(default=None, repr=False)

    @property
    def workers(self) -> int:
        """How many processes take requests."""
        return self.sglang.tokenizer_workers(runtime.tokenizer_workers(self.profile))

    @property
    def secrets(self) -> dict[str, str]:
        """Keys by SGLang's option names. Where other machines can connect, management routes always have one."""
        found = {"api-key": self.server.api_key, "admin-api-key": self.admin_key}
        if self.admin_key is None and not is_loopback_only(self.server):
            found["admin-api-key"] = token_hex(16)
        return {name: value for name, value in found.items() if value}

    def told(self, secrets: Mapping[str, str]) -> dict[str, str]:
        """The keys that SGLang gets. With several workers `plugin/door.py` checks the clients' key instead, and
        SGLang needs a key for its own requests to pass that check.
        """
        if self.workers == 1 or not secrets:
            return dict(secrets)
        return {"admin-api-key": secrets.get("admin-api-key") or secrets["api-key"]}

    def argv(self, directory: Path, config: Path | None) -> list[str]:
        """The command line. What the user wrote after -- comes last, where it overrides ours."""
        values = runtime.arguments(self.profile, directory, name=self.name)
        values |= {"host": self.server.host or "0.0.0.0", "port": self.server.port}
        # Our choice would override these options of the user's.
        if any(map(self.sglang.has, (NO_GRAPHS, NO_PREFILL_GRAPHS))):
            values.pop("cuda_graph_backend_prefill", None)
        if config is not None:
            values["config"] = str(config)
        values["tokenizer_worker_num"] = self.workers
        # SGLang's warm-up requests would lack the clients' key, which it does not get.
        values["skip_server_warmup"] = self.workers > 1 and self.server.api_key is not None
        module = MODULE if self.workers == 1 else OF_WORKERS
        # -P: a file sglang.py in the current directory is not SGLang.
        argv = [sys.executable, "-P", "-m", module, *flags(values)]
        if runtime.is_at_least(0, 5, 23):
            argv += ["--allowed-media-domains", *(self.server.allowed_image_hosts or (NOWHERE,))]
        return [*argv, *self.sglang.options]

    def environment(self, keys_file: str | None = None) -> dict[str, str]:
        """Without the keys, which SGLang gets from a file. Its output is not buffered, also into a pipe."""
        from ghostvis_cli.sglang.plugin.door import Rules  # needs Starlette

        keys = (self.server.api_key, self.admin_key)
        kept = {name: value for name, value in os.environ.items() if value not in keys}
        ours = Rules.of(self.server, keys=keys_file).as_variable() | {
            HOSTS_VARIABLE: ",".join(self.server.allowed_image_hosts),
            BACKGROUND_VARIABLE: self.server.image_limits.background,
            "PYTHONUNBUFFERED": "1",
        }
        if self.sglang.has(NO_GRAPHS):
            ours[GRAPHS_VARIABLE] = "0"
        if self.workers > 1:
            ours |= {WORKERS_VARIABLE: "1", IMAGE_KEY_VARIABLE: token_hex(32)}
            ours[PATIENCE_VARIABLE] = os.environ.get(PATIENCE_VARIABLE, WORKERS_PATIENCE_S)
        return {**kept, **runtime.environment(self.profile), **ours}


def flags(values: Mapping[str, Value]) -> list[str]:
    """{"tp_size": 2, "enable_metrics": True} -> ["--tp-size", "2", "--enable-metrics"]."""
    found: list[str] = []
    for name, value in values.items():
        if value is not False:
            found += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return found


async def serve(
    launch: Launch,
    *,
    on_line: Callable[[str], None],
    on_ready: Callable[[str, About], None],
    on_notice: Callable[[str], None],
) -> int:
    """Serve until SIGTERM or SIGINT, and return the exit code; GhostvisError where SGLang ends by itself.

    The first signal drains; a second one ends everything at once, with 128 plus its number.
    """
    stop, runs = asyncio.Event(), _Supervisor(launch, on_line, on_ready, on_notice)
    failures = 0
    with stop_signals(stop, runs.kill):
        while True:
            try:
                await runs.one(stop)
                return ExitCode.OK
            except GhostvisError as error:
                failures = 1 if runs.was_long else failures + 1
                if launch.sglang.restart == "no" or not runs.ready_once or failures > STARTS_IN_VAIN:
                    raise
                pause_s = min(LONGEST_RESTART_S, RESTART_S * 2 ** (failures - 1))
                on_notice(f"{error.message}; starting again in {pause_s:g} s (--restart on-failure)")
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), pause_s)
                return ExitCode.OK


class _Supervisor:
    """Runs SGLang on one port, each time from its start to its end."""

    def __init__(
        self,
        launch: Launch,
        on_line: Callable[[str], None],
        on_ready: Callable[[str, About], None],
        on_notice: Callable[[str], None],
    ) -> None:
        self.ready_once, self.was_long = False, False
        self._launch, self._on_line, self._on_ready, self._on_notice = launch, on_line, on_ready, on_notice
        self._secrets = launch.secrets
        self._child: Child | None = None

    def kill(self) -> None:
        if self._child is not None:
            self._child.kill()

    async def one(self, stop: asyncio.Event) -> None:
        """Run SGLang until `stop` is set. Raises the reason where it ends by itself."""
        launch = self._launch
        free_port(launch.server)  # SGLang would say so after half a minute
        log = SGLangLog(secrets=tuple(self._secrets.values()))
        self.was_long = False
        async with self._running(log) as child:
            ended = asyncio.create_task(child.wait())
            stopping = asyncio.create_task(stop.wait())
            starting = asyncio.create_task(self._start())
            try:
                await asyncio.wait(
                    (ended, stopping, starting),
                    timeout=launch.sglang.ready_timeout_s,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if stopping.done():
                    return
                if ended.done():
                    await child.end()  # its last lines may not have arrived yet
                    raise log.failure(ended.result())
                if not starting.done():
                    raise EngineError(
                        f"SGLang was not ready after {launch.sglang.ready_timeout_s:g} s",
                        hint=f"--ready-timeout {2 * launch.sglang.ready_timeout_s:g}; -v shows its log",
                    )
                starting.result()
                child.note_shared_memory()
                self.ready_once, since_s = True, time.monotonic()
                await asyncio.wait((ended, stopping), return_when=asyncio.FIRST_COMPLETED)
                if stopping.done():
                    await self._drain(child, ended)
                    return
                self.was_long = time.monotonic() - since_s > LONGEST_RESTART_S
                await child.end()
                raise log.failure(ended.result())
            finally:
                for task in (ended, stopping, starting):
                    task.cancel()

    @asynccontextmanager
    async def _running(self, log: SGLangLog) -> AsyncIterator[Child]:
        launch = self._launch
        with ExitStack() as stack:
            folder = stack.enter_context(scratch.folder())
            descriptors, config, keys_file = [], None, None
            if launch.workers > 1:  # workers start too late to inherit a descriptor
                keys_file = f"/proc/{os.getpid()}/fd/{_hidden(stack, self._secrets)}"
            if told := launch.told(self._secrets):
                descriptors.append(_hidden(stack, told))
                config = folder / "keys.yaml"
                config.symlink_to(f"/proc/self/fd/{descriptors[0]}")
            directory = with_sampling(launch.directory, launch.profile.sampling, folder / "model")
            self._child = child = await Child.start(
                launch.argv(directory, config),
                launch.environment(keys_file),
                lambda line: self._on_line(log.feed(line)),
                pass_fds=descriptors,
                folder=folder,
            )
            try:
                yield child
            finally:
                await child.end()
                self._child = None

    async def _start(self) -> None:
        """Wait until it is ready, and check that it serves our model."""
        launch, first = self._launch, self._launch.sglang.node_rank == 0
        probe = self._probe()
        try:
            await probe.until_ready(answers=first)
            if first:
                about = await probe.about(read_json(launch.directory, CONFIG))
                await probe.freeze()
            else:
                about = About(launch.name, None)
        except (httpx2.HTTPError, KeyError, ValueError) as error:
            raise EngineError(f"SGLang's answers make no sense: {error!r}", hint="ghostvis doctor") from error
        finally:
            await probe.aclose()
        self._on_ready(self._url(launch.server.host), about)

    async def _drain(self, child: Child, ended: "asyncio.Task[int]") -> None:
        """Let requests finish within the time allowed, then abort them; what is left after that is killed."""
        allowed_s = self._launch.server.drain_timeout_s
        self._on_notice(f"stopping; requests may finish within {allowed_s:g} s")
        probe = self._probe()
        try:
            if not await self._finished(child, ended, probe, allowed_s):
                self._on_notice(f"requests cut short after {allowed_s:g} s")
                with suppress(httpx2.HTTPError):
                    await probe.abort_all()
                if self._launch.workers > 1:
                    await self._finished(child, ended, probe, ABORTED_S)
                await asyncio.wait((ended,), timeout=ABORTED_S)
        finally:
            await probe.aclose()

    async def _finished(
        self, child: Child, ended: "asyncio.Task[int]", probe: Probe, allowed_s: float
    ) -> bool:
        """Whether all requests have ended in time."""
        if self._launch.workers == 1:
            child.terminate()
            done, _ = await asyncio.wait((ended,), timeout=allowed_s)
            return bool(done)
        try:  # several workers would end at once, and their requests with them
            await asyncio.wait_for(probe.until_idle(), allowed_s)
        except (TimeoutError, httpx2.HTTPError, EngineError, KeyError):
            return ended.done()
        child.terminate()
        await asyncio.wait((ended,), timeout=ABORTED_S)
        return True

    def _probe(self) -> Probe:
        host = self._launch.server.host
        everywhere = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
        url = self._url(everywhere.get(host, host))
        return Probe(url, self._secrets.get("api-key"), self._secrets.get("admin-api-key"))

    def _url(self, host: str) -> str:
        url = url_of(host, self._launch.server.port)
        return url.replace("http:", "https:", 1) if self._launch.sglang.has(CERTIFICATE) else url


def _hidden(stack: ExitStack, secrets: Mapping[str, str]) -> int:
    """A descriptor of a YAML file in memory, open as long as the stack.

    SGLang takes keys from options, which other users can see, and from files; a descriptor has a path.
    """
    descriptor = os.memfd_create("ghostvis-keys")
    stack.callback(os.close, descriptor)
    os.write(descriptor, json.dumps(secrets).encode())  # JSON is YAML
    return descriptor


def with_sampling(directory: Path, sampling: Sampling, place: Path) -> Path:
    """The directory; where the profile samples differently, a copy made of links with its own defaults.

    SGLang reads default sampling from generation_config.json only.
    """
    file = directory / GENERATION_CONFIG
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    wanted = {name: getattr(sampling, name) for name in FROM_MODEL}
    wanted["top_k"] = sampling.top_k or -1  # SGLang's value for all tokens
    wanted["do_sample"] = sampling.temperature > 0  # transformers checks that the two agree
    standard = {"min_p": 0.0, "repetition_penalty": 1.0}
    if all(config.get(name, standard.get(name)) == value for name, value in wanted.items()):
        return directory
    place.mkdir()
    for entry in directory.iterdir():
        if entry.name != file.name:
            (place / entry.name).symlink_to(entry.resolve())
    files.write(place / file.name, json.dumps(config | wanted).encode(), durable=False)
    return place
