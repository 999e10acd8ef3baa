"""`ghostvis chat` over the real SGLang: the local engine's words, and what was said before found in its cache."""

from pathlib import Path

import pytest

from tests.chat.scripts import ANSWERS, IMAGES, lines, records, run
from tests.sglang.asking import DEMO, directory
from tests.sglang.servers import Server, serving

pytestmark = pytest.mark.slow

ROOM = 250  # tokens; the long script below needs more


@pytest.mark.xdist_group("demo")
def test_a_scripted_conversation_about_two_images(demo_server: Server) -> None:
    demo_server.forget()
    turns = records(run(IMAGES, "--base-url", demo_server.url, "-t", "0", "--json"))
    assert [turn["text"] for turn in turns] == ANSWERS
    before = 0
    for turn in turns[:6]:  # all that was said, but the last tokens, which were never part of a prompt
        assert turn["usage"]["cached_tokens"] >= before - 2
        before = turn["usage"]["prompt_tokens"] + turn["usage"]["completion_tokens"]


def test_its_refusal_of_a_conversation_too_long_is_understood(tmp_path: Path) -> None:
    script = lines("Hello " * 40, "Hello", "Hello " * 40)
    with serving(directory(DEMO, tmp_path), "--context-length", str(ROOM)) as server:
        args = ("--base-url", server.url, "-t", "0", "--max-tokens", "100")
        refused, dropped = run(script, *args), run(script, *args, "--overflow", "drop-oldest")
    assert refused.exit_code == 3 and "drop-oldest" in refused.stderr
    assert dropped.exit_code == 0 and "the model no longer sees the oldest turn" in dropped.stderr
    assert len(dropped.stdout.splitlines()) == 3
