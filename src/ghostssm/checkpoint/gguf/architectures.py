"""How the models of each family appear in GGUF: llama.cpp's name of the architecture, its keys, and its tensors.

The facts are those of llama.cpp's ``src/models/*.cpp`` (what is read and computed) and of the converter in its
``conversion/`` folder, version of July 2026. One entry of ``ARCHITECTURES`` is one family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ghostssm.engines.unheeded import IN_GGUF, unheeded_in
from ghostssm.errors import ModelError
from ghostssm.models.families import layout_of

_NO_LIMIT = 2**20
"""Context length of a model whose positions are not limited; llama.cpp wants some number."""

TensorMap = Callable[[Any, str, Tensor], Iterator[tuple[str, Tensor]]]


def _unless_tied(config: Any, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """All but a head that is the embeddings."""
    if name != "output.weight" or not config.tie_word_embeddings:
        yield name, tensor


@dataclass(frozen=True)
class Architecture:
    """One family in GGUF.

    Attributes:
        name: of llama.cpp's architecture.
        write_keys: writes the keys beside those of the mixers into a ``gguf.GGUFWriter``.
        prefix: of transformers' tensor names, and what the ``gguf`` package's table of names has in its place.
        names: of a block's tensors that this table lacks, to names in GGUF.
        tensors: turns a config, a GGUF name and a tensor into the tensors to write.
    """

    name: str
    write_keys: Callable[[Any, Any], None]
    prefix: tuple[str, str] = ("", "")
    names: Mapping[str, str] = field(default_factory=dict)
    tensors: TensorMap = _unless_tied


def architecture_of(config: Any) -> Architecture:
    """The architecture of a transformers config.

    Raises:
        ModelError: llama.cpp has none, or computes something else than this config asks for.
    """
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise ModelError(
            f"The model type is {config.model_type!r}, which can't be written as GGUF; "
            f"expected one of: {', '.join(sorted(ARCHITECTURES))}."
        )
    if "moe" in (getattr(config, "layers_block_type", None) or ()):
        architecture = _NEMOTRON_MOE
    if faults := unheeded_in(config, IN_GGUF):
        raise ModelError(f"llama.cpp would compute another model ({architecture.name}): it {'; it '.join(faults)}.")
    return architecture


def _mamba2_keys(writer: Any, config: Any) -> None:
    writer.add_context_length(_NO_LIMIT)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(0)  # llama.cpp reads these two of every model
    writer.add_head_count(0)
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rotary_dim(config: Any) -> int:
    """How many of a head's channels the rotary embedding turns."""
    return int(_head_dim(config) * (config.rope_parameters or {}).get("partial_rotary_factor", 1.0))


def _transformer_keys(writer: Any, config: Any, context_length: int, epsilon: float) -> None:
    writer.add_context_length(context_length)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_layer_norm_rms_eps(epsilon)


def _rope_keys(writer: Any, config: Any) -> None:
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(_rotary_dim(config))


def _per_layer(config: Any, kind: str, value: int) -> list[int]:
    """``value`` in layers of a kind and 0 in the others: llama.cpp tells layers apart by these."""
    return [value if block == kind else 0 for block in config.layers_block_type]


def _falcon_h1_keys(writer: Any, config: Any) -> None:
    _transformer_keys(writer, config, config.max_position_embeddings, config.rms_norm_eps)
    _rope_keys(writer, config)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_feed_forward_length(config.intermediate_size)


def _falcon_h1_tensors(config: Any, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """With Falcon-H1's multipliers, for which llama.cpp has no keys, in the weights."""
    same_head = config.tie_word_embeddings and config.lm_head_multiplier == config.embedding_multiplier
    if name == "output.weight" and same_head:
        return
    attention_in, (gate, down) = config.attention_in_multiplier, config.mlp_multipliers
    factors = {
        "token_embd.weight": config.embedding_multiplier,
        "output.weight": config.lm_head_multiplier,
        "attn_q.weight": attention_in,
        "attn_k.weight": attention_in * config.key_multiplier,
        "attn_v.weight": attention_in,
        "attn_output.weight": config.attention_out_multiplier,
        "ffn_gate.weight": gate,
        "ffn_down.weight": down,
        "ssm_out.weight": config.ssm_out_multiplier,
        "ssm_in.weight": config.ssm_in_multiplier,
    }
    part = name.split(".", 2)[2] if name.startswith("blk.") else name
    factor = factors.get(part, 1.0)
    if part == "ssm_in.weight":
        layout = layout_of(config)
        widths = [layout.intermediate_size] * 2 + [layout.group_width] * 2 + [layout.num_heads]
        rows = torch.tensor(config.ssm_multipliers).repeat_interleave(torch.tensor(widths))
        tensor = tensor.float() * rows[:, None].to(tensor.device)
    yield name, tensor if factor == 1 else tensor.float() * factor


def _granite_keys(writer: Any, config: Any) -> None:
    rope = _granite_has_rope(config)
    _transformer_keys(writer, config, config.max_position_embeddings if rope else _NO_LIMIT, config.rms_norm_eps)
    writer.add_rope_scaling_finetuned(rope)  # the key that switches it on in this architecture
    if rope:
        _rope_keys(writer, config)
    writer.add_head_count_kv(_per_layer(config, "full_attention", config.num_key_value_heads))
    if config.model_type == "bamba":
        writer.add_feed_forward_length(config.intermediate_size)
        return
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)
    if config.num_local_experts:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_shared_feed_forward_length(config.shared_intermediate_size)
    else:
        writer.add_feed_forward_length(config.shared_intermediate_size)


