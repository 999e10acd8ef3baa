"""nanochat's generations of 2026, on SGLang's layers: plain ones, since the embedding comes back in each of them.

The mathematics is `ghostvis_cli.model.decoder`'s. T tokens of a step, D width, H query heads and K key heads of
this rank, h head size.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from sglang.srt.distributed.parallel_state import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from sglang.srt.layers.linear import QKVParallelLinear, RowParallelLinear
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.rotary_embedding import get_rope
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.model_loader.weight_utils import default_weight_loader
from sglang.srt.utils import add_prefix
from torch import Tensor, nn

from ghostvis_cli.model.config import SMEAR_CHANNELS
from ghostvis_cli.model.decoder import rms
from ghostvis_cli.sglang.plugin.limits import ALL, layer_windows, refuse, server_settings
from ghostvis_cli.sglang.plugin.models.text import Relu2MLP
from ghostvis_cli.sglang.plugin.neighbours import Neighbours
from ghostvis_cli.sglang.plugin.rotary import ExactRotary, numerics
from ghostvis_cli.sglang.plugin.weights import complete

PROJECTIONS = {"q_proj": "q", "k_proj": "k", "v_proj": "v"}  # parts of SGLang's one matrix


@dataclass(frozen=True)
class Tokens:
    """Of a step. `are_text` (T, 1) says which have a value embedding: images' rows have none; None: all have."""

    ids: Tensor
    positions: Tensor
    are_text: Tensor | None = None


