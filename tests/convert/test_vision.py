"""A converted vision model in transformers' own doors: Auto classes, processor, pipeline, batches."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from ghostvis_cli import demo
from ghostvis_cli.checkpoint.tokenizer import Tokenizer
from ghostvis_cli.engines.base import GenerateRequest, Sampling
from ghostvis_cli.images import load_image
from ghostvis_cli.prompt import Message
from tests.convert.conversions import DEMO, converted

transformers = pytest.importorskip("transformers")
QUESTIONS = ("What is in this picture?", "How many shapes are there?")
TOKENS = 64


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(DEMO, tmp_path_factory.mktemp("vision") / "vlm_tiny")


@pytest.fixture(scope="module")
def loaded(directory: Path):
    import ghostvis_cli.hf  # noqa: F401 - the registration under test

    model = transformers.AutoModelForImageTextToText.from_pretrained(directory)
    return model, transformers.AutoProcessor.from_pretrained(directory)


def asking(question: str, images: list[Path]) -> list[dict]:
    content = [
        *({"type": "image", "image": str(path)} for path in images),
        {"type": "text", "text": question},
    ]
    return [{"role": "user", "content": content}]


def generated(loaded, *conversations: list[dict]) -> list[list[int]]:
    """Greedy ids of each conversation, run as one batch, up to the end of the answer."""
    model, processor = loaded
    inputs = processor.apply_chat_template(
        list(conversations),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    end = processor.tokenizer.convert_tokens_to_ids("<|assistant_end|>")
    return [row[: row.index(end)] if end in row else row for row in ids.tolist()]


def answered_locally(requests: list[tuple[str, list[Path]]]) -> list[list[int]]:
    from ghostvis_cli.engines.local import LocalEngine, LocalSettings

    async def ask(engine: LocalEngine, question: str, images: list[Path]) -> list[int]:
        message = Message.of("user", question, [load_image(str(path)) for path in images])
        request = GenerateRequest(messages=(message,), sampling=Sampling(max_tokens=TOKENS, temperature=0))
        return [id_ async for chunk in engine.generate(request) for id_ in chunk.token_ids]

    async def ask_all() -> list[list[int]]:
        async with await LocalEngine.load(DEMO, LocalSettings(device="cpu")) as engine:
            return [await ask(engine, *request) for request in requests]

    end = Tokenizer.load(DEMO.tokenizer_path).special("<|assistant_end|>")
    return [[id_ for id_ in ids if id_ != end] for ids in asyncio.run(ask_all())]


def test_generate_gives_the_local_engines_greedy_tokens(loaded) -> None:
    requests = [(question, [image]) for image in demo.EXAMPLES for question in QUESTIONS]
    requests += [("What differs?", [demo.EXAMPLES[0], demo.EXAMPLES[2]]), ("Who are you?", [])]
    expected = answered_locally(requests)
    assert [generated(loaded, asking(*request))[0] for request in requests] == expected


def test_a_batch_of_unequal_conversations_is_answered_like_each_alone(loaded) -> None:
    conversations = [
        asking("What is in this picture?", [demo.EXAMPLES[1]]),
        asking("Who are you?", []),
        asking("What differs?", [demo.EXAMPLES[0], demo.EXAMPLES[2]]),
    ]
    assert generated(loaded, *conversations) == [generated(loaded, one)[0] for one in conversations]


def test_the_pipeline_describes_an_image(directory: Path) -> None:
    import ghostvis_cli.hf  # noqa: F401

    pipe = transformers.pipeline("image-text-to-text", model=str(directory))
    conversation = asking(QUESTIONS[0], [demo.EXAMPLES[1]])
    said = pipe(text=conversation, max_new_tokens=TOKENS, do_sample=False, return_full_text=False)
    assert (
        said[0]["generated_text"] == "A blue square, a yellow star and a green triangle on a gray background."
    )


def test_a_saved_copy_is_the_same_model(loaded, tmp_path: Path) -> None:
    model, processor = loaded
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = (
        transformers.AutoModelForImageTextToText.from_pretrained(tmp_path),
        transformers.AutoProcessor.from_pretrained(tmp_path),
    )
    conversation = asking(QUESTIONS[1], [demo.EXAMPLES[0]])
    assert generated(again, conversation) == generated(loaded, conversation)


def test_sub_configs_are_real_ones(loaded) -> None:
    config = loaded[0].config
    assert type(config.text_config).__name__ == "Qwen3Config"
    assert config.text_config.final_logit_softcapping == 15
    assert config.vision_config.num_tokens == 64
    assert config.get_text_config() is config.text_config


def test_images_and_their_places_must_be_as_many(loaded) -> None:
    model, processor = loaded
    image = Image.open(demo.EXAMPLES[0])
    with pytest.raises(ValueError, match="1 images need 1 times"):
        processor(text="no place", images=[image])
    with pytest.raises(ValueError, match="0 images need 0 times"):
        processor(text="<|image|>")
    inputs = processor(text="<|image|>", images=image, return_tensors="pt")
    with pytest.raises(ValueError, match="take 64 positions, the prompt has 63"):
        model(input_ids=inputs["input_ids"][:, 1:], pixel_values=inputs["pixel_values"])


def test_in_prepend_slots_the_first_half_of_a_rows_image_ids_are_places() -> None:
    from ghostvis_cli.hf.model import image_places

    ids = torch.tensor([[9, 9, 1, 9, 9, 2], [9, 1, 2, 9, 3, 4]])
    assert image_places(ids, 9, "prepend_slots").int().tolist() == [[1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert image_places(ids, 9, "inline").sum() == 6


WITHOUT_US = """
import sys
sys.modules["ghostvis_cli"] = None  # any import of it fails
from transformers import AutoModelForImageTextToText, AutoProcessor
directory, image = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(directory, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
content = [{"type": "image", "image": image}, {"type": "text", "text": "What is in this picture?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
ids = model.generate(**inputs, max_new_tokens=64, do_sample=False)[0, inputs["input_ids"].shape[1] :]
print(processor.tokenizer.decode(ids, skip_special_tokens=True))
"""


def test_the_directory_answers_without_this_project_for_who_trusts_its_code(
    directory: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_US, str(directory), str(demo.EXAMPLES[1])],
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "A blue square, a yellow star and a green triangle on a gray background.\n", (
        done.stderr
    )


# --- what vLLM's backend of transformers' models asks (docs/convert.md)


def test_the_processor_says_what_replaces_each_image_token(loaded) -> None:
    _, processor = loaded
    texts = [f"{processor.image_token}one{processor.image_token}", f"none, then {processor.image_token}"]
    images = [Image.new("RGB", (40, 30))] * 3
    found = processor(text=texts, images=images, return_text_replacement_offsets=True)
    rows = processor.image_token * processor.num_image_tokens
    assert [len(each) for each in found["text_replacement_offsets"]] == [2, 1]
    for text, offsets in zip(texts, found["text_replacement_offsets"], strict=True):
        expanded = text.replace(processor.image_token, rows)
        for each in offsets:
            assert text[slice(*each["span"])] == each["text"] == processor.image_token
            assert expanded[slice(*each["new_span"])] == each["replacement"] == rows
    counts = processor._get_num_multimodal_tokens(image_sizes=[(480, 640), (10, 10)])
    assert counts["num_image_tokens"] == [processor.num_image_tokens] * 2
    assert counts["num_image_patches"] == [1, 1]


def test_the_encoder_and_an_images_rows_are_found_as_vllm_looks_for_them(loaded) -> None:
    model, processor = loaded
    assert type(model.get_encoder(modality="image")).__name__ == "Vision"
    assert type(model.model.get_encoder(modality="image")).__name__ == "Vision"
    pixels = processor.image_processor([Image.new("RGB", (40, 30))], return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        rows = model.model.get_image_features(pixels)
        assert torch.equal(model.model.get_image_features(pixels, return_dict=True).pooler_output, rows)
    assert rows.shape == (1, processor.num_image_tokens, model.config.text_config.hidden_size)


def test_layouts_whose_rows_stand_elsewhere_are_refused_by_name(tmp_path: Path) -> None:
    import ghostvis_cli.hf  # noqa: F401

    place = converted(DEMO, tmp_path / "made", layout="prepend_slots")
    processor = transformers.AutoProcessor.from_pretrained(place)
    with pytest.raises(ValueError, match=r"layout prepend_slots .* vLLM"):
        processor._get_num_multimodal_tokens(image_sizes=[(10, 10)])
    image = Image.new("RGB", (40, 30))
    with pytest.raises(ValueError, match="layout prepend_slots"):
        text = processor.image_token * 2
        processor(text=[text], images=[image], return_text_replacement_offsets=True)


def test_auto_model_loads_the_base_and_any_to_any_the_whole_without_a_question(directory: Path) -> None:
    import ghostvis_cli.hf  # noqa: F401

    assert type(transformers.AutoModel.from_pretrained(directory)).__name__ == "GhostVisModel"
    whole = transformers.AutoModelForMultimodalLM.from_pretrained(directory)
    assert type(whole).__name__ == "GhostVisForConditionalGeneration"
