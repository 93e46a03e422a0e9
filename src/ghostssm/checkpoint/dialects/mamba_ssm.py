"""The mamba_ssm dialect: its config.json and tensor names, to transformers' and back.

Published state-spaces checkpoints are in this dialect. The rules are those of mamba_ssm 2.3's ``MambaConfig`` (which
rejects unknown keys), ``MambaLMHeadModel`` and ``Mamba2``. Keys that transformers and the hub write into any config may
stand beside its own; they say nothing of the sizes here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Mamba2Config

from ghostssm.checkpoint.config_checks import checked_config
from ghostssm.checkpoint.dialects.base import Dialect
from ghostssm.checkpoint.weights import stored_tensors
from ghostssm.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG_KEYS = frozenset(
    {
        *("d_model", "d_intermediate", "n_layer", "vocab_size", "ssm_cfg", "attn_layer_idx", "attn_cfg", "rms_norm"),
        *("residual_in_fp32", "fused_add_norm", "pad_vocab_size_multiple", "tie_embeddings"),
    }
)
_SSM: dict[str, tuple[str, Any]] = {
    "d_state": ("state_size", 128),
    "d_conv": ("conv_kernel", 4),
    "expand": ("expand", 2),
    "headdim": ("head_dim", 64),
    "ngroups": ("n_groups", 1),
    "dt_limit": ("time_step_limit", (0.0, math.inf)),
    "bias": ("use_bias", False),
    "conv_bias": ("use_conv_bias", True),
    "chunk_size": ("chunk_size", 256),
}
"""A key of ssm_cfg to transformers' key for the same, and the value that mamba_ssm takes where there is none."""
_SIZES = ("d_model", "n_layer", "vocab_size", "pad_vocab_size_multiple")
_SSM_SIZES = tuple(key for key, (_, default) in _SSM.items() if type(default) is int)
# Variants of the mixer that transformers' Mamba-2 does not have, with the value that means "not used".
_SSM_FIXED: dict[str, Any] = {"d_ssm": None, "D_has_hdim": False, "rmsnorm": True, "norm_before_gate": False}
# How new weights are drawn or how the kernel is called: of no account for a trained model.
_SSM_IGNORED = frozenset(
    {
        *("layer", "conv_init", "A_init_range", "dt_min", "dt_max", "dt_init_floor"),
        *("use_mem_eff_path", "process_group", "sequence_parallel"),
    }
)
# What is the same in every Mamba-2 model of transformers is said by its class.
_TRANSLATED_KEYS: Mapping[str, str] = {
    "d_model": "hidden_size",
    "n_layer": "num_hidden_layers",
    "pad_vocab_size_multiple": "vocab_size",
    "tie_embeddings": "tie_word_embeddings",
    **{f"ssm_cfg.{key}": ours for key, (ours, _) in _SSM.items()},
    **dict.fromkeys(("d_intermediate", "attn_layer_idx", "attn_cfg", "rms_norm"), "model_type"),
    **{f"ssm_cfg.{key}": "model_type" for key in ("layer", *_SSM_FIXED)},
}
# Sizes that follow from others, and defaults.
_IMPLIED_KEYS = frozenset({"num_heads", "intermediate_size", "time_step_limit", "hidden_act", "layer_types"})
# Keys of the hub that transformers' own configs have under other names, or not at all.
_HUB_KEYS = frozenset({"torch_dtype", "tie_word_embeddings", "model_type", "_name_or_path"})
_EMBEDDING_OURS, _EMBEDDING_THEIRS = "backbone.embeddings.weight", "backbone.embedding.weight"
# What the published state-spaces checkpoints were trained with.
_GPT_NEOX_TOKENIZER = "EleutherAI/gpt-neox-20b"
_GPT_NEOX_TOKENS = 50277


