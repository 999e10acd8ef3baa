"""GhostVis for transformers: importing this package makes the Auto classes know converted models that need it.

    import ghostvis_cli.hf
    model = AutoModelForImageTextToText.from_pretrained(DIR)
    processor = AutoProcessor.from_pretrained(DIR)

Those are vision models, and nanochat's generations of 2026. Other text models are stock Qwen3 and NanoChat
directories.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from ghostvis_cli.hf.config import GhostVisConfig, GhostVisVisionConfig
from ghostvis_cli.hf.model import GhostVisForConditionalGeneration, GhostVisModel
from ghostvis_cli.hf.nanochat import (
    GhostVisNanoChatConfig,
    GhostVisNanoChatForCausalLM,
    GhostVisNanoChatModel,
    SmearCache,
)
from ghostvis_cli.hf.processor import GhostVisImageProcessor, GhostVisProcessor

__all__ = [
    "GhostVisConfig",
    "GhostVisForConditionalGeneration",
    "GhostVisImageProcessor",
    "GhostVisModel",
    "GhostVisNanoChatConfig",
    "GhostVisNanoChatForCausalLM",
    "GhostVisNanoChatModel",
    "GhostVisProcessor",
    "GhostVisVisionConfig",
    "SmearCache",
]


def register() -> None:
    """Register our classes with transformers. May be called repeatedly."""
    AutoConfig.register("ghostvis", GhostVisConfig, exist_ok=True)
    AutoConfig.register("ghostvis_vision", GhostVisVisionConfig, exist_ok=True)
    AutoConfig.register("ghostvis_nanochat", GhostVisNanoChatConfig, exist_ok=True)
    AutoModel.register(GhostVisNanoChatConfig, GhostVisNanoChatModel, exist_ok=True)
    AutoModelForCausalLM.register(GhostVisNanoChatConfig, GhostVisNanoChatForCausalLM, exist_ok=True)
    AutoModel.register(GhostVisConfig, GhostVisModel, exist_ok=True)
    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        auto.register(GhostVisConfig, GhostVisForConditionalGeneration, exist_ok=True)
    AutoImageProcessor.register(
        GhostVisConfig, slow_image_processor_class=GhostVisImageProcessor, exist_ok=True
    )
    AutoProcessor.register(GhostVisConfig, GhostVisProcessor, exist_ok=True)


register()
