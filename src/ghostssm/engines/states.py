"""What engines offer for the dtype of the recurrent state: data with their sources, and the flags that follow.

A dtype here is the name of a `ghostssm.ops.state_format.StateFormat`. Arithmetic is float32 in all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class StateDtypes:
    """How an engine stores the state between two tokens.

    Attributes:
        offered: dtypes that the version read can store.
        untold: the dtype if neither flag nor config names one. untold_for: the same by model type, where it differs.
        flag: of its server, before the dtype; empty where there is none.
        rounding: flags for stochastic rounding, by dtype; it rounds to nearest without.
        key: in config.json, read where no flag is given. key_for: the model types for which it is read.
        open: dtypes in pull requests that are not merged, and their numbers.
        source: where this is from.
    """

    offered: tuple[str, ...]
    untold: str
    source: str
    untold_for: Mapping[str, str] = field(default_factory=dict)
    flag: str = ""
    rounding: Mapping[str, str] = field(default_factory=dict)
    key: str = ""
    key_for: frozenset[str] = frozenset()
    open: Mapping[str, str] = field(default_factory=dict)

    def config_key(self, model_type: str) -> str:
        """The key of config.json that says the dtype of a model type's states; empty if none is read."""
        return self.key if model_type in self.key_for else ""

    def unless_told(self, config: PreTrainedConfig) -> str:
        """The dtype of a model's states without flags."""
        said = getattr(config, self.config_key(config.model_type), None) if self.key else None
        return str(said or self.untold_for.get(config.model_type, self.untold))

    def flags(self, dtype: str, config: PreTrainedConfig, *, stochastic: bool = False) -> str | None:
        """Options to serve a model with states of a dtype; empty if none are needed, None if it cannot."""
        if dtype not in self.offered or (stochastic and dtype not in self.rounding):
            return None
        if stochastic:
            return f"{self.flag} {dtype} {self.rounding[dtype]}"
        return f"{self.flag} {dtype}" if self.flag and dtype != self.unless_told(config) else ""

    def as_json(self, config: PreTrainedConfig) -> dict[str, object]:
        """For a model."""
        return {
            "untold": self.unless_told(config),
            "flags": {dtype: self.flags(dtype, config) for dtype in self.offered},
            "stochastic": {dtype: self.flags(dtype, config, stochastic=True) for dtype in self.rounding},
            "config_key": self.config_key(config.model_type),
            "open": dict(self.open),
        }


_STOCHASTIC = {"float16": "--enable-mamba-cache-stochastic-rounding"}  # the same in both; on CUDA only

FLOAT32_ONLY = StateDtypes(("float32",), "float32", "run with bfloat16 weights: transformers 5.23 and mlx-lm 0.32.2")
IN_LLAMA_CPP = StateDtypes(("float32",), "float32", "llama-model.cpp: the recurrent memory's types are GGML_TYPE_F32")
IN_MAMBA_SSM = StateDtypes(
    ("float32", "bfloat16", "float16"),
    "bfloat16",
    "mamba_ssm 2.3.2, modules/mamba2.py, _get_states_from_cache: the dtype of in_proj's weight, here taken as bfloat16",
)
IN_VLLM = StateDtypes(
    ("float32", "bfloat16", "float16"),
    "bfloat16",
    "vLLM 0.33.0: config/cache.py (MambaDType), mamba_utils.py (_mamba_state_dtype: auto is the model's dtype, here "
    "taken as bfloat16), models/config.py (NemotronHForCausalLMConfig), config/vllm.py (rounding)",
    untold_for={"nemotron_h": "float32"},
    flag="--mamba-ssm-cache-dtype",
    rounding=_STOCHASTIC,
    key="mamba_ssm_cache_dtype",
    key_for=frozenset({"nemotron_h"}),
    open={"int8": "#40012, #52962", "fp8": "#40012, #52962"},
)
IN_SGLANG = StateDtypes(
    ("float32", "bfloat16", "float16"),
    "float32",
    "SGLang 0.5.23: srt/configs/mamba_utils.py (mamba2_state_dtype) and where the families' configs call it, "
    "srt/arg_groups/fields/exec_.py, srt/arg_groups/mamba_hook.py",
    flag="--mamba-ssm-dtype",
    rounding=_STOCHASTIC,
    key="mamba_ssm_dtype",
    key_for=frozenset({"nemotron_h", "falcon_h1"}),
    open={"fp8": "#40706"},
)