class MambaSsm(Dialect):
    """mamba_ssm loads Mamba-2 models only, from one file that holds the head even if it is tied."""

    name, library = "mamba_ssm", "mamba-ssm"
    holds_hybrids = holds_own_class = ties_heads = has_shards = keeps_unread = False
    translated_keys, implied_keys = _TRANSLATED_KEYS, _IMPLIED_KEYS

    def recognises(self, config: Mapping[str, Any], folder: Path) -> bool:
        """Of a config with the sizes of both dialects, by what the weights are called."""
        if "ssm_cfg" not in config:
            return False
        if "hidden_size" not in config or "model_type" not in config:
            return True
        if "d_model" not in config:
            return False
        try:
            return any(self.to_transformers_name(name) != name for name in stored_tensors(folder))
        except ModelError:  # no weights, or broken ones: told when they are wanted
            return False

    def to_transformers(self, config: dict[str, Any], where: str) -> dict[str, Any]:
        config = checked_config(config, where)
        _check(config)
        sizes = {ours: config["ssm_cfg"].get(key, default) for key, (ours, default) in _SSM.items()}
        multiple = config.get("pad_vocab_size_multiple", 8)
        return sizes | {
            "model_type": Mamba2Config.model_type,
            "architectures": ["Mamba2ForCausalLM"],
            "hidden_size": config["d_model"],
            "num_hidden_layers": config["n_layer"],
            "vocab_size": -(-config["vocab_size"] // multiple) * multiple,
            "num_heads": sizes["expand"] * config["d_model"] // sizes["head_dim"],
            "residual_in_fp32": config.get("residual_in_fp32", True),
            "tie_word_embeddings": config.get("tie_embeddings", config.get("tie_word_embeddings", True)),
            "bos_token_id": config.get("bos_token_id", 0),
            "eos_token_id": config.get("eos_token_id", 0),
            "pad_token_id": config.get("pad_token_id", 0),
        }

    def from_transformers(
        self, model: PreTrainedModel, base: Mapping[str, Any] | None, carried: bool
    ) -> dict[str, Any]:
        if base is None:
            return _from_transformers(model.config)
        own = {key: value for key, value in base.items() if key in CONFIG_KEYS}
        untied = {} if model.config.tie_word_embeddings else {"tie_embeddings": False}
        return own | {"ssm_cfg": own["ssm_cfg"] | {"d_state": model.config.state_size}} | untied

    def to_transformers_name(self, name: str) -> str:
        return _EMBEDDING_OURS if f"backbone.{name.removeprefix('backbone.')}" == _EMBEDDING_THEIRS else name

    def write_weights(self, model: PreTrainedModel, folder: Path) -> None:
        tensors = model.state_dict()
        renamed = {_EMBEDDING_THEIRS if name == _EMBEDDING_OURS else name: value for name, value in tensors.items()}
        renamed.setdefault("lm_head.weight", renamed[_EMBEDDING_THEIRS])  # it loads strictly, tied heads too
        torch.save(renamed, folder / "pytorch_model.bin")

    def how_to_load(self, own_class: bool) -> str:
        return (
            "```python\n"
            "from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel\n\n"
            'model = MambaLMHeadModel.from_pretrained("PATH")\n```'
        )

    def default_tokenizer(self, vocab_size: int) -> str | None:
        return _GPT_NEOX_TOKENIZER if 0 <= vocab_size - _GPT_NEOX_TOKENS < 64 else None


def _check(config: Mapping[str, Any]) -> None:
    """Raise ModelError for a Mamba-1 or Mamba-3 model, or a variant that transformers' Mamba-2 cannot express."""
    ssm = config["ssm_cfg"]
    if not isinstance(ssm, Mapping):
        raise ModelError(f"ssm_cfg in config.json is {ssm!r}; expected an object.")
    layer = ssm.get("layer", "Mamba1")
    if layer != "Mamba2":
        raise ModelError(f"The config describes a {layer} model (ssm_cfg.layer); ghostssm prunes Mamba2 only.")
    known = CONFIG_KEYS | _HUB_KEYS | Mamba2Config().to_dict().keys()
    faults = [f"{key} is not a known key" for key in config if key not in known]
    faults += [f"{key} is missing" for key in ("d_model", "n_layer", "vocab_size") if key not in config]
    if config.get("attn_layer_idx"):
        faults.append("attn_layer_idx names attention layers")
    if config.get("d_intermediate"):
        faults.append("d_intermediate asks for MLP layers")
    if not config.get("rms_norm", True):
        faults.append("rms_norm is false")
    for key, value in ssm.items():
        if key in _SSM_FIXED and value != _SSM_FIXED[key]:
            faults.append(f"ssm_cfg.{key} is {value!r}, expected {_SSM_FIXED[key]!r}")
        elif key not in _SSM_FIXED and key not in _SSM and key not in _SSM_IGNORED:
            faults.append(f"ssm_cfg.{key} is not a known key")
    counts = {key: config[key] for key in _SIZES if key in config}
    counts |= {f"ssm_cfg.{key}": ssm[key] for key in _SSM_SIZES if key in ssm}
    faults += [
        f"{key} is {value!r}, expected a positive integer"
        for key, value in counts.items()
        if isinstance(value, bool) or not isinstance(value, int) or value < 1
    ]
    if faults:
        raise ModelError("This mamba_ssm config can't be read as a Mamba-2 model: " + "; ".join(faults) + ".")


def _from_transformers(config: Mamba2Config) -> dict[str, Any]:
    """The config.json that makes mamba_ssm build the same model."""
    ssm = {key: getattr(config, ours) for key, (ours, _) in _SSM.items()}
    limit = tuple(ssm.pop("dt_limit"))
    if limit != _SSM["dt_limit"][1]:  # the default is left out: strict JSON has no infinity
        ssm["dt_limit"] = list(limit)
    return {
        "d_model": config.hidden_size,
        "d_intermediate": 0,
        "n_layer": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "ssm_cfg": {"layer": "Mamba2", **ssm},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": config.residual_in_fp32,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": config.tie_word_embeddings,
    }
