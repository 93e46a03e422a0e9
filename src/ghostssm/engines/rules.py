"""What each inference engine accepts as a state size: one table, with its sources.

An engine is described by rules over a mixer's layout after the cut. A rule that is broken means that the model runs
slowly there, because an operation leaves the accelerator or the vector units, or that it does not run at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ghostssm.engines.capacity import Admission, Footprint, by_sum, in_llama_cpp, in_sglang, in_vllm
from ghostssm.engines.states import FLOAT32_ONLY, IN_LLAMA_CPP, IN_MAMBA_SSM, IN_SGLANG, IN_VLLM, StateDtypes
from ghostssm.engines.unheeded import IN_GGUF, IN_MLX_LM, IN_VLLM_AND_SGLANG, Unheeded, unheeded_in
from ghostssm.errors import unknown_name
from ghostssm.models.layout import SSDLayout

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Level = Literal["runs", "slow", "no"]
"""How well an engine runs a model, best first."""
_LEVELS: tuple[Level, ...] = ("runs", "slow", "no")


@dataclass(frozen=True)
class Rule:
    """A condition on a mixer.

    Attributes:
        holds: whether a layout, of a model of some ``model_type``, meets it.
        otherwise: what it means where it does not hold; "runs" only makes a remark.
        text: the condition in words.
        reason: why, where it does not hold; a format string with ``layout``, and ``lanes``, the power of two that N'
            fits in.
    """

    holds: Callable[[SSDLayout, str], bool]
    otherwise: Level
    text: str
    reason: str


@dataclass(frozen=True)
class Engine:
    """One engine, on one kind of hardware where that matters.

    Attributes:
        name: as ``--engine`` takes it.
        version: the version whose source was read.
        rules: what a mixer has to meet.
        model_types: transformers model types that it has a class for; None for all.
        dialect: whose config.json and tensor names it reads; None for llama.cpp, which reads neither.
        cannot_tie: model types whose head it does not tie to the embeddings.
        unheeded: what of a config it does not heed.
        own_class: what becomes of models whose state is projected or differs between layers.
        states: the dtypes that it stores states in. admits: what it takes at once of a footprint, in so many bytes.
        source: where the rules come from.
    """

    name: str
    version: str
    rules: tuple[Rule, ...]
    model_types: frozenset[str] | None
    source: str
    own_class: Level = "no"
    dialect: Literal["transformers", "mamba_ssm"] | None = "transformers"
    cannot_tie: frozenset[str] = frozenset()
    unheeded: tuple[Unheeded, ...] = ()
    states: StateDtypes = FLOAT32_ONLY
    admits: Callable[[Footprint, int], Admission] = by_sum

    def advise(
        self,
        layout: SSDLayout,
        model_type: str,
        *,
        dialect: str | None = None,
        own_class: bool = False,
        tied_head: bool = False,
        config: PreTrainedConfig | None = None,
    ) -> Advice:
        """Whether a model with mixers of this layout runs; arguments as the function `advise` has them."""
        if own_class:
            return Advice(self.name, layout.state_size, self.own_class, _OWN_CLASS[self.own_class])
        if self.model_types is not None and model_type not in self.model_types:
            return Advice(self.name, layout.state_size, "no", f"has no class for model type {model_type!r}")
        broken = [rule for rule in self.rules if not rule.holds(layout, model_type)]
        levels: list[Level] = ["runs", *(rule.otherwise for rule in broken)]
        lanes = 1 << (layout.state_size - 1).bit_length()
        reasons = [rule.reason.format(layout=layout, lanes=lanes) for rule in broken]
        unheeded = [] if config is None else unheeded_in(config, self.unheeded)
        levels += ["no"] * len(unheeded)
        reasons += unheeded
        export = remedy = ""
        if "no" not in levels:  # else no other files help
            of_files, reason, export, remedy = self._files(model_type, dialect, tied_head)
            levels.append(of_files)
            reasons += [reason] * bool(reason)
        level = max(levels, key=_LEVELS.index)
        return Advice(self.name, layout.state_size, level, "; ".join(reasons), export, remedy)

    def _files(self, model_type: str, dialect: str | None, tied_head: bool) -> tuple[Level, str, str, str]:
        """What it means that a model's files are in a dialect, why, `Advice.export` and `Advice.remedy`."""
        if self.dialect is None:
            return "runs", "", "--format gguf", ""
        if tied_head and model_type in self.cannot_tie:
            reason = f"knows no tied head for {model_type}, and leaves the head uninitialised"
            if dialect is None:
                return "no", f"{reason} (write it with --untie)", "", "--untie"
            return "no", reason, f"--format {self.dialect} --untie", "--untie"
        if dialect is None and self.dialect != "transformers":
            return "runs", f"write with --dialect {self.dialect}", "", f"--dialect {self.dialect}"
        if dialect is not None and dialect != self.dialect:
            return "no", f"reads the {self.dialect} dialect", f"--format {self.dialect}", f"--format {self.dialect}"
        return "runs", "", "", ""

    def never(self, model_type: str, tied_head: bool, config: PreTrainedConfig | None) -> str:
        """Why it runs a model at no state size; empty where that depends on the size."""
        if self.model_types is not None and model_type not in self.model_types:
            return f"has no class for model type {model_type!r}"
        reasons = [] if config is None else unheeded_in(config, self.unheeded)
        if tied_head and model_type in self.cannot_tie:
            reasons.append(self._files(model_type, None, tied_head)[1])
        return "; ".join(reasons)

    @property
    def rule_text(self) -> str:
        """All rules in words."""
        return " and ".join(rule.text for rule in self.rules if rule.otherwise != "runs") or "any state size"


