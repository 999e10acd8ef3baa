"""Scripts for `ghostvis chat`, one whose answers are known among them, and how to run them in this process."""

import json
from typing import Any

from typer.testing import Result

from ghostvis_cli import demo
from tests.cli import invoke

RED, THREE = (str(path) for path in demo.EXAMPLES[:2])
DEMO = ("--source", "demo", "--temperature", "0")


def run(script: str | bytes, *args: str) -> Result:
    return invoke("chat", *args, input=script)


def lines(*given: str) -> str:
    return "".join(f"{line}\n" for line in given)


def records(done: Result) -> list[dict[str, Any]]:
    assert done.exit_code == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


IMAGES = lines(
    f"/image {RED}",
    "What is in this picture?",
    "What color is it?",
    "Where is it?",
    f"/image '{THREE}'",
    "How many shapes are there?",
    "What is in the first picture?",
    "What is in the second picture?",
    "/undo",
    "/regen",
)
ANSWERS = [
    "A red circle on a white background.",
    "It is red.",
    "It is in the center.",
    "There are three shapes.",
    "A red circle on a white background.",
    "A blue square, a yellow star and a green triangle on a gray background.",
    "A red circle on a white background.",
]
