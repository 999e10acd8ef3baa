"""GhostVis models for SGLang, through the entry point group `sglang.srt.plugins`.

SGLang calls `register` in each of its processes and only logs what it raises, so callers use `check` before.
The plug-in holds the model, its images and guards; caching, scheduling and batching are SGLang's.
"""

import os
from multiprocessing import parent_process

from ghostvis_cli.errors import EngineError

HOSTS_VARIABLE = "GHOSTVIS_ALLOWED_IMAGE_HOSTS"  # where images may be fetched from, separated by commas
BACKGROUND_VARIABLE = "GHOSTVIS_IMAGES_BACKGROUND"  # as the setting images.background
# CUDA graphs of the vision part: for up to so many images; 0 for none.
GRAPHS_VARIABLE = "GHOSTVIS_VISION_GRAPHS"
# Set where several processes take requests: each needs the guards, and all the same key for image identities.
WORKERS_VARIABLE, IMAGE_KEY_VARIABLE = "GHOSTVIS_TOKENIZER_WORKERS", "GHOSTVIS_PICTURE_KEY"
GROUP, NAME = "sglang.srt.plugins", "ghostvis"
# SGLang imports every module of these two packages, for model classes (`EntryClass`) and image processors.
PACKAGES = {
    "SGLANG_EXTERNAL_MODEL_PACKAGE": "ghostvis_cli.sglang.plugin.models",
    "SGLANG_EXTERNAL_MM_PROCESSOR_PACKAGE": "ghostvis_cli.sglang.plugin.processors",
}


def register() -> None:
    """Register our configuration, models and processor in this process, and install the guards."""
    from ghostvis_cli import hf  # noqa: F401 - importing it registers the Auto classes

    for variable, package in PACKAGES.items():
        os.environ.setdefault(variable, package)
    # This process takes requests; others would import the whole server for nothing.
    if parent_process() is None or WORKERS_VARIABLE in os.environ:
        from ghostvis_cli.sglang.plugin import door, ends, garbage, guards

        guards.install()
        ends.install()
        garbage.install()
        if (rules := door.Rules.told()) is not None:
            door.install(rules)


def check() -> None:
    """EngineError where SGLang would start without the plug-in, and fail later for another reason."""
    from importlib.metadata import entry_points

    if NAME not in {point.name for point in entry_points(group=GROUP)}:
        raise EngineError(
            "ghostvis is not installed as a plug-in of SGLang",
            hint="pip install --force-reinstall --no-deps ghostvis-cli",
        )
    chosen = os.environ.get("SGLANG_PLUGINS")
    if chosen is not None and NAME not in (name.strip() for name in chosen.split(",")):
        raise EngineError(
            f"SGLANG_PLUGINS={chosen} leaves the ghostvis plug-in out", hint=f"export SGLANG_PLUGINS={NAME}"
        )
    for variable, package in PACKAGES.items():
        if (value := os.environ.get(variable, package)) != package:
            raise EngineError(
                f"{variable} is {value}, and SGLang reads one such package", hint=f"unset {variable}"
            )
    try:
        from ghostvis_cli import hf  # noqa: F401
    except ImportError as error:
        raise EngineError(
            f"the SGLang plug-in can't be imported: {error}", hint="pip install 'ghostvis-cli[sglang]'"
        ) from error
