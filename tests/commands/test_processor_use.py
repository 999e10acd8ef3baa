"""A server on this machine that is made to fill a core, and one that is not: what `bench` and `doctor` say."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from ghostvis_cli.processor_use import LOCAL_FIX, Use, limit, local_port, starts_sglang
from tests.commands.processes import run

# OpenAI's routes, and with `busy` a thread beside them that computes all the time, without the interpreter's lock.
SERVER = """
import asyncio, hashlib, sys, threading
from tests.commands.processes import PAGES, saying
from tests.engines.scripted import ScriptedServer

def compute():
    while True:
        hashlib.sha256(bytes(2**22))

async def main():
    server = ScriptedServer(saying("Yes.", pause_s=0.1), pages=PAGES)
    await server.start()
    if "busy" in sys.argv:
        threading.Thread(target=compute, daemon=True).start()
    print(server.url, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""
NOTE = "fills a core: no request gets faster beside others"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="by /proc")


@contextmanager
def server(*how: str) -> Iterator[str]:
    """Its address; a process of its own."""
    process = subprocess.Popen([sys.executable, "-c", SERVER, *how], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


def test_a_bench_names_the_servers_process_that_fills_a_core_and_what_helps() -> None:
    with server("busy", "/home/me/.venv-sglang/bin/ghostvis") as url:  # a folder makes it no SGLang
        done = run("bench", "--base-url", url, "--num-prompts", "8", "--concurrency", "1", "--repeat", "1")
    said = (done.stdout + done.stderr).decode()
    assert NOTE in said, said
    assert LOCAL_FIX in said


@pytest.mark.parametrize(
    ("words", "is_sglang"),
    [
        (("-m", "sglang.launch_server", "--port", "1"), True),
        (("-P", "-m", "ghostvis_cli.sglang.plugin.launch", "--port", "1"), True),
        (("/opt/env/bin/sglang", "serve"), True),
        (("/home/me/.venv-sglang/bin/ghostvis", "serve"), False),
        (("/src/sglang/bin/ghostvis", "serve", "--served-model-name", "sglang"), False),
    ],
)
def test_a_server_is_sglang_by_what_it_runs_not_by_where_that_lies(
    words: tuple[str, ...], is_sglang: bool
) -> None:
    assert starts_sglang("\0".join(("/usr/bin/python3", *words, ""))) is is_sglang


def test_a_bench_says_nothing_of_a_server_that_has_time() -> None:
    with server() as url:
        done = run("bench", "--base-url", url, "--num-prompts", "8", "--concurrency", "1", "--repeat", "1")
    assert done.returncode == 0, done.stderr.decode()
    assert NOTE not in (done.stdout + done.stderr).decode()


@pytest.mark.parametrize(("how", "line"), [("busy", NOTE), ("calm", "its busiest thread has")])
def test_the_doctor_looks_at_a_server_of_this_machine(how: str, line: str) -> None:
    with server(how) as url:
        said = run("doctor", "--base-url", url, "--no-run").stdout.decode()
    assert [one for one in said.splitlines() if " processor " in one and line in one], said


def use(role: str, *, cores: float = 1.0, busiest: float = 1.0, **more: bool) -> Use:
    return Use(pid=7, role=role, cores=cores, busiest=busiest, is_sglang=True, **more)


def test_a_main_process_on_many_cores_is_told_to_use_one_thread() -> None:
    crowd = use("main process", cores=9.0, busiest=0.7)
    found = limit([crowd])
    assert found is not None
    assert found.message == "the server's main process (7) takes 9.0 cores for what one thread does"
    assert found.fix == "OMP_NUM_THREADS=1 in its environment"
    assert limit([replace(crowd, one_thread=True)]) is None  # threads that read images


def test_who_fills_a_core_while_it_waits_is_not_blamed() -> None:
    assert limit([use("scheduler")]) is not None
    assert limit([use("scheduler", has_gpu=True), use("other")]) is None


def test_a_full_process_for_requests_gets_company_and_the_one_before_several_gets_replicas() -> None:
    alone = limit([use("main process"), use("detokenizer", busiest=0.5)])
    router = limit([use("main process"), use("tokenizer worker", busiest=0.5)])
    worker = limit([use("main process", busiest=0.5), use("tokenizer worker")])
    assert alone is not None and "--tokenizer-worker-num 4" in alone.fix
    assert router is not None and router.fix == "replicas (docs/scaling.md)"
    assert worker is not None and "tokenizer worker (7)" in worker.message
    assert "--tokenizer-worker-num 8" in worker.fix


@pytest.mark.parametrize(
    ("url", "port"),
    [
        ("http://127.0.0.1:30000/v1", 30000),
        ("http://localhost", 80),
        ("https://[::1]", 443),
        ("http://gpu-1:30000", None),
    ],
)
def test_only_a_servers_own_machine_can_be_looked_at(url: str, port: int | None) -> None:
    assert local_port(url) == port