class KeyHeads:
    """Which of the model's key heads are this rank's.

    With more ranks than heads several have the same. On a CPU SGLang gives such a model further heads instead, of
    zeros, and says so in its configuration.
    """

    def __init__(self, config: Any) -> None:
        ranks, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        self.total = total = config.num_key_value_heads
        self.count = max(1, total // ranks)
        self.first = rank * self.count if total >= ranks else rank * total // ranks
        self.head_dim = config.head_dim

    def rows(self, gate: Tensor) -> Tensor:
        """Of a gate (all heads, channels)."""
        gate = F.pad(gate, (0, 0, 0, self.total - gate.size(0)))
        return gate[self.first : self.first + self.count]

    def columns(self, table: Tensor) -> Tensor:
        """Of a table (V, all heads * h)."""
        table = F.pad(table, (0, self.total * self.head_dim - table.size(1)))
        return table[:, self.first * self.head_dim : (self.first + self.count) * self.head_dim]


class NanoChatAttention(nn.Module):
    def __init__(self, config: Any, layer: int, window: int, quant_config: Any, prefix: str) -> None:
        super().__init__()
        self.config = config
        self.heads = KeyHeads(config)
        ranks, h = get_tensor_model_parallel_world_size(), config.head_dim
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            h,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=False,
            quant_config=quant_config,
            prefix=add_prefix("qkv_proj", prefix),
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * h,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=add_prefix("o_proj", prefix),
        )
        self.sizes = [config.num_attention_heads // ranks * h, self.heads.count * h, self.heads.count * h]
        self.attn = RadixAttention(
            config.num_attention_heads // ranks,
            h,
            scaling=config.qk_scale**2 / h**0.5,
            num_kv_heads=self.heads.count,
            layer_id=layer,
            sliding_window_size=window,
            prefix=add_prefix("attn", prefix),
        )
        self.exact = numerics() == "exact"
        if self.exact:
            rounded = config.rotary_tables == "bfloat16"
            self.rotary_emb = ExactRotary(
                h, config.max_position_embeddings, config.rope_theta, rounded=rounded
            )
        else:
            self.rotary_emb = get_rope(
                h,
                rotary_dim=h,
                max_position=config.max_position_embeddings,
                base=config.rope_theta,
                is_neox_style=True,
            )
        if config.has_value_embedding(layer):
            self.gate = nn.Parameter(torch.empty(self.heads.count, config.gate_channels), requires_grad=False)
            table = torch.empty(config.vocab_size, self.heads.count * h)
            self.value_embed = nn.Parameter(table, requires_grad=False)

    def forward(self, x: Tensor, tokens: Tokens, batch: Any) -> Tensor:
        """x (T, D) -> (T, D); `batch` is SGLang's, and holds the cache."""
        qkv = self.qkv_proj(x)[0]
        qk, v = qkv.split([self.sizes[0] + self.sizes[1], self.sizes[2]], dim=-1)
        if hasattr(self, "gate"):
            v = self._opened(x, v, tokens)
        if not self.exact:  # rotation by an exact table keeps the norm, which can come first
            qk = rms(qk.unflatten(-1, (-1, self.config.head_dim))).flatten(-2)
        q, k = self.rotary_emb(tokens.positions, *qk.split(self.sizes[:2], dim=-1))
        return self.o_proj(self.attn(q, k, v, batch))[0]

    def _opened(self, x: Tensor, v: Tensor, tokens: Tokens) -> Tensor:
        """v (T, K*h) with the value embeddings added, one gate a key head."""
        gate = torch.sigmoid(F.linear(x[:, : self.config.gate_channels], self.gate))
        if tokens.are_text is not None:
            gate = gate * tokens.are_text
        v = v.unflatten(-1, (self.heads.count, -1))
        rows = F.embedding(tokens.ids, self.value_embed).view(v.shape)
        return torch.addcmul(v, gate[..., None], rows, value=self.config.gate_scale).flatten(-2)

    def load(self, name: str, tensor: Tensor) -> None:
        """gate.weight or value_embed.weight."""
        if name == "gate":
            self.gate.data.copy_(self.heads.rows(tensor))
        else:
            self.value_embed.data.copy_(self.heads.columns(tensor))


class NanoChatLayer(nn.Module):
    def __init__(self, config: Any, layer: int, window: int, quant_config: Any, prefix: str) -> None:
        super().__init__()
        self.self_attn = NanoChatAttention(
            config, layer, window, quant_config, add_prefix("self_attn", prefix)
        )
        self.mlp = Relu2MLP(config, quant_config, add_prefix("mlp", prefix), True)

    def forward(self, x: Tensor, tokens: Tokens, batch: Any) -> Tensor:
        """x (T, D) -> (T, D)."""
        x = x + self.self_attn(rms(x), tokens, batch)
        return x + self.mlp(rms(x))


class NanoChatModel(nn.Module):
    """`neighbours` holds ids, or with `images` rows: an image's row has no id to make it from again."""

    def __init__(self, config: Any, windows: list[int], quant_config: Any, prefix: str, images: bool) -> None:
        super().__init__()
        self.config, self.images = config, images
        layers = config.num_hidden_layers
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=add_prefix("embed_tokens", prefix)
        )
        self.layers = nn.ModuleList(
            NanoChatLayer(config, i, window, quant_config, add_prefix(f"layers.{i}", prefix))
            for i, window in enumerate(windows)
        )
        self.resid_lambdas, self.x0_lambdas = _scalars(layers), _scalars(layers)
        if config.smear:
            self.smear_gate = nn.Linear(SMEAR_CHANNELS, 1, bias=False)
            self.smear_lambda, self.backout_lambda = _scalars(1), _scalars(1)
            self.neighbours = Neighbours()

    def forward(
        self, ids: Tensor, positions: Tensor, batch: Any, input_embeds: Tensor | None = None
    ) -> Tensor:
        """ids (T,), below zero where an image's row stands -> normalised hidden rows (T, D)."""
        tokens = Tokens(ids, positions)
        if self.images:
            tokens = Tokens(ids.clamp(min=0), positions, (ids >= 0)[:, None])
        x = self.enter(tokens, batch, input_embeds)
        x0 = middle = x
        for i, layer in enumerate(self.layers):
            x = torch.addcmul(self.resid_lambdas[i] * x, self.x0_lambdas[i], x0)
            x = layer(x, tokens, batch)
            if i == self.config.num_hidden_layers // 2:
                middle = x
        if self.config.smear:
            x = x - self.backout_lambda[0] * middle
        return rms(x)

    def enter(self, tokens: Tokens, batch: Any, rows: Tensor | None) -> Tensor:
        """Normalised embeddings (T, D), each with the one before it taken in."""
        ids, positions = tokens.ids, tokens.positions
        e = rms(self.embed_tokens(ids) if rows is None else rows)
        if not self.config.smear:
            return e
        if self.images:
            before = self.neighbours.before(e, positions, batch)
        else:
            before = rms(self.embed_tokens(self.neighbours.before(ids, positions, batch)))
        gate = self.smear_lambda * torch.sigmoid(self.smear_gate(e[:, :SMEAR_CHANNELS]).float())
        gate = gate.masked_fill((positions == 0)[:, None], 0)
        return e + gate.to(e.dtype) * before


