"""config.json of a converted vision model: a text_config that transformers knows, a vision_config of ours."""

from typing import Any, ClassVar

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from ghostvis_cli.hf.nanochat import GhostVisNanoChatConfig
from ghostvis_cli.model.config import Layout, ResamplerMode, TowerConfig, TowerFamily, VisionConfig

NO_NORMALISATION = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # the image processor's business


class GhostVisVisionConfig(PreTrainedConfig):
    """Tower, resampler and projector. `hidden_size` and its like describe the tower, `output_size` the rows."""

    model_type = "ghostvis_vision"

    def __init__(
        self,
        tower_family: TowerFamily = "clip",
        hidden_size: int = 1024,
        intermediate_size: int = 4096,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        patch_size: int = 14,
        image_size: int = 224,
        num_tokens: int = 64,
        resampler_mode: ResamplerMode = "perceiver",
        resampler_depth: int = 2,
        resampler_heads: int = 8,
        proj_hidden: int = 2048,
        output_size: int = 2048,
        **kwargs: Any,
    ) -> None:
        self.tower_family = tower_family
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.patch_size = patch_size
        self.image_size = image_size
        self.num_tokens = num_tokens
        self.resampler_mode = resampler_mode
        self.resampler_depth = resampler_depth
        self.resampler_heads = resampler_heads
        self.proj_hidden = proj_hidden
        self.output_size = output_size
        super().__init__(**kwargs)

    def vision(self) -> VisionConfig:
        """The same, as `ghostvis_cli.model.vision.Vision` takes it."""
        tower = TowerConfig(
            self.tower_family,
            self.hidden_size,
            self.num_hidden_layers,
            self.num_attention_heads,
            self.intermediate_size,
            self.patch_size,
            self.image_size,
        )
        return VisionConfig(
            tower,
            self.num_tokens,
            self.resampler_mode,
            self.resampler_depth,
            self.resampler_heads,
            self.proj_hidden,
            *NO_NORMALISATION,
        )


class GhostVisConfig(PreTrainedConfig):
    """`text_config` is a Qwen3Config (swiglu), a NanoChatConfig (relu2), or a later generation's."""

    model_type = "ghostvis"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig, "vision_config": GhostVisVisionConfig}

    def __init__(
        self,
        text_config: dict[str, Any] | PreTrainedConfig | None = None,
        vision_config: dict[str, Any] | PreTrainedConfig | None = None,
        image_token_id: int | None = None,
        image_layout: Layout = "inline",
        **kwargs: Any,
    ) -> None:
        if not isinstance(text_config, PreTrainedConfig):
            text = dict(text_config or {})
            model_type = text.pop("model_type", "qwen3")
            if model_type == GhostVisNanoChatConfig.model_type:
                text_config = GhostVisNanoChatConfig(**text)
            else:
                text_config = AutoConfig.for_model(model_type, **text)
        if not isinstance(vision_config, PreTrainedConfig):
            vision_config = GhostVisVisionConfig(**(vision_config or {}))
        self.text_config, self.vision_config = text_config, vision_config
        self.image_token_id, self.image_layout = image_token_id, image_layout
        super().__init__(**kwargs)
