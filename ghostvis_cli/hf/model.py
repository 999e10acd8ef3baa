"""The vision model for transformers: their decoder, our vision part, and where its rows go.

B rows of a batch, T positions, N rows an image, D width, V vocabulary.
"""

from typing import Any

from torch import Tensor, nn
from transformers import AutoModel, GenerationMixin
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)

from ghostvis_cli.hf.config import GhostVisConfig
from ghostvis_cli.hf.nanochat import (
    GhostVisNanoChatConfig,
    GhostVisNanoChatModel,
    GhostVisNanoChatPreTrainedModel,
    WithHead,
)
from ghostvis_cli.model.decoder import rms
from ghostvis_cli.model.vision import Vision


class GhostVisPreTrainedModel(GhostVisNanoChatPreTrainedModel):
    config_class = GhostVisConfig
    input_modalities = ["image", "text"]  # noqa: RUF012 - the base class declares these so
    _no_split_modules = [  # noqa: RUF012
        *("Qwen3DecoderLayer", "NanoChatDecoderLayer", "GhostVisNanoChatLayer", "TowerBlock")
    ]
    _supports_flash_attn = True
    _supports_attention_backend = True


class GhostVisModel(GhostVisPreTrainedModel):
    """The decoder without its head, and the vision part."""

    def __init__(self, config: GhostVisConfig) -> None:
        super().__init__(config)
        self.vision = Vision(config.vision_config.vision(), config.text_config.hidden_size)
        if isinstance(config.text_config, GhostVisNanoChatConfig):
            if config.text_config._attn_implementation == "vllm":
                raise ValueError(
                    "vLLM can't serve nanochat's generations of 2026: ghostvis serve does, by SGLang"
                )
            self.language_model = GhostVisNanoChatModel(config.text_config)
        else:
            self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        return self.vision if modality == "image" else super().get_encoder(modality=modality)

    def get_image_features(
        self, pixel_values: Tensor, return_dict: bool = False, **_: Any
    ) -> Tensor | BaseModelOutputWithPooling:
        """(images, 3, S, S) -> (images, N, D) float32, normalised like the embedding table's rows.

        With return_dict they are its `pooler_output`, as vLLM asks.
        """
        rows = rms(self.vision(pixel_values))
        return BaseModelOutputWithPooling(pooler_output=rows) if return_dict else rows

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """`pixel_values` holds the images of all rows, in order; `input_ids` N image ids for each of them."""
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            if input_ids is None:
                raise ValueError("pixel_values need input_ids, which say where the images stand")
            rows = rms(self.vision(pixel_values)).to(inputs_embeds)
            places = image_places(input_ids, self.config.image_token_id, self.config.image_layout)
            if int(places.sum()) != rows.size(0) * rows.size(1):
                raise ValueError(
                    f"{rows.size(0)} images take {rows.size(0) * rows.size(1)} positions, "
                    f"the prompt has {int(places.sum())}"
                )
            inputs_embeds = inputs_embeds.masked_scatter(places[..., None], rows)
            input_ids = input_ids.masked_fill(places, -1)
        if isinstance(self.language_model, GhostVisNanoChatModel):
            kwargs["input_ids"] = input_ids  # it has more than one embedding of them
        return self.language_model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)


def image_places(input_ids: Tensor, image_token_id: int, layout: str) -> Tensor:
    """Which positions (B, T) of a prompt the images' rows take.

    All that hold the image id; in prepend_slots the first half of them, since the others are ordinary tokens.
    """
    places = input_ids == image_token_id
    if layout == "prepend_slots":
        places &= places.cumsum(-1) <= places.sum(-1, keepdim=True) // 2
    return places


class GhostVisForConditionalGeneration(WithHead, GhostVisPreTrainedModel, GenerationMixin):
    def __init__(self, config: GhostVisConfig) -> None:
        super().__init__(config)
        self.model = GhostVisModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> Tensor | BaseModelOutputWithPooling:
        """(B, 3, S, S) normalised pixels -> rows (B, N, D)."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """logits (B, T, V) float32. `generate` reads from this signature what it may pass on."""
        kwargs.pop("return_dict", None)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        return self.scored(outputs, labels, logits_to_keep)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Images belong to the prompt: once it is in the cache they are not encoded again."""
        pixel_values = kwargs.pop("pixel_values", None)
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]
        cache = kwargs.get("past_key_values")
        if pixel_values is not None and (cache is None or not cache.get_seq_length()):
            inputs["pixel_values"] = pixel_values
        return inputs
