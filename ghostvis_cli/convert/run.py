"""One conversion: write, verify, put in place."""

import json
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from ghostvis_cli import sizes
from ghostvis_cli.convert import hf_files as files
from ghostvis_cli.convert import remote_code, shards, staging
from ghostvis_cli.convert import tokenizer as tokenizer_files
from ghostvis_cli.convert.directory import CERTIFICATE, CONFIG, GENERATION_CONFIG, INDEX, MADE_BY, TOKENIZER
from ghostvis_cli.convert.plan import Plan
from ghostvis_cli.errors import CheckFailedError
from ghostvis_cli.files import write as write_file
from ghostvis_cli.threads import too_small_to_share
from ghostvis_cli.version import SCHEMA_VERSION, __version__

SMALL_FILES_BYTES = 16 * 1024**2  # more than everything beside the weights takes


@dataclass
class Progress:
    """Where a conversion stands. Set `cancelled` from another thread to end it soon and without a trace."""

    total_bytes: int
    written_bytes: int = 0
    stage: str = "writing"
    cancelled: threading.Event = field(default_factory=threading.Event)

    def wrote(self, nbytes: int) -> None:
        self.written_bytes += nbytes
        self.check()

    def check(self) -> None:
        if self.cancelled.is_set():
            raise CancelledError

    def line(self) -> str:
        if self.stage != "writing":
            return self.stage
        share = self.written_bytes / max(1, self.total_bytes)
        return f"writing {share:4.0%} of {sizes.shown(self.total_bytes)}"


class CancelledError(Exception):
    """The conversion was cancelled."""


def run(plan: Plan, place: Path, progress: Progress) -> dict[str, Any]:
    """Write the directory `place`; the contents of its certificate. CheckFailedError leaves DIR.failed."""
    place = place.expanduser().resolve()  # a link stays a link when what it names is replaced
    failed = place.with_name(f"{place.name}.failed")
    replaced = staging.replaceable(place, force=plan.settings.force)
    failed_before = staging.replaceable(failed, force=True)
    with staging.staged(place, plan.weights_bytes + SMALL_FILES_BYTES) as directory:
        certificate = _write(plan, directory, progress)
        certificate["verification"] = _verification(plan, directory, progress)
        _write_json(directory / CERTIFICATE, certificate)
        progress.stage = "syncing"
        progress.check()
        passed = certificate["verification"].get("passed", True)
        if passed:
            staging.publish(directory, place, replaced)
        else:
            staging.publish(directory, failed, failed_before)
    if not passed:
        raise CheckFailedError(
            f"the converted model does not answer as the checkpoint does: {_faults(certificate)}",
            hint=f"nothing was put at {place}; see {failed / CERTIFICATE}",
        )
    return certificate


def _verification(plan: Plan, directory: Path, progress: Progress) -> dict[str, Any]:
    if not plan.settings.verify:
        return {"skipped": True}
    from ghostvis_cli.convert.tensors import one_thread

    if plan.settings.by_layer:
        from ghostvis_cli.convert.by_layer import verify
    else:
        from ghostvis_cli.convert.verify import verify

    progress.stage = "verifying"
    small = too_small_to_share(sum(target.numel for target in plan.targets))
    with one_thread() if small else nullcontext():
        return verify(plan, directory, progress.check)


def _faults(certificate: Mapping[str, Any]) -> str:
    verification = certificate["verification"]
    faults = [
        f"{check['name']} {_figure(check['value'])} (limit {check['limit']:g})"
        for check in verification["checks"]
        if not check["ok"]
    ]
    if layer := verification["first_diverging_layer"]:
        faults.append(f"first diverging layer {layer}")
    return "; ".join(faults)


def _figure(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"


def _write(plan: Plan, directory: Path, progress: Progress) -> dict[str, Any]:
    """All files but the certificate; its beginning, with the hashes of everything read and written."""
    from ghostvis_cli.convert.tensors import CheckpointTensors, one_thread

    checkpoint = plan.checkpoint
    inputs = [checkpoint.path, checkpoint.meta_path, checkpoint.tokenizer_path]
    source = CheckpointTensors(checkpoint.path)
    outputs: dict[str, str] = {}
    with one_thread(), ThreadPoolExecutor(1) as other_core:
        hashes = [other_core.submit(_sha256, path) for path in inputs]
        for name, content in small_files(plan).items():
            text = content if isinstance(content, str) else _json(content)
            write_file(directory / name, text.encode(), durable=False)  # synced where it gets its name
            outputs[name] = sha256(text.encode()).hexdigest()
        for shard in plan.shards:
            outputs[shard.name] = shards.write(
                directory / shard.name, shard, source, plan.settings.dtype, progress.wrote
            )
        read = {str(path): future.result() for path, future in zip(inputs, hashes, strict=True)}
    return {
        "schema_version": SCHEMA_VERSION,
        "made_by": f"{MADE_BY} {__version__}",
        "architecture": plan.architecture,
        "source": {
            "path": str(checkpoint.path),
            "source": checkpoint.source,
            "tag": checkpoint.tag,
            "step": checkpoint.step,
        },
        "dtype": plan.settings.dtype,
        "layout": plan.layout,
        "constants": checkpoint.constants.chosen,  # that the user set
        "weights_bytes": plan.weights_bytes,
        "inputs": read,
        "outputs": outputs,
    }


def small_files(plan: Plan) -> dict[str, Mapping[str, Any] | str]:
    """Everything beside the weights, by name: JSON contents, or text."""
    config, tokenizer, layout = plan.classified.config, plan.tokenizer, plan.layout
    config_json = files.model_config(config, tokenizer, plan.settings.dtype, layout)
    found: dict[str, Mapping[str, Any] | str] = {
        CONFIG: config_json,
        GENERATION_CONFIG: files.generation_config(tokenizer),
        TOKENIZER: tokenizer_files.tokenizer_json(tokenizer, layout),
        "tokenizer_config.json": tokenizer_files.tokenizer_config(
            tokenizer, layout, config.decoder.max_positions
        ),
        "chat_template.jinja": tokenizer_files.chat_template(layout),
    }
    if layout is not None:
        token = tokenizer_files.image_token(layout)
        found["preprocessor_config.json"] = files.image_processor_config(config)
        found["processor_config.json"] = files.processor_config(config, layout, token)
    if "auto_map" in config_json:
        parts = remote_code.TEXT if layout is None else remote_code.VISION
        found[remote_code.FILE] = remote_code.source(parts)
    if len(plan.shards) > 1:
        found[INDEX] = shards.index(plan.shards, plan.settings.dtype)
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_file(path, _json(content).encode(), durable=False)
