"""Every subcommand: its name, its line in the help, its module. A static table, so that help imports none."""

from importlib import import_module
from typing import Any, NamedTuple


class Command(NamedTuple):
    name: str
    summary: str
    module: str


COMMANDS = (
    Command("generate", "Answer a prompt, with or without images.", "generate"),
    Command("chat", "Talk with a model about images.", "chat"),
    Command("serve", "Serve a model over OpenAI's routes.", "serve"),
    Command("bench", "Measure throughput and latency; compare runs.", "bench"),
    Command("convert", "Convert a checkpoint for SGLang, vLLM and transformers.", "convert"),
    Command("doctor", "Examine the installation, the settings and the model.", "doctor"),
    Command("models", "List the checkpoints found.", "models"),
    Command("profile", "Named settings, and where each value comes from.", "profile"),
)


def load_command(command: Command) -> Any:
    """The Typer application of one command module: the only place that imports one."""
    return import_module(f"ghostvis_cli.commands.{command.module}").app
