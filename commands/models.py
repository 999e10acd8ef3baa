"""`ghostvis models`: which checkpoints are there, and what each of them is."""

from typing import TYPE_CHECKING, Any

import typer

from ghostvis_cli.cli import options, output
from ghostvis_cli.errors import ModelError
from ghostvis_cli.version import SCHEMA_VERSION

if TYPE_CHECKING:
    from ghostvis_cli.checkpoint.hub import Reference
    from ghostvis_cli.checkpoint.locate import Checkpoint

app = typer.Typer(rich_markup_mode=None)
# Fields of a record that are null where the checkpoint can't be used, and `error`, which is where it can.
NOT_KNOWN = ("size_bytes", "kind", "parameters", "vision", "layout", "context_tokens", "generation", "constants",
             "error")  # fmt: skip


@app.command()
@options.takes(options.HF, options.BASE_DIR, options.PROFILE, options.JSON)
def models(ctx: typer.Context, *, json: bool) -> None:
    """List the checkpoints found: source, tag, step, kind, parameters, size."""
    from ghostvis_cli import demo
    from ghostvis_cli.checkpoint import hub, locate
    from ghostvis_cli.checkpoint.choose import DEMO_SOURCE, base_dir_of, is_base_chosen

    model = options.resolve_profile(ctx, ()).profile.model
    if (named := hub.reference(model)) is not None:
        _of_a_hub(named, json=json)
        return
    base = base_dir_of(model)
    if is_base_chosen(model) and not base.is_dir():
        raise ModelError(
            f"the base directory {base} is no directory", hint=f"--base-dir DIR or {locate.BASE_VARIABLE}"
        )
    found = [(checkpoint.source or "", checkpoint) for checkpoint in locate.scan(base)]
    found += [("", checkpoint) for checkpoint in locate.scan_loose(base)]
    found += [(DEMO_SOURCE, checkpoint) for checkpoint in locate.scan(demo.BASE_DIR)]
    records = [_record(source, checkpoint) for source, checkpoint in found]
    if json:
        output.record({"schema_version": SCHEMA_VERSION, "base_dir": str(base), "models": records})
        return
    if len(records) == 1:
        output.notice(f"no checkpoints in {base}: only the built-in demo model")
    headers = ("SOURCE", "TAG", "STEP", "KIND", "PARAMETERS", "SIZE")
    output.table(headers, [_row(record) for record in records])
    for record in records:
        if record["error"]:
            output.notice(record["error"])
        output.detail(record["path"])
        for name, constant in (record["constants"] or {}).items():
            output.detail(f"  {name} {constant['value']} ({constant['origin']})")


def _of_a_hub(named: "Reference", *, json: bool) -> None:
    """What a repository holds, by its list of files: no weights are fetched, and kinds are not known."""
    from ghostvis_cli.checkpoint import hub

    found = hub.scan(named, output.notice)
    records: list[dict[str, Any]] = [
        {
            "source": each.checkpoint.source,
            "tag": each.checkpoint.tag,
            "step": each.checkpoint.step,
            "path": each.path,
            "format": "huggingface" if each.checkpoint.hf else "torch",
            "size_bytes": each.weights_bytes,
        }
        for each in found
    ]
    if json:
        output.record({"schema_version": SCHEMA_VERSION, "hf": str(named), "models": records})
        return
    if not records:
        raise ModelError(f"{named} holds no model that is known here", hint="--hf OWNER/NAME:PATH")
    rows = [
        (
            each["source"] or "-",
            each["tag"] or "-",
            _number(each["step"]),
            each["path"],
            _size(each["size_bytes"]),
        )
        for each in records
    ]
    output.table(("SOURCE", "TAG", "STEP", "PATH", "SIZE"), rows)


def _number(step: int | None) -> str:
    return "-" if step is None else str(step)


def _size(nbytes: int | None) -> str:
    return "-" if nbytes is None else f"{nbytes / 1e6:,.1f} MB"


def _record(source: str, checkpoint: "Checkpoint") -> dict[str, Any]:
    """One checkpoint; a damaged or foreign one is listed with the reason it can't be used."""
    from ghostvis_cli.checkpoint import load
    from ghostvis_cli.errors import ModelError, one_line
    from ghostvis_cli.model.generations import PLAIN

    record: dict[str, Any] = {
        "source": source or None,
        "tag": checkpoint.tag,
        "step": checkpoint.step,
        "path": str(checkpoint.path),
        "format": "huggingface" if checkpoint.hf else "torch",
        **dict.fromkeys(NOT_KNOWN),
    }
    try:
        record["size_bytes"] = checkpoint.size_bytes
        classified = load.inspect(checkpoint)
        config = classified.config
        record |= {
            "kind": classified.kind,
            "parameters": classified.parameters,
            "vision": config.vision is not None,
            "layout": config.layout,
            "context_tokens": config.decoder.sequence_len,
            "generation": None if config.decoder.generation is PLAIN else config.decoder.generation.name,
            "constants": {
                name: {"value": value, "origin": origin}
                for name, (value, origin) in classified.constants.items()
            },
        }
    except OSError as error:  # a link that leads nowhere
        record["error"] = f"{checkpoint.path}: {one_line(error)}"
    except ModelError as error:
        record["error"] = error.message
    return record


def _row(record: dict[str, Any]) -> tuple[str, ...]:
    """Source and tag choose a model; one that has none is chosen by its path."""
    parameters = f"{record['parameters'] / 1e6:,.1f}M" if record["parameters"] else "-"
    kind = record["kind"] or "not usable"
    named = (record["source"], record["tag"] or "-") if record["source"] else ("-", record["path"])
    return (*named, _number(record["step"]), kind, parameters, _size(record["size_bytes"]))
