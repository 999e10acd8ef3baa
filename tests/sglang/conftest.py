"""These tests run where SGLang is installed: `tests/sglang/runtime/setup.sh` makes such a place without a GPU."""

from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
REASON = "SGLang is not installed here (tests/sglang/runtime/setup.sh VENV, then VENV/bin/python -m pytest)"


class _Skipped(pytest.Module):
    """A module that is not even imported: it may need what is missing."""

    def collect(self) -> list[pytest.Item]:  # type: ignore[override]
        pytest.skip(REASON, allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if find_spec("sglang") is None:
        return _Skipped.from_parent(parent, path=module_path)  # type: ignore[no-any-return]
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.sglang)
