"""A server's settings, and the model that it serves. Imports nothing heavy."""

from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from ghostvis_cli.addresses import PORTS, is_host
from ghostvis_cli.engines.base import Engine, Sampling
from ghostvis_cli.errors import UsageError
from ghostvis_cli.image_limits import ImageLimits
from ghostvis_cli.openai.answers import Vocabulary

KEY_VARIABLE, NEW_KEY = "GHOSTVIS_API_KEY", "$(openssl rand -hex 16)"
KEY_HINT = f"export {KEY_VARIABLE}={NEW_KEY}"


@dataclass(frozen=True)
class ServerSettings:
    """Where to listen, who has access, and the limits of a request.

    `max_waiting` requests may be inside at once, from a body's first byte to the last token of its answer;
    the next one gets 429. `sampling` fills what a request leaves out, but for its max_tokens: an answer may
    take the rest of the context, or `max_tokens` where the server was started with one.
    """

    host: str = "127.0.0.1"
    port: int = 30000  # SGLang's; 0 takes a free one
    api_key: str | None = field(default=None, repr=False)
    key_variable: str = KEY_VARIABLE  # the environment variable for it
    served_model_name: str | None = None
    aliases: tuple[str, ...] = ()  # further names of the model in requests
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    allowed_image_hosts: tuple[str, ...] = ()
    image_limits: ImageLimits = field(default_factory=ImageLimits)  # redirects are never followed
    max_body_bytes: int = 64 * 2**20
    body_pause_s: float = 30.0  # an upload may take long, but not stand still
    head_timeout_s: float = 20.0  # from a connection or a request's first byte to the end of its head
    allowed_hosts: tuple[str, ...] = ()  # accepted in the Host header, besides `host` and loopback's
    cors_origins: tuple[str, ...] = ()  # of web pages with access, besides this machine's own
    max_waiting: int = 256
    drain_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UsageError(f"port {self.port} is outside 0 to 65535")
        if self.api_key is not None and not self.api_key.strip():
            raise UsageError("the API key is empty", hint=self.key_hint)
        for name in ("max_body_bytes", "max_waiting"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1")
        if self.api_key is None and "*" in self.cors_origins:
            raise UsageError(
                "--cors-origin '*' lets every web page in, and there is no API key", hint=KEY_HINT
            )
        for name in ("body_pause_s", "head_timeout_s", "drain_timeout_s"):
            if not 0 <= getattr(self, name) <= 86_400:
                raise UsageError(f"{name} must be within 0 and 86400 seconds")

    @property
    def key_hint(self) -> str:
        return f"export {self.key_variable}={NEW_KEY}"


def origin_of(text: str) -> str:
    """An origin as a browser writes it; ValueError where it is none."""
    if text in ("*", "null"):
        return text
    url = urlsplit(text)
    name = url.hostname or ""
    more = url.path.rstrip("/") or url.query or url.fragment or url.username
    if not url.scheme or not is_host(name) or more:
        raise ValueError(f"{text!r} is no origin")
    port = "" if url.port in (None, PORTS.get(url.scheme)) else f":{url.port}"
    host = f"[{name}]" if ":" in name else name if name.isascii() else name.encode("idna").decode()
    return f"{url.scheme}://{host}{port}"


@dataclass(frozen=True)
class Served:
    """A loaded model. Without a vocabulary, /tokenize answers 501 and logprobs are refused."""

    engine: Engine
    vocabulary: Vocabulary | None = None

    def name(self, settings: ServerSettings) -> str:
        """The model's name in the API. Not its path, which clients need not know."""
        info = self.engine.info
        return settings.served_model_name or info.tag or Path(info.model).name or "ghostvis"


@dataclass(frozen=True)
class SGLangSettings:
    """What SGLang needs besides ServerSettings. `options` are passed to it unchanged."""

    ready_timeout_s: float = 900.0  # tens of gigabytes from a slow disk, and CUDA graphs
    restart: Literal["no", "on-failure"] = "no"
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.restart not in ("no", "on-failure"):
            raise UsageError(f"--restart is {self.restart!r}", hint="--restart no, or --restart on-failure")
        for option in self.options:
            name = option.partition("=")[0]
            if name in OURS:
                raise UsageError(f"{name} is decided by ghostvis serve", hint=OURS[name])
            if full := _in_full(name):
                raise UsageError(f"SGLang may take {name} for {full}", hint="write its options in full")
        if self.options and not self.options[0].startswith("-"):
            raise UsageError(
                f"serve takes no argument {self.options[0]!r}", hint="options of SGLang: -- --flag"
            )

    def has(self, name: str) -> bool:
        return any(option.partition("=")[0] == name for option in self.options)

    @property
    def node_rank(self) -> int:
        """Which of several machines this is; only rank 0 answers requests."""
        return self._number(NODE_RANK, 0)

    def tokenizer_workers(self, usual: int) -> int:
        """How many processes take requests: `usual` unless an option says otherwise, or rules out more than one."""
        return self._number(WORKERS, 1 if any(map(self.has, ONE_WORKER)) else usual)

    def _number(self, name: str, default: int) -> int:
        """The last value of an option, which SGLang uses; `default` where there is none or it is no number."""
        found = default
        for option, value in pairwise((*self.options, "")):
            given, is_joined, joined = option.partition("=")
            if given == name:
                with suppress(ValueError):
                    found = int(joined if is_joined else value)
        return found


def _in_full(name: str) -> str | None:
    """The full name of an option that matters here and was abbreviated, which SGLang allows."""
    if not name.startswith("--") or name in READ:
        return None
    return next((full for full in (*OURS, *READ) if full.startswith(name)), None)


# Options of SGLang that `serve` acts on too.
NODE_RANK, WORKERS, CERTIFICATE = "--node-rank", "--tokenizer-worker-num", "--ssl-certfile"
NO_GRAPHS, NO_PREFILL_GRAPHS = "--disable-cuda-graph", "--disable-prefill-cuda-graph"
# What SGLang does only with a single process for requests.
ONE_WORKER = ("--nnodes", "--grpc-port", "--enable-ssl-refresh")
READ = (NODE_RANK, WORKERS, CERTIFICATE, NO_GRAPHS, NO_PREFILL_GRAPHS, *ONE_WORKER)
# Options of SGLang that would get past our checks, and what to type instead.
OURS = {
    "--host": "ghostvis serve --host HOST",
    "--port": "ghostvis serve --port PORT",
    "--model-path": "ghostvis serve --checkpoint-path PATH",
    "--model": "ghostvis serve --checkpoint-path PATH",
    "--api-key": KEY_HINT,
    "--admin-api-key": "export GHOSTVIS_ADMIN_API_KEY=$(openssl rand -hex 16)",
    "--config": "give its settings as options after --",
}