@dataclass(frozen=True)
class Advice:
    """Whether an engine runs a model at a state size, and why not, or what else to know.

    Attributes:
        engine: its name.
        state_size: that the advice is about.
        level: ``runs``, ``slow`` or ``no``.
        reason: why not, or what else to know.
        export: options with which ``ghostssm export`` writes files that the engine reads, where these are not.
        remedy: the option of ``ghostssm prune`` or ``ghostssm export`` without which the engine does not run the files;
            the last of the reasons is then about it.
    """

    engine: str
    state_size: int
    level: Level
    reason: str
    export: str = ""
    remedy: str = ""


_OWN_CLASS: dict[Level, str] = {
    "runs": "own model class: load with trust_remote_code=True",
    "slow": "own model class: load with trust_remote_code=True; it runs in plain PyTorch, without the kernels",
    "no": "has no class for projected states or a state size per layer",
}


def _scan_in(*sizes: int, head_multiple: int = 1) -> Rule:
    listed = f"{', '.join(map(str, sizes[:-1]))} or {sizes[-1]}"
    heads = f" with a head dim in multiples of {head_multiple}" if head_multiple > 1 else ""
    return Rule(
        lambda layout, _: layout.state_size in sizes and layout.head_dim % head_multiple == 0,
        "slow",
        f"N' is {listed}{heads}",
        f"its scan knows N' = {listed}{heads}, so the scan runs on the CPU",
    )


_CHANNELS_OF_CUDA_KERNELS = (
    Rule(
        lambda layout, _: layout.conv_dim % 8 == 0,
        "no",
        "the channels of conv1d (heads x head dim + 2 x groups x N') are a multiple of 8",
        "conv1d would have {layout.conv_dim} channels, no multiple of 8, which causal_conv1d refuses",
    ),
    Rule(
        lambda layout, _: layout.in_proj_rows % 8 == 0,
        "no",
        "the rows of in_proj are a multiple of 8",
        "in_proj would have {layout.in_proj_rows} rows, no multiple of 8, a stride that causal_conv1d refuses",
    ),
)
_POWERS_OF_TWO = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_TRITON_LANES = Rule(
    lambda layout, _: layout.state_size in _POWERS_OF_TWO,
    "runs",
    "N' is a power of two",
    "reads and writes N' = {layout.state_size}, computes as for {lanes}",
)


def _llama_cpp(backend: str, source: str, *rules: Rule) -> Engine:
    """One backend of llama.cpp; ``source``: the file in its folder."""
    return Engine(
        name=f"llama.cpp-{backend}",
        version="llama-cpp-python 0.3.36's llama.cpp",
        rules=rules,
        model_types=frozenset({"mamba2", "bamba", "falcon_h1", "granitemoehybrid", "nemotron_h"}),
        dialect=None,
        unheeded=IN_GGUF,
        states=IN_LLAMA_CPP,
        admits=in_llama_cpp,
        source=f"ggml/src/ggml-{backend}/{source}",
    )