def _scalars(count: int) -> nn.Parameter:
    """Of the residual stream: float32 whatever the weights are."""
    return nn.Parameter(torch.empty(count, dtype=torch.float32), requires_grad=False)


class GhostVisNanoChatForCausalLM(nn.Module):
    packed_modules_mapping = {"qkv_proj": list(PROJECTIONS)}  # noqa: RUF012 - SGLang reads it from the class

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "", images: bool = False) -> None:
        super().__init__()
        self.config, self.quant_config = config, quant_config
        settings = server_settings()
        refuse(settings, smear=config.smear, images=images)
        context = settings.get("context_length") or config.max_position_embeddings
        windows = layer_windows(config.window_sizes, context, settings) or [ALL] * config.num_hidden_layers
        self.window = max(set(windows) - {ALL}, default=None)
        self.model = NanoChatModel(config, windows, quant_config, add_prefix("model", prefix), images)
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=quant_config,
            prefix=add_prefix("lm_head", prefix),
        )
        self.logits_processor = LogitsProcessor(config)

    def get_attention_sliding_window_size(self) -> int | None:
        """The one window of backends that plan with one."""
        return self.window

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        forward_batch: Any,
        input_embeds: Tensor | None = None,
        token_ids: Tensor | None = None,
        **_: Any,
    ) -> Any:
        """`token_ids` stand in for `input_ids` where those were made embeddings of."""
        ids = input_ids if token_ids is None else token_ids
        hidden = self.model(ids, positions, forward_batch, input_embeds)
        return self.logits_processor(input_ids, hidden, self.lm_head, forward_batch)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take (name, tensor) pairs of the directory. ValueError where one is unknown or missing."""
        parameters = dict(self.named_parameters())
        for name, tensor in complete(weights, self.expected()):
            *path, module, _ = name.split(".")
            if module in PROJECTIONS:
                parameter: Any = parameters[name.replace(module, "qkv_proj")]
                parameter.weight_loader(parameter, self._turned(module, tensor), PROJECTIONS[module])
            elif module in ("gate", "value_embed"):
                attention: Any = self.model.layers[int(path[2])].self_attn
                attention.load(module, tensor)
            else:
                parameter = parameters[name]
                getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor)

    def _turned(self, module: str, tensor: Tensor) -> Tensor:
        """The halves of each query and key head exchanged: rotation by -theta becomes the usual one by +theta."""
        if module == "v_proj":
            return tensor
        return tensor.unflatten(0, (-1, 2, self.config.head_dim // 2)).flip(1).flatten(0, 2)

    def expected(self) -> set[str]:
        """Every tensor that the directory must have."""
        config = self.config
        layer = (*(f"self_attn.{name}_proj" for name in "qkvo"), "mlp.fc1", "mlp.fc2")
        found = {"model.embed_tokens.weight", "lm_head.weight", "model.resid_lambdas", "model.x0_lambdas"}
        for i in range(config.num_hidden_layers):
            extra = ("self_attn.gate", "value_embed") if config.has_value_embedding(i) else ()
            found |= {f"model.layers.{i}.{name}.weight" for name in (*layer, *extra)}
        if config.smear:
            found |= {"model.smear_gate.weight", "model.smear_lambda", "model.backout_lambda"}
        return found


EntryClass = GhostVisNanoChatForCausalLM
