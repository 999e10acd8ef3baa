"""The plug-in itself: found by SGLang, checked before a start, and loaded completely or not at all."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ghostvis_cli.errors import EngineError
from ghostvis_cli.sglang import plugin
from ghostvis_cli.sglang.plugin.weights import complete
from tests.sglang.asking import DEMO, directory
from tests.sglang.servers import NotStartedError, Server, serving

# Being there


def test_sglang_finds_the_plugin_by_its_entry_point() -> None:
    from sglang.srt.plugins import GENERAL_PLUGINS_GROUP, load_plugins_by_group

    assert plugin.GROUP == GENERAL_PLUGINS_GROUP
    function, _ = load_plugins_by_group(GENERAL_PLUGINS_GROUP)[plugin.NAME]
    assert function is plugin.register


@pytest.mark.xdist_group("demo")
def test_a_server_knows_the_directory_without_trusting_its_code(demo_server: Server) -> None:
    about = demo_server.send("/model_info").json
    assert about["architectures"] == ["GhostVisForConditionalGeneration"]
    assert about["has_image_understanding"] is True
    assert demo_server.send("/server_info").json["trust_remote_code"] is False


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    for name in ("SGLANG_PLUGINS", *plugin.PACKAGES):
        monkeypatch.delenv(name, raising=False)
    yield monkeypatch


def test_the_check_passes_where_nothing_is_wrong(clean: pytest.MonkeyPatch) -> None:
    plugin.check()
    clean.setenv("SGLANG_PLUGINS", "another, ghostvis")
    plugin.check()


@pytest.mark.parametrize("chosen", ["none", "another,ghostvision"])
def test_the_check_names_a_choice_of_plugins_that_leaves_ours_out(
    clean: pytest.MonkeyPatch, chosen: str
) -> None:
    clean.setenv("SGLANG_PLUGINS", chosen)
    with pytest.raises(EngineError, match=f"SGLANG_PLUGINS={chosen} leaves") as caught:
        plugin.check()
    assert caught.value.hint == "export SGLANG_PLUGINS=ghostvis"


@pytest.mark.parametrize("variable", plugin.PACKAGES)
def test_the_check_names_a_foreign_package_in_our_place(clean: pytest.MonkeyPatch, variable: str) -> None:
    clean.setenv(variable, "somebody.models")
    with pytest.raises(EngineError, match=f"{variable} is somebody.models") as caught:
        plugin.check()
    assert caught.value.hint == f"unset {variable}"


def test_every_hook_has_its_target() -> None:
    """A renamed function of SGLang would leave its guard unused, with a warning in the log alone."""
    from pkgutil import resolve_name

    from sglang.srt.plugins.hook_registry import HookRegistry

    from ghostvis_cli.sglang.plugin import ends, guards

    modules = (ends, guards)
    for module in modules:
        module.install()
    names = {module.__name__ for module in modules}
    ours = [
        target
        for target, hooks in HookRegistry._hooks.items()
        if any(hook.__module__ in names for _, hook, _ in hooks)
    ]
    assert len(ours) > len(modules)
    for target in ours:
        assert callable(resolve_name(target))


# Weights


def test_tensors_that_a_directory_lacks_are_named() -> None:
    with pytest.raises(ValueError, match=r"lacks 2 of the model's tensors: a, c$"):
        list(complete([("b", 0)], {"a", "b", "c"}))


def test_of_many_missing_tensors_five_are_named() -> None:
    with pytest.raises(ValueError, match=r"lacks 9 of the model's tensors: n0, n1, n2, n3, n4, \.\.\.$"):
        list(complete([], {f"n{number}" for number in range(9)}))


def test_a_tensor_without_a_place_is_named() -> None:
    with pytest.raises(ValueError, match=r"no place for: b$"):
        list(complete([("a", 0), ("b", 0)], {"a"}))


@pytest.mark.xdist_group("text")
def test_a_server_does_not_start_with_a_tensor_missing_and_its_log_ends_with_the_name(tmp_path: Path) -> None:
    place, name = directory(DEMO, tmp_path), "model.vision.resampler.queries"
    weights = load_file(place / "model.safetensors")
    del weights[name]
    save_file(weights, place / "model.safetensors", {"format": "pt"})
    with pytest.raises(NotStartedError, match=f"lacks 1 of the model's tensors: {name}"), serving(place):
        pass


# Numerics


@pytest.mark.parametrize(
    ("chosen", "dtype", "expected"),
    [
        (None, torch.float32, "exact"),
        (None, torch.bfloat16, "fast"),
        ("auto", torch.float32, "exact"),
        ("fast", torch.float32, "fast"),
        ("exact", torch.bfloat16, "exact"),
    ],
)
def test_numerics_are_exact_in_float32_and_fast_elsewhere_unless_chosen(
    monkeypatch: pytest.MonkeyPatch, chosen: str | None, dtype: torch.dtype, expected: str
) -> None:
    from ghostvis_cli.sglang.plugin import rotary

    if chosen is None:
        monkeypatch.delenv(rotary.VARIABLE, raising=False)
    else:
        monkeypatch.setenv(rotary.VARIABLE, chosen)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert rotary.numerics() == expected
    finally:
        torch.set_default_dtype(before)


def test_numerics_that_do_not_exist_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from ghostvis_cli.sglang.plugin import rotary

    monkeypatch.setenv(rotary.VARIABLE, "precise")
    with pytest.raises(ValueError, match="GHOSTVIS_NUMERICS is 'precise': auto, fast or exact"):
        rotary.numerics()
