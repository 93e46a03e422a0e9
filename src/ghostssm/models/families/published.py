"""config.json in the form that published checkpoints have, which every engine reads.

transformers brings a config into its newest form when it loads one: it renames kinds of layers, moves the rotary base
into a table and works out what it does not want to be told. Other engines read config.json themselves and know the form
in which models were published; transformers reads that one too, and gets the same config.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedConfig

Values = dict[str, Any]
OwnKeys = Callable[[PreTrainedConfig], Mapping[str, Any]]
"""What a family's config.json has in another form than transformers writes; `ABSENT` for a key that is not there."""

ABSENT = object()

_LAYER_LISTS = ("layer_types", "layers_block_type", "mtp_layers_block_type")
_LAYER_KINDS = {"linear_attention": "mamba", "full_attention": "attention"}
_EXPERTS = (
    *("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "routed_scaling_factor", "norm_topk_prob"),
    *("moe_intermediate_size", "moe_shared_expert_intermediate_size", "moe_shared_expert_overlap", "moe_latent_size"),
    *("n_group", "topk_group"),
)


def published_form(config: PreTrainedConfig, written: Mapping[str, Any], own_keys: OwnKeys) -> Values:
    """What transformers would write of a config, brought into the published form.

    Args:
        written: every value, as `to_json_string` has it. own_keys: of the config's family.
    """
    values = {**written, **rotary_keys(written), **own_keys(config)}
    for key in _LAYER_LISTS:
        if isinstance(values.get(key), list):
            values[key] = [_LAYER_KINDS.get(kind, kind) for kind in values[key]]
    return {key: value for key, value in values.items() if value is not ABSENT}


def rotary_keys(written: Mapping[str, Any]) -> Values:
    """The base, and any scaling, as keys of their own: without them engines take defaults of theirs."""
    table = written.get("rope_parameters")
    if not isinstance(table, dict) or "rope_theta" not in table:
        return {}
    scaled = table.get("rope_type", "default") != "default"
    return {"rope_theta": table["rope_theta"], "rope_scaling": table if scaled else None}


def of_mamba2(config: PreTrainedConfig) -> Values:
    """SGLang and mlx-lm read these."""
    return {"intermediate_size": config.num_heads * config.head_dim, "rms_norm": True}


def of_bamba(config: PreTrainedConfig) -> Values:
    """llama.cpp's converter takes all of a head for rotary where it is not told."""
    head_dim = config.hidden_size // config.num_attention_heads
    return {"attn_rotary_emb": int(head_dim * config.rope_parameters["partial_rotary_factor"])}


def of_falcon_h1(config: PreTrainedConfig) -> Values:
    """Read by all engines; mlx-lm takes 64 where it is missing."""
    return {"head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads}


def of_granitemoehybrid(config: PreTrainedConfig) -> Values:
    """mlx-lm takes whatever is not "nope" for rotary, and both names for the MLP's width where there are no experts."""
    values: Values = {"position_embedding_type": config.position_embedding_type or "nope"}
    if not config.num_local_experts:
        values["intermediate_size"] = config.shared_intermediate_size
    return values


def of_nemotron_h(config: PreTrainedConfig) -> Values:
    """Derived values that older readers need, and other names: SGLang's of the groups, mlx-lm's of the mixer's biases.

    llama.cpp's converter takes a model for one with experts if a key of theirs is there.
    """
    values: Values = {
        "num_hidden_layers": config.num_hidden_layers,
        "hybrid_override_pattern": config.hybrid_override_pattern,
        "mamba_n_groups": config.n_groups,
        "mamba_proj_bias": config.use_bias,
    }
    if "moe" not in config.layers_block_type and not config.num_nextn_predict_layers:
        values |= dict.fromkeys(_EXPERTS, ABSENT)
    return values
