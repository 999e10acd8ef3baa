"""nanochat's generations of 2026 for transformers: no stock class has their scalars, value embeddings or smear.

The mathematics is `ghostvis_cli.model.decoder`'s, over transformers' names, caches and padding. Every constant is
in the configuration. B rows of a batch, T new positions, M all positions, D width, K key heads, h head size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from ghostvis_cli.model.config import SMEAR_CHANNELS
from ghostvis_cli.model.decoder import inverse_frequencies, rms, rotate


class GhostVisNanoChatConfig(PreTrainedConfig):
    """`window_sizes` is how many earlier positions each layer sees; empty: all of them in all layers."""

    model_type = "ghostvis_nanochat"

    def __init__(
        self,
        vocab_size: int = 32768,
        hidden_size: int = 768,
        intermediate_size: int = 3072,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 6,
        num_key_value_heads: int = 6,
        head_dim: int = 128,
        max_position_embeddings: int = 20480,
        rope_theta: float = 100000.0,
        rotary_tables: str = "bfloat16",
        final_logit_softcapping: float = 15.0,
        generation: str = "n7",
        qk_scale: float = 1.2,
        gate_channels: int = 12,
        gate_scale: float = 3.0,
        smear: bool = True,
        window_sizes: list[int] | None = None,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads, self.num_key_value_heads = num_attention_heads, num_key_value_heads
        self.head_dim = head_dim
        self.max_position_embeddings = max_position_embeddings
        self.rope_theta, self.rotary_tables = rope_theta, rotary_tables
        self.final_logit_softcapping = final_logit_softcapping
        self.generation, self.qk_scale = generation, qk_scale
        self.gate_channels, self.gate_scale = gate_channels, gate_scale
        self.smear = smear
        self.window_sizes = list(window_sizes or [])
        self.use_cache = use_cache
        super().__init__(**kwargs)

    def has_value_embedding(self, layer: int) -> bool:
        """Whether a layer has a value embedding: every second one, the last included."""
        return bool(self.gate_channels) and layer % 2 == (self.num_hidden_layers - 1) % 2


class SmearCache(DynamicCache):
    """Keys and values, and the normalised embeddings (B, M, D): the next token takes in the last one."""

    rows: Tensor | None = None

    @classmethod
    def of(cls, cache: Any) -> "SmearCache":
        """A stock DynamicCache becomes one before anything is in it."""
        if isinstance(cache, cls):
            return cache
        if type(cache) is not DynamicCache or cache.get_seq_length():
            raise ValueError("a nanochat model with smear needs a SmearCache, or an empty DynamicCache")
        cache.__class__ = cls
        return cache  # type: ignore[return-value]

    def last(self, rows: Tensor) -> Tensor:
        """The rows before each of the new ones (B, T, D), zero before the first; the new ones are kept."""
        first = torch.zeros_like(rows[:, :1]) if self.rows is None else self.rows[:, -1:]
        self.rows = rows if self.rows is None else torch.cat((self.rows, rows), dim=1)
        return torch.cat((first, rows[:, :-1]), dim=1)

    def _change(self, change: Any) -> None:
        self.rows = None if self.rows is None else change(self.rows)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Take the sequences beam_idx (B,) in their new order."""
        super().reorder_cache(beam_idx)
        self._change(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def crop(self, *args: Any, **kwargs: Any) -> None:
        super().crop(*args, **kwargs)
        self._change(lambda rows: rows[:, : self.get_seq_length()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._change(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices` of the batch."""
        super().batch_select_indices(indices)
        self._change(lambda rows: rows[indices])

    def reset(self) -> None:
        super().reset()
        self.rows = None


class GhostVisNanoChatAttention(nn.Module):
    def __init__(self, config: GhostVisNanoChatConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        D, h = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(D, config.num_attention_heads * h, bias=False)
        self.k_proj = nn.Linear(D, config.num_key_value_heads * h, bias=False)
        self.v_proj = nn.Linear(D, config.num_key_value_heads * h, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * h, D, bias=False)
        if config.has_value_embedding(layer):
            self.gate = nn.Linear(config.gate_channels, config.num_key_value_heads, bias=False)

    def forward(
        self, x: Tensor, value: Tensor | None, mask: Tensor, turn: tuple[Tensor, Tensor], cache: Any
    ) -> Tensor:
        """(B, T, D) -> (B, T, D) and the weights, which are None."""
        config = self.config
        B, T, _ = x.shape
        q, k, v = (
            project(x).view(B, T, -1, config.head_dim) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if value is not None:
            gate = config.gate_scale * torch.sigmoid(self.gate(x[..., : config.gate_channels]))
            v = v + gate[..., None] * value.view(v.shape)
        q, k = (rms(rotate(each, *turn)).to(v.dtype).transpose(1, 2) for each in (q, k))
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        scale = config.qk_scale**2 / config.head_dim**0.5
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.size(1) != k.size(1)
        )
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class GhostVisNanoChatMLP(nn.Module):
    def __init__(self, config: GhostVisNanoChatConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.fc2(F.relu(self.fc1(x)).square())


class GhostVisNanoChatLayer(GradientCheckpointingLayer):
    """`value_embed` belongs to the token; ids below zero are images' rows, which have none."""

    def __init__(self, config: GhostVisNanoChatConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = GhostVisNanoChatAttention(config, layer)
        self.mlp = GhostVisNanoChatMLP(config)
        if config.has_value_embedding(layer):
            width = config.num_key_value_heads * config.head_dim
            self.value_embed = nn.Embedding(config.vocab_size, width)

    def forward(
        self, x: Tensor, ids: Tensor, mask: Tensor, turn: tuple[Tensor, Tensor], cache: Any = None
    ) -> Tensor:
        """x (B, T, D) float32, the residual stream; ids (B, T)."""
        weights = self.mlp.fc1.weight.dtype
        value = None
        if hasattr(self, "value_embed"):
            value = self.value_embed(ids.clamp(min=0)).masked_fill((ids < 0)[..., None], 0)
        x = x + self.self_attn(rms(x).to(weights), value, mask, turn, cache)
        return x + self.mlp(rms(x).to(weights))


class GhostVisNanoChatPreTrainedModel(PreTrainedModel):
    config_class: Any = GhostVisNanoChatConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GhostVisNanoChatLayer"]  # noqa: RUF012 - the base class declares these so
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    # Scalars of the residual stream.
    _keep_in_fp32_modules_strict = ["resid_lambdas", "x0_lambdas", "smear_lambda", "backout_lambda"]  # noqa: RUF012
    _supports_sdpa = True

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights. The first parameters are scalars of another."""
        table: Any = self.get_input_embeddings()
        return table.weight.dtype


class GhostVisNanoChatModel(GhostVisNanoChatPreTrainedModel):
    def __init__(self, config: GhostVisNanoChatConfig) -> None:
        super().__init__(config)
        layers = config.num_hidden_layers
        self.embed_tokens: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(GhostVisNanoChatLayer(config, layer) for layer in range(layers))
        self.resid_lambdas = nn.Parameter(torch.ones(layers))
        self.x0_lambdas = nn.Parameter(torch.zeros(layers))
        if config.smear:
            self.smear_gate = nn.Linear(SMEAR_CHANNELS, 1, bias=False)
            self.smear_lambda = nn.Parameter(torch.zeros(1))
            self.backout_lambda = nn.Parameter(torch.zeros(1))
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """Value embeddings need the ids beside `inputs_embeds` too; those of images' rows are negative."""
        if input_ids is None:
            if self.config.gate_channels:
                raise ValueError("a nanochat model with value embeddings needs input_ids")
            assert inputs_embeds is not None, "one of the two"
            input_ids = inputs_embeds.new_zeros(inputs_embeds.shape[:2], dtype=torch.int64)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        cache = past_key_values
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if cache is None and use_cache and not self.training:
            cache = DynamicCache()
        T = inputs_embeds.size(1)
        past = 0 if cache is None else cache.get_seq_length()
        if position_ids is None:
            position_ids = self._positions(attention_mask, past, T, inputs_embeds.device)
        x = rms(inputs_embeds.float())
        if self.config.smear:
            x = self.smear(x, position_ids, cache)
        masks = self.masks(attention_mask, past, T, x.device)
        turn = self.turn(position_ids)
        x0 = middle = x
        seen = [x]
        for i, layer in enumerate(self.layers):
            x = layer(self.blend(x, x0, i), input_ids, masks[self.window(i)], turn, cache)
            if i == self.config.num_hidden_layers // 2:
                middle = x
            seen.append(x)
        return BaseModelOutputWithPast(
            last_hidden_state=rms(self.back_out(x, middle)).to(inputs_embeds.dtype),
            past_key_values=cache,
            hidden_states=tuple(seen) if output_hidden_states else None,
        )

    def _positions(self, mask: Tensor | None, past: int, new: int, device: torch.device) -> Tensor:
        if mask is not None and mask.dim() == 2:
            return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -new:]
        return torch.arange(past, past + new, device=device)[None]

    def smear(self, e: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """Each normalised row (B, T, D) takes in the one before it; a sequence's first, at position 0, none."""
        before = F.pad(e[:, :-1], (0, 0, 1, 0)) if cache is None else SmearCache.of(cache).last(e)
        before = before.masked_fill((positions == 0)[..., None], 0)
        gate = self.smear_gate(e[..., :SMEAR_CHANNELS].to(self.smear_gate.weight.dtype)).float()
        return e + self.smear_lambda * torch.sigmoid(gate) * before

    def blend(self, x: Tensor, x0: Tensor, layer: int) -> Tensor:
        """The input of a layer: x and the first layer's x0, (B, T, D) both, each by its learned share."""
        return self.resid_lambdas[layer] * x + self.x0_lambdas[layer] * x0

    def back_out(self, x: Tensor, middle: Tensor) -> Tensor:
        """x (B, T, D) less a learned share of the middle layer's output."""
        return x - self.backout_lambda * middle if self.config.smear else x

    def window(self, layer: int) -> int | None:
        return self.config.window_sizes[layer] if self.config.window_sizes else None

    def masks(
        self, attention_mask: Tensor | None, past: int, new: int, device: torch.device
    ) -> dict[int | None, Tensor]:
        """For each window, which keys a query sees, (B or 1, 1, T, M). Padding sees itself: a softmax needs one."""
        key = torch.arange(past + new, device=device)
        query = torch.arange(past, past + new, device=device)[:, None]
        real = None if attention_mask is None else attention_mask.bool()
        if real is not None and real.dim() == 4:
            real = real[:, 0]
        elif real is not None:
            real = real[:, None]
        found: dict[int | None, Tensor] = {}
        for window in set(self.config.window_sizes) or {None}:
            seen = key <= query if window is None else (key <= query) & (key >= query - window)
            found[window] = (seen if real is None else seen & real | (key == query))[..., None, :, :]
        return {window: mask if mask.dim() == 4 else mask[None] for window, mask in found.items()}

    def turn(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """[cos cos] and [sin -sin] of positions (B, T), (B, T, 1, h), rounded as training's tables were."""
        inverse = inverse_frequencies(self.config.head_dim, self.config.rope_theta).to(positions.device)
        angle = positions[..., None, None].float() * inverse
        cos, sin = angle.cos(), angle.sin()
        if self.config.rotary_tables == "bfloat16":
            cos, sin = cos.bfloat16().float(), sin.bfloat16().float()
        return torch.cat((cos, cos), dim=-1), torch.cat((sin, -sin), dim=-1)


class WithHead:
    """What a model with a language head has besides its `model` and `lm_head`."""

    config: Any
    model: Any
    lm_head: nn.Module
    loss_function: Any

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def scored(
        self, outputs: Any, labels: Tensor | None, logits_to_keep: int | Tensor
    ) -> CausalLMOutputWithPast:
        """Logits (B, T', V) float32 of the positions to keep, softly capped; the loss where labels are."""
        text = self.config.get_text_config()
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits: Tensor = self.lm_head(outputs.last_hidden_state[:, kept, :]).float()
        if cap := text.final_logit_softcapping:
            logits = cap * torch.tanh(logits / cap)
        return CausalLMOutputWithPast(
            loss=None if labels is None else self.loss_function(logits, labels, text.vocab_size),
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class GhostVisNanoChatForCausalLM(WithHead, GhostVisNanoChatPreTrainedModel, GenerationMixin):
    def __init__(self, config: GhostVisNanoChatConfig) -> None:
        super().__init__(config)
        self.model = GhostVisNanoChatModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """logits (B, T, V) float32, softly capped."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        return self.scored(outputs, labels, logits_to_keep)
