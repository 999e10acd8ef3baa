"""The Python API in the seed's words, on the built-in model."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from ghostvis_cli import GhostVisSGLangEngine, create_sglang_engine, demo
from ghostvis_cli.errors import EngineError, InputError, ModelError
from ghostvis_cli.images import load_image
from ghostvis_cli.sglang.runtime import why_not

RED = demo.BASE_DIR.parent / "red-circle.png"
THREE = demo.BASE_DIR.parent / "three-shapes.jpg"


@pytest.fixture(scope="module")
def engine() -> Iterator[GhostVisSGLangEngine]:
    with create_sglang_engine(source="demo") as engine:
        yield engine


def test_each_prompt_is_answered_in_its_place(engine: GhostVisSGLangEngine) -> None:
    texts = engine.generate(
        prompts=["What is in this picture?", "Hello", "How many shapes are there?"],
        images=[RED, None, THREE],
        max_tokens=40,
        temperature=0,
    )
    assert "red circle" in texts[0]
    assert "three shapes" in texts[2]
    assert len(texts) == 3 and texts[1]


def test_where_sglang_is_of_no_use_the_local_engine_says_why(engine: GhostVisSGLangEngine) -> None:
    reason = why_not()
    if reason is None:
        pytest.skip("SGLang can be used here")
    assert engine.info.kind == "local"
    assert engine.info.notices[0] == f"{reason}: the local engine runs the model"


def test_an_engine_that_was_chosen_is_not_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GHOSTVIS_ENGINE", "local")
    with create_sglang_engine(source="demo") as engine:
        assert (engine.info.kind, engine.info.notices) == ("local", ())


def test_one_image_is_shared_by_all_prompts_in_every_form(engine: GhostVisSGLangEngine) -> None:
    expected = engine.generate(["What shape is it?", "What color is it?"], images=RED, temperature=0)
    for image in (str(RED), RED.read_bytes(), Image.open(RED), load_image(RED)):
        assert (
            engine.generate(["What shape is it?", "What color is it?"], images=image, temperature=0)
            == expected
        )
    assert "circle" in expected[0] and "red" in expected[1]


def test_chat_keeps_an_image_in_its_turn(engine: GhostVisSGLangEngine) -> None:
    messages = [{"role": "user", "content": "What is in this picture?"}]
    first = engine.chat(messages=messages, images=RED, temperature=0)
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "What color is it?"}]
    second = engine.chat(messages=messages, images=[RED, None, None], temperature=0)
    assert "red" in second


def test_the_usage_of_a_repeated_image_says_cached(engine: GhostVisSGLangEngine) -> None:
    image = Image.new("RGB", (50, 50), (200, 220, 240))
    engine.complete("What is it?", image, max_tokens=2)
    again = engine.complete("How many are there?", image, max_tokens=2)[0]
    assert (again.usage.cached_tokens or 0) >= again.usage.image_tokens == 64


def test_a_number_of_images_that_does_not_match_is_refused(engine: GhostVisSGLangEngine) -> None:
    with pytest.raises(InputError, match="2 entries of images for 1 prompts"):
        engine.generate(["hello"], images=[None, None])


@pytest.mark.parametrize("message", [{}, {"role": "robot", "content": "x"}, {"role": "user", "content": 3}])
def test_a_malformed_message_is_refused(engine: GhostVisSGLangEngine, message: dict) -> None:
    with pytest.raises(InputError, match="role"):
        engine.chat([message])


def test_an_unknown_sampling_name_is_a_type_error(engine: GhostVisSGLangEngine) -> None:
    with pytest.raises(TypeError):
        engine.generate(["hello"], max_new_tokens=3)


async def test_it_works_where_a_loop_already_runs(engine: GhostVisSGLangEngine) -> None:
    assert asyncio.get_running_loop().is_running()
    assert engine.generate("Hello", max_tokens=3)


def test_a_closed_engine_says_so() -> None:
    engine = create_sglang_engine(source="demo")
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.generate("hello")


def test_a_model_that_is_not_there_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no sft checkpoint"):
        create_sglang_engine(source="sft", base_dir=tmp_path)
