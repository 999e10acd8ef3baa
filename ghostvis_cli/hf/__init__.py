"""GhostVis for transformers: importing this package makes the Auto classes know converted vision models.

    import ghostvis_cli.hf
    model = AutoModelForImageTextToText.from_pretrained(DIR)
    processor = AutoProcessor.from_pretrained(DIR)

Text models need none of it: they are stock Qwen3 and NanoChat directories.
"""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor

from ghostvis_cli.hf.config import GhostVisConfig, GhostVisVisionConfig
from ghostvis_cli.hf.model import GhostVisForConditionalGeneration, GhostVisModel
from ghostvis_cli.hf.processor import GhostVisImageProcessor, GhostVisProcessor

__all__ = [
    "GhostVisConfig",
    "GhostVisForConditionalGeneration",
    "GhostVisImageProcessor",
    "GhostVisModel",
    "GhostVisProcessor",
    "GhostVisVisionConfig",
]


def register() -> None:
    """May be called any number of times."""
    AutoConfig.register("ghostvis", GhostVisConfig, exist_ok=True)
    AutoConfig.register("ghostvis_vision", GhostVisVisionConfig, exist_ok=True)
    AutoModel.register(GhostVisConfig, GhostVisModel, exist_ok=True)
    AutoModelForImageTextToText.register(GhostVisConfig, GhostVisForConditionalGeneration, exist_ok=True)
    AutoImageProcessor.register(
        GhostVisConfig, slow_image_processor_class=GhostVisImageProcessor, exist_ok=True
    )
    AutoProcessor.register(GhostVisConfig, GhostVisProcessor, exist_ok=True)


register()
