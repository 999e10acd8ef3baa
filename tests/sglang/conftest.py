"""These tests run where SGLang is installed: `tests/sglang/runtime/setup.sh` makes such a place without a GPU."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.sglang.servers import Server

HERE = Path(__file__).parent
REASON = "SGLang is not installed here (tests/sglang/runtime/setup.sh VENV, then VENV/bin/python -m pytest)"


class _Skipped(pytest.Module):
    """A module that is not even imported: it may need what is missing."""

    def collect(self) -> list[pytest.Item]:
        pytest.skip(REASON, allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if find_spec("sglang") is None:
        return _Skipped.from_parent(parent, path=module_path)
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.sglang)


@pytest.fixture(scope="session")
def demo_server(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Server]":
    """The demo model in float32, shared by whoever does not end it: mark such tests `xdist_group("demo")`."""
    from tests.sglang.asking import DEMO, directory
    from tests.sglang.servers import serving

    with serving(directory(DEMO, tmp_path_factory.mktemp("demo"))) as server:
        yield server


@pytest.fixture(scope="session")
def bare_server(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Server]":
    """The same with `fast` numerics and no prefix cache: `xdist_group("bare")`."""
    from tests.sglang.asking import DEMO, directory
    from tests.sglang.servers import serving

    place = tmp_path_factory.mktemp("bare")
    with serving(directory(DEMO, place), "--disable-radix-cache", GHOSTVIS_NUMERICS="fast") as server:
        yield server
