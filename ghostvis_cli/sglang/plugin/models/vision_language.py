"""The vision-language model: one of the decoders, and our vision part, whole on every rank.

N rows an image, D width, S image size in pixels.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from sglang.srt.managers.mm_utils import MultiModalityDataPaddingPatternMultimodalTokens
from sglang.srt.model_loader.weight_utils import default_weight_loader
from sglang.srt.utils import add_prefix
from torch import Tensor, nn

from ghostvis_cli.hf.nanochat import GhostVisNanoChatConfig
from ghostvis_cli.model.decoder import rms
from ghostvis_cli.model.vision import Vision
from ghostvis_cli.sglang.plugin.image_rows import ImageRows
from ghostvis_cli.sglang.plugin.models.nanochat import GhostVisNanoChatForCausalLM
from ghostvis_cli.sglang.plugin.models.text import decoder_class
from ghostvis_cli.sglang.plugin.vision_graphs import VisionGraphs, attention_kernels, captured, uploaded
from ghostvis_cli.sglang.plugin.weights import complete

VISION, DECODER = "model.vision.", "model.language_model."  # as directories name their tensors


class GhostVisForConditionalGeneration(nn.Module):
    _mean: Tensor
    _std: Tensor
    packed_modules_mapping = {  # noqa: RUF012 - SGLang reads it from the class
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "", **_: Any) -> None:
        super().__init__()
        self.config = config
        text, vision = config.text_config, config.vision_config
        self.vision = Vision(vision.vision(), text.hidden_size).eval()
        place = add_prefix("language_model", prefix)
        self.is_nanochat = text.model_type == GhostVisNanoChatConfig.model_type
        self.language_model: Any = (
            GhostVisNanoChatForCausalLM(text, quant_config, place, images=True)
            if self.is_nanochat
            else decoder_class(text.model_type)(text, quant_config=quant_config, prefix=place)
        )
        self.model = self.language_model.model  # where SGLang looks for the layers when it captures graphs
        self._padding = MultiModalityDataPaddingPatternMultimodalTokens()
        self._images = ImageRows(self.get_image_feature, vision.num_tokens)
        self._graphs: VisionGraphs | None = None
        for name, values in (("_mean", vision.image_mean), ("_std", vision.image_std)):
            of_channels = torch.tensor(values, dtype=torch.float32)[:, None, None]
            self.register_buffer(name, of_channels, persistent=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def pad_input_ids(self, input_ids: Any, mm_inputs: Any) -> Any:
        """The ids as the radix cache keys them: in an image's place, numbers made of its identity."""
        return self._padding.pad_input_tokens(input_ids, mm_inputs)

    @torch.no_grad()
    def get_image_feature(self, items: list[Any]) -> Tensor:
        """Images of any number of requests -> (images * N, D), normalised like the embedding's rows."""
        crops = uploaded([item.feature for item in items], self._mean.device)
        if self._graphs is not None and self._graphs.has(len(items)):
            return self._graphs.run(crops).flatten(0, 1)
        return self._rows(crops).flatten(0, 1)

    def _rows(self, crops: Tensor) -> Tensor:
        """(B, S, S, 3) uint8 -> (B, N, D)."""
        with attention_kernels(crops.device):
            rows = rms(self.vision(self._normalised(crops))).to(self.vision.tower.position.dtype)
        wanted = (len(crops), self.config.vision_config.num_tokens, self.config.text_config.hidden_size)
        if rows.shape != wanted:
            raise ValueError(f"the vision part gave {tuple(rows.shape)} where {wanted} belongs")
        return rows

    def _normalised(self, crops: Tensor) -> Tensor:
        """(B, S, S, 3) uint8 -> (B, 3, S, S) float32, by the arithmetic of `model.preprocess`."""
        return (crops.permute(0, 3, 1, 2).float() / 255 - self._mean) / self._std

    def forward(
        self, input_ids: Tensor, positions: Tensor, forward_batch: Any, get_embedding: bool = False, **_: Any
    ) -> Any:
        """input_ids (T,) with images' places beyond the vocabulary -> what SGLang's logits processor gives."""
        extra = {}
        if self.is_nanochat:  # which has more than one embedding of its ids; images' places lie beyond them
            beyond = input_ids >= self.config.text_config.vocab_size
            extra["token_ids"] = input_ids.masked_fill(beyond, -1)
        return self.language_model(
            input_ids=None,
            forward_batch=forward_batch,
            input_embeds=self._embedded(input_ids, forward_batch),
            positions=positions,
            get_embedding=get_embedding,
            **extra,
        )

    def _embedded(self, input_ids: Tensor, batch: Any) -> Tensor | None:
        """(T, D) of tokens and images; None where another rank of a pipeline embeds them."""
        if not self.language_model.pp_group.is_first_rank:
            return None
        mode = batch.forward_mode
        sees = not mode.is_decode() and not mode.is_target_verify() and batch.contains_mm_inputs()
        if sees:  # in place, as SGLang does it: whoever reads the ids later finds them within the vocabulary
            input_ids.clamp_(0, self.config.text_config.vocab_size - 1)
        embedding: Tensor = self.get_input_embeddings()(input_ids)
        if sees:
            self._images.put(embedding, batch)
            batch.mm_inputs, batch.mm_input_embeds = None, embedding
        if batch.input_embeds is None:
            return embedding
        batch.input_embeds.copy_(embedding)  # where a graph will read it
        return batch.input_embeds

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take (name, tensor) pairs: the vision part's here, the others for the language model."""
        vision = dict(self.vision.named_parameters())
        expected = {VISION + name for name in vision} | {
            re.sub(r"^model\.", DECODER, name) for name in self.language_model.expected()
        }

        def of_the_decoder() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in complete(weights, expected):
                if name.startswith(VISION):
                    default_weight_loader(vision[name.removeprefix(VISION)], tensor)
                else:
                    yield name.replace(DECODER, "model."), tensor

        self.language_model.load_weights(of_the_decoder())
        self._images.forget()
        if self._graphs is None:  # new weights for a running server go where the old ones are
            with torch.no_grad():
                size, device = self.config.vision_config.image_size, self._mean.device
                self._graphs = captured(self._rows, size, device)


EntryClass = GhostVisForConditionalGeneration
