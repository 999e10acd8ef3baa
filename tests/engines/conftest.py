"""Servers for the tests of engines that talk to one."""

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from tests import sites
from tests.engines.scripted import Reply, ScriptedServer, Serve
from tests.engines.serving import Letters, Running, running


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    async with AsyncExitStack() as stack:

        async def start(*replies: Reply, **options: Any) -> ScriptedServer:
            tls = options.pop("tls", None)
            server = ScriptedServer(*replies, **options)
            await server.start(tls=tls)
            stack.push_async_callback(server.stop)
            return server

        yield start


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sites.certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """The local server with an engine that repeats what it is told."""
    with running(vocabulary=Letters()) as started:
        yield started
