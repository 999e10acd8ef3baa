"""Decoders: SGLang's Qwen3, which a converted GhostVis decoder is, and what makes one of a NanoChat directory.

T tokens of a step, D width.
"""

from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from sglang.srt.layers.linear import ColumnParallelLinear, RowParallelLinear
from sglang.srt.models.qwen3 import Qwen3ForCausalLM
from sglang.srt.utils import add_prefix
from torch import Tensor, nn

from ghostvis_cli.model.decoder import rms
from ghostvis_cli.sglang.plugin.rotary import ExactRotary, numerics
from ghostvis_cli.sglang.plugin.weights import complete


class GhostVisForCausalLM(Qwen3ForCausalLM):
    """A converted swiglu decoder, with training's own rounding where `numerics` asks for it.

    Directories say Qwen3ForCausalLM, which serves them without us; `ghostvis serve` overrides that.
    """

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__(config, quant_config=quant_config, prefix=prefix)
        if numerics() == "exact":
            theta = config.rope_parameters["rope_theta"]
            rotary = ExactRotary(config.head_dim, config.max_position_embeddings, theta)
            for layer in self.model.layers:
                layer.self_attn.rotary_emb = rotary
                layer.self_attn.use_fused_qk_norm_rope = False  # AMD's, which would pass the module by

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take (name, tensor) pairs of the directory. ValueError where one is unknown or missing."""
        super().load_weights(complete(weights, self.expected()))

    def expected(self) -> set[str]:
        """Every tensor that the directory must have; SGLang would leave what is missing as it was allocated."""
        attention = ("q_proj", "k_proj", "v_proj", "o_proj")
        kinds = ("weight", "bias") if self.config.attention_bias else ("weight",)
        layer = {f"self_attn.{name}.{kind}" for name in attention for kind in kinds} | self.layer_tensors()
        layers = range(self.config.num_hidden_layers)
        return {f"model.layers.{i}.{name}" for i in layers for name in layer} | self.outer_tensors()

    def layer_tensors(self) -> set[str]:
        norms = ("self_attn.q_norm", "self_attn.k_norm", "input_layernorm", "post_attention_layernorm")
        return {f"{name}.weight" for name in (*norms, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")}

    def outer_tensors(self) -> set[str]:
        return {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


class Relu2MLP(nn.Module):
    """relu(x)² between two matrices, (T, D) -> (T, D), its sum over the ranks left to the layer."""

    def __init__(self, config: Any, quant_config: Any, prefix: str, reduce_results: bool) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.fc1 = ColumnParallelLinear(
            width, inner, bias=False, quant_config=quant_config, prefix=add_prefix("fc1", prefix)
        )
        self.fc2 = RowParallelLinear(
            inner,
            width,
            bias=False,
            quant_config=quant_config,
            reduce_results=reduce_results,
            prefix=add_prefix("fc2", prefix),
        )

    def forward(self, x: Tensor, forward_batch: Any = None, **_: Any) -> Tensor:
        """x (T, D) -> (T, D)."""
        return self.fc2(F.relu(self.fc1(x)[0]).square())[0]


class NanoChatForCausalLM(GhostVisForCausalLM):
    """A NanoChat directory as a Qwen3: what conversion does to swiglu checkpoints is done on loading."""

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        activation, config.hidden_act = config.hidden_act, "silu"  # the only one that Qwen3's MLP takes
        super().__init__(config, quant_config=quant_config, prefix=prefix)
        config.hidden_act = activation
        for i, layer in enumerate(self.model.layers):
            reduce_results = layer.mlp.down_proj.reduce_results  # which module adds up depends on the release
            place = add_prefix(f"model.layers.{i}.mlp", prefix)
            layer.mlp = Relu2MLP(config, quant_config, place, reduce_results)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take (name, tensor) pairs of a NanoChat directory, renamed as Qwen3 calls them."""
        super().load_weights(map(self._reparametrised, weights))

    def _reparametrised(self, named: tuple[str, Tensor]) -> tuple[str, Tensor]:
        name, tensor = named
        if name == "model.embed_tokens.weight":
            tensor = rms(tensor.float()).to(tensor.dtype)
        elif ".q_proj." in name or ".k_proj." in name:
            heads = tensor.unflatten(0, (-1, 2, self.config.head_dim // 2))
            tensor = heads.flip(1).flatten(0, 2)
        return name, tensor

    def layer_tensors(self) -> set[str]:
        return {"mlp.fc1.weight", "mlp.fc2.weight"}

    def outer_tensors(self) -> set[str]:
        return {"model.embed_tokens.weight", "lm_head.weight"}


EntryClass = [GhostVisForCausalLM, NanoChatForCausalLM]


def decoder_class(model_type: str) -> type[GhostVisForCausalLM]:
    return NanoChatForCausalLM if model_type == "nanochat" else GhostVisForCausalLM