def _granite_has_rope(config: Any) -> bool:
    return bool(config.model_type == "bamba" or config.position_embedding_type == "rope")


def _granite_tensors(config: Any, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Fused gate and up matrices apart, and query and key rows in the order of llama.cpp's rotary embedding."""
    if name == "output.weight" and config.tie_word_embeddings:
        return
    if name.endswith(("attn_q.weight", "attn_k.weight")) and _granite_has_rope(config):
        yield name, _interleaved(tensor, _head_dim(config), _rotary_dim(config))
    elif name.endswith("ffn_gate_up_exps.weight"):
        for part, half in zip(("gate", "up"), tensor.chunk(2, dim=1), strict=True):
            yield name.replace("gate_up", part), half
    elif name.endswith("ffn_gate_up_shexp.weight"):
        end = "_shexp" if config.num_local_experts else ""
        for part, half in zip(("gate", "up"), tensor.chunk(2, dim=0), strict=True):
            yield name.replace("gate_up_shexp", part + end), half
    elif name.endswith("ffn_down_shexp.weight") and not config.num_local_experts:
        yield name.replace("_shexp", ""), tensor
    else:
        yield name, tensor


def _interleaved(tensor: Tensor, head_dim: int, rotary_dim: int) -> Tensor:
    """Rows (heads * head_dim) whose turned channels i and i + rotary_dim / 2 of a head become 2i and 2i + 1."""
    heads = tensor.unflatten(0, (-1, head_dim))
    turned, rest = heads.split([rotary_dim, head_dim - rotary_dim], dim=1)
    turned = turned.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    return torch.cat([turned, rest], dim=1).flatten(0, 1)


def _nemotron_h_keys(writer: Any, config: Any) -> None:
    _transformer_keys(writer, config, config.max_position_embeddings, config.layer_norm_epsilon)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_head_count_kv(_per_layer(config, "full_attention", config.num_key_value_heads))
    writer.add_feed_forward_length(_per_layer(config, "mlp", config.intermediate_size))


def _nemotron_h_moe_keys(writer: Any, config: Any) -> None:
    _transformer_keys(writer, config, config.max_position_embeddings, config.layer_norm_epsilon)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_head_count_kv(_per_layer(config, "full_attention", config.num_key_value_heads))
    writer.add_feed_forward_length(_per_layer(config, "moe", config.moe_intermediate_size))
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_feed_forward_length(config.moe_shared_expert_intermediate_size)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    if config.topk_group < config.n_group:
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)
    if config.moe_latent_size is not None:
        writer.add_moe_latent_size(config.moe_latent_size)


_GRANITE = Architecture(
    "granitehybrid",
    _granite_keys,
    names={
        "block_sparse_moe.router.weight": "ffn_gate_inp.weight",
        "block_sparse_moe.experts.gate_up_proj": "ffn_gate_up_exps.weight",
        "block_sparse_moe.experts.down_proj": "ffn_down_exps.weight",
        "shared_mlp.input_linear.weight": "ffn_gate_up_shexp.weight",
    },
    tensors=_granite_tensors,
)
_NEMOTRON = Architecture("nemotron_h", _nemotron_h_keys, prefix=("model.", "backbone."))
_NEMOTRON_MOE = replace(
    _NEMOTRON,
    name="nemotron_h_moe",
    write_keys=_nemotron_h_moe_keys,
    names={
        "mixer.gate.e_score_correction_bias": "exp_probs_b.bias",
        "mixer.experts.up_proj": "ffn_up_exps.weight",
        "mixer.experts.down_proj": "ffn_down_exps.weight",
    },
)
ARCHITECTURES: dict[str, Architecture] = {
    "mamba2": Architecture("mamba2", _mamba2_keys),
    "falcon_h1": Architecture("falcon-h1", _falcon_h1_keys, tensors=_falcon_h1_tensors),
    "bamba": _GRANITE,
    "granitemoehybrid": _GRANITE,
    "nemotron_h": _NEMOTRON,
}