ENGINES: tuple[Engine, ...] = (
    Engine(
        name="transformers-cpu",
        version="transformers 5.23",
        rules=(),
        model_types=None,
        own_class="runs",
        source="models/mamba2/modeling_mamba2.py, torch_forward; run at N' = 1, 5 and 7",
    ),
    Engine(
        name="transformers-cuda",
        version="transformers 5.23, mamba_ssm 2.3.2, causal-conv1d",
        rules=(*_CHANNELS_OF_CUDA_KERNELS, _TRITON_LANES),
        model_types=None,
        own_class="slow",
        source="causal-conv1d csrc/causal_conv1d.cpp, strides of channel-last input; mamba_ssm ops/triton",
    ),
    Engine(
        name="mamba_ssm",
        version="mamba_ssm 2.3.2",
        rules=(*_CHANNELS_OF_CUDA_KERNELS, _TRITON_LANES),
        model_types=frozenset({"mamba2"}),
        states=IN_MAMBA_SSM,
        source="modules/mamba2.py (one ssm_cfg for all layers), ops/triton/ssd_combined.py; causal-conv1d",
        dialect="mamba_ssm",
    ),
    Engine(
        name="vllm",
        version="vLLM 0.33",
        rules=(_TRITON_LANES,),
        model_types=frozenset({"mamba2", "falcon_h1", "granitemoehybrid", "nemotron_h", "zamba2"}),
        unheeded=IN_VLLM_AND_SGLANG,
        states=IN_VLLM,
        admits=in_vllm,
        source="model_executor/models/registry.py, layers/mamba/mamba_mixer2.py, layers/mamba/ops",
    ),
    Engine(
        name="sglang",
        version="SGLang 0.5.23",
        rules=(_TRITON_LANES,),
        model_types=frozenset({"mamba2", "falcon_h1", "granitemoehybrid", "nemotron_h"}),
        unheeded=IN_VLLM_AND_SGLANG,
        states=IN_SGLANG,
        admits=in_sglang,
        source="srt/models/mamba2.py, srt/layers/attention/mamba/mamba.py",
        cannot_tie=frozenset({"mamba2"}),
    ),
    _llama_cpp(
        "cpu",
        "ops.cpp, ggml_compute_forward_ssm_scan_f32; run at N' = 1 to 128",
        Rule(
            lambda layout, _: layout.state_size % 32 == 0,
            "slow",
            "N' is a multiple of 32",
            "a vector step of the scan is 32 numbers on AVX2, 64 on AVX-512 and 16 on NEON; the rest of "
            "N' = {layout.state_size} goes number by number",
        ),
    ),
    _llama_cpp(
        "cuda",
        "ggml-cuda.cu, supports_op: SSM_SCAN, SSM_CONV",
        _scan_in(96, 128, 256, head_multiple=16),
        Rule(
            lambda layout, _: layout.conv_dim % 128 == 0,
            "slow",
            "the channels of conv1d (heads x head dim + 2 x groups x N') are a multiple of 128",
            "conv1d would have {layout.conv_dim} channels, no multiple of 128, so it runs on the CPU",
        ),
    ),
    _llama_cpp("vulkan", "ggml-vulkan.cpp, supports_op: SSM_SCAN", _scan_in(128, 256, head_multiple=16)),
    _llama_cpp("sycl", "ggml-sycl.cpp, supports_op: SSM_SCAN", _scan_in(128, 256, head_multiple=16)),
    _llama_cpp("opencl", "ggml-opencl.cpp, supports_op: SSM_SCAN", _scan_in(*_POWERS_OF_TWO)),
    _llama_cpp(
        "metal",
        "ggml-metal-ops.cpp, SSM_SCAN: use_mma",
        Rule(
            lambda layout, _: layout.state_size % 8 == 0 and layout.head_dim == 64,
            "slow",
            "N' is a multiple of 8, with heads of 64",
            "prefill runs as matrix products only where N' is a multiple of 8 and heads are of 64",
        ),
    ),
    Engine(
        name="mlx-lm",
        version="mlx-lm 0.32.2",
        rules=(
            Rule(
                lambda layout, _: layout.state_size % 32 == 0,
                "no",
                "N' is a multiple of 32",
                "its decode kernel skips what N' has over a multiple of 32, so answers are silently wrong",
            ),
            Rule(
                lambda layout, model_type: model_type not in ("mamba2", "granitemoehybrid") or layout.n_groups == 1,
                "no",
                "a mamba2 or granitemoehybrid model has one group",
                "normalises over all groups of a mixer together, so answers are silently wrong with "
                "{layout.n_groups} groups, pruned or not",
            ),
        ),
        model_types=frozenset({"mamba2", "falcon_h1", "granitemoehybrid", "nemotron_h"}),
        unheeded=IN_MLX_LM,
        source="mlx_lm/models/ssm.py, ssm_kernel, and the four families' files; run at N' = 32, on a CPU",
    ),
)


def config_keys(model_type: str, state_dtype: str) -> dict[str, str]:
    """What config.json says to engines that look there for the dtype of a model type's states, and know this one."""
    states = (engine.states for engine in ENGINES)
    return {key: state_dtype for each in states if (key := each.config_key(model_type)) and state_dtype in each.offered}


def engine_names() -> tuple[str, ...]:
    return tuple(engine.name for engine in ENGINES)


def engines_named(names: Sequence[str]) -> tuple[Engine, ...]:
    """The engines of these names; raises InputError for one that is unknown."""
    known = {engine.name: engine for engine in ENGINES}
    for name in names:
        if name not in known:
            raise unknown_name("engine", name, known)
    return tuple(known[name] for name in names)
