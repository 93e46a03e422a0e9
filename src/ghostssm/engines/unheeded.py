"""Entries of a config that engines do not heed. Where one matters, the engine answers wrongly, pruned or not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Unheeded:
    """Something in a family's config that an engine takes to have its usual value.

    Attributes:
        is_usual: whether it is, in a config of that model type.
        reason: what goes wrong where it is not.
    """

    model_type: str
    is_usual: Callable[[PreTrainedConfig], bool]
    reason: str


def _has_no_limits(config: PreTrainedConfig) -> bool:
    return getattr(config, "time_step_limit", None) is None or tuple(config.time_step_limit) == (0.0, inf)


def _has_no_biases(config: PreTrainedConfig) -> bool:
    names = ("use_bias", "mamba_proj_bias", "projectors_bias", "attention_bias", "mlp_bias")
    return not any(getattr(config, name, False) for name in names)


def _has_usual_rotation(config: PreTrainedConfig) -> bool:
    return bool((getattr(config, "rope_parameters", None) or {}).get("rope_type", "default") == "default")


def _is_silu(config: PreTrainedConfig) -> bool:
    return config.hidden_act in ("silu", "swish")


def _is_twice_as_wide(config: PreTrainedConfig) -> bool:
    return bool(config.mamba_n_heads * config.mamba_d_head == 2 * config.hidden_size)


_NO_LIMITS = "knows no limits on dt, so answers are silently wrong with them"

IN_VLLM_AND_SGLANG = (
    *(Unheeded(name, _has_no_limits, _NO_LIMITS) for name in ("mamba2", "falcon_h1", "granitemoehybrid")),
    Unheeded(
        "falcon_h1",
        lambda config: not (config.mamba_rms_norm and config.mamba_norm_before_gate),
        "normalises after the gate, so answers are silently wrong with mamba_norm_before_gate",
    ),
    Unheeded(
        "falcon_h1",
        lambda config: not (config.attention_bias or config.mlp_bias),
        "has no biases in attention and MLPs",
    ),
    Unheeded(
        "falcon_h1",
        lambda config: config.mamba_proj_bias == config.projectors_bias,
        "gives out_proj of a mixer a bias where in_proj has one, and only there",
    ),
)
IN_MLX_LM = (
    Unheeded(
        "mamba2",
        lambda config: config.layer_norm_epsilon == 1e-5,
        "takes the epsilon of the blocks' norms to be 1e-5, so answers are silently wrong with another",
    ),
    Unheeded(
        "falcon_h1",
        lambda config: config.key_multiplier == config.attention_in_multiplier == 1,
        "leaves out key_multiplier, and attention_in_multiplier for values, so answers are silently wrong unless "
        "both are 1, pruned or not",
    ),
    Unheeded(
        "falcon_h1",
        lambda config: (
            not (config.mamba_proj_bias or config.projectors_bias or config.attention_bias or config.mlp_bias)
        ),
        "multiplies weights and not their biases, so answers are silently wrong with biases",
    ),
    Unheeded(
        "falcon_h1",
        lambda config: not config.mamba_rms_norm or config.mamba_n_groups == 1,
        "normalises over all groups of a mixer together, so answers are silently wrong with several",
    ),
    Unheeded("falcon_h1", _has_no_limits, _NO_LIMITS),
)

_HYBRIDS_IN_GGUF = ("bamba", "falcon_h1", "granitemoehybrid", "nemotron_h")
IN_GGUF = (
    *(Unheeded(name, _has_no_limits, _NO_LIMITS) for name in ("mamba2", *_HYBRIDS_IN_GGUF)),
    *(
        Unheeded(name, _has_no_biases, "has no biases in in_proj, out_proj, attention and MLPs")
        for name in ("mamba2", *_HYBRIDS_IN_GGUF)
    ),
    *(
        Unheeded(name, _has_usual_rotation, "knows the default rotary embedding only, no other rope_type")
        for name in _HYBRIDS_IN_GGUF
    ),
    *(
        Unheeded(name, _is_silu, "takes the activation of MLPs to be SiLU, whatever hidden_act says")
        for name in ("bamba", "falcon_h1", "granitemoehybrid")
    ),
    *(
        Unheeded(name, _is_twice_as_wide, "takes the mixers to be twice as wide as the hidden size")
        for name in ("bamba", "granitemoehybrid")
    ),
    Unheeded(
        "falcon_h1",
        lambda config: not (config.mamba_rms_norm and config.mamba_norm_before_gate),
        "normalises after the gate, and not before it as mamba_norm_before_gate says",
    ),
    Unheeded(
        "nemotron_h",
        lambda config: not {"mlp", "moe"} <= set(config.layers_block_type),
        "has layers with experts or plain MLPs, not both in one model",
    ),
    Unheeded(
        "nemotron_h",
        lambda config: config.mlp_hidden_act == "relu2",
        "takes the activation of MLPs to be relu2, whatever mlp_hidden_act says",
    ),
)


def unheeded_in(config: PreTrainedConfig, entries: Iterable[Unheeded]) -> list[str]:
    """Why an engine that does not heed these entries would answer wrongly with a config."""
    ours = (entry for entry in entries if entry.model_type == config.model_type)
    return [entry.reason for entry in ours if not entry.is_usual(config)]
