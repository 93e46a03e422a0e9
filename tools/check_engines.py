"""Whether vLLM, SGLang and mlx-lm read checkpoints that ghostssm writes, by their own code and on a CPU.

    python tools/check_engines.py write FOLDER
    python tools/check_engines.py vllm FOLDER
    python tools/check_engines.py vllm-capacity
    python tools/check_engines.py sglang-capacity
    python tools/check_engines.py sglang FOLDER
    python tools/check_engines.py mlx-lm FOLDER

``write`` runs where ghostssm is installed and writes small pruned checkpoints of every family, at N' = 32, with what
`ghostssm.advise` says of them. The others run where an engine is installed, which may be another environment; compiled
and GPU-only parts of vLLM and SGLang need not be there.

mlx-lm loads every checkpoint that it is said to run and computes the logits of a prompt, in one piece and token by
token, and what greedy decoding says next: all have to agree with transformers'. vLLM and SGLang parse the config, build
the model and load the weights; every parameter that they hold is compared, bit by bit, with what the file says, and so
are the sizes of their caches and the groups of the mixers. No forward pass is run: it needs the kernels. A checkpoint
that mlx-lm is said not to run has to differ. ``vllm-capacity`` and ``sglang-capacity`` ask the engines' own planning
what their caches hold (`engine_capacity.py`) and write it where the tests compare ghostssm's arithmetic with it.

Exit code 0 if everything is as ghostssm says, 1 otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import re
import sys
import tempfile
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch
from engine_capacity import PLANNERS, RECORDS, record
from engine_checkpoints import Written, read_index, write_checkpoints

# What an engine imports for GPUs, images, audio or grammars; replaced by empty modules where it is missing.
REPLACEABLE = frozenset(
    {
        *("triton", "flashinfer", "sgl_kernel", "cuda", "tvm_ffi", "torchao", "torchvision", "torchaudio"),
        *("vllm", "av", "decord", "xgrammar", "llguidance", "outlines_core", "mistral_common"),
    }
)


class _Nothing(types.ModuleType):
    """A module in which every name exists and does nothing."""

    __path__: ClassVar[list[str]] = []
    __version__ = "0.0.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        is_class = name[0].isupper() and not name.isupper()
        value = _NothingClass(name, (), {}) if is_class else _Nothing(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """As a decorator, the function itself."""
        return arguments[0] if len(arguments) == 1 and not options and callable(arguments[0]) else self

    def __getitem__(self, _: Any) -> _Nothing:
        return self

    def __or__(self, _: Any) -> _Nothing:
        return self

    __ror__ = __or__


class _NothingClass(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return _Nothing(name)

    def __get_pydantic_core_schema__(cls, *_: Any) -> dict[str, str]:
        return {"type": "any"}


class _Replacement(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """The last finder that is asked: gives empty modules for what is missing and replaceable."""

    def __init__(self, replaceable: Collection[str]) -> None:
        self.replaceable = replaceable
        self.replaced: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        top = name.partition(".")[0]
        if top not in self.replaceable:
            return None
        self.replaced.add(top)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Nothing(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


Read = tuple[Mapping[str, torch.Tensor], Mapping[str, Any]]
"""What an engine holds after loading: parameters by its own names, and sizes that it took from the config."""


def on_a_cpu() -> None:
    """vLLM's platform, without what its own detection asks of a machine."""
    import vllm.platforms
    from vllm.model_executor.models import registry
    from vllm.platforms.cpu import CpuPlatform

    vllm.platforms._current_platform = CpuPlatform()
    # Model classes are looked at in a process of their own, which would lack the replacements.
    registry._run_in_subprocess = lambda function: function()


def read_with_vllm(folder: Path) -> Read:
    from vllm.config import DeviceConfig, ModelConfig, VllmConfig, set_current_vllm_config
    from vllm.config.load import LoadConfig
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    on_a_cpu()
    config = ModelConfig(model=str(folder), tokenizer=str(folder), dtype="float32", enforce_eager=True)
    whole = VllmConfig(model_config=config, device_config=DeviceConfig(device="cpu"))
    with set_current_vllm_config(whole), tempfile.TemporaryDirectory() as scratch:
        init_distributed_environment(1, 0, f"file://{scratch}/rendezvous", 0, backend="gloo")
        initialize_model_parallel(1, 1)
        try:
            with set_default_torch_dtype(torch.float32):
                model = initialize_model(vllm_config=whole)
            forget(model)
            get_model_loader(LoadConfig()).load_weights(model, config)
            convolution, state = model.get_mamba_state_shape_from_config(whole)
            sizes = {"class": type(model).__name__, "state": list(state), "channels": convolution[-1]}
            sizes["groups"] = groups_of(model)
            held = held_by(model)
        finally:
            cleanup_dist_env_and_memory()
    return held, sizes


def read_with_sglang(folder: Path) -> Read:
    from sglang.srt import runtime_context
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_loader.loader import DefaultModelLoader, _initialize_model
    from sglang.srt.model_loader.utils import set_default_torch_dtype
    from sglang.srt.models.registry import ModelRegistry

    alone = types.SimpleNamespace(is_first_rank=True, is_last_rank=True, rank_in_group=0, world_size=1)
    alone.device_group = types.SimpleNamespace(rank=lambda: 0, size=lambda: 1)
    kinds = ("tp", "pp", "attn_tp", "attn_dp", "attn_cp", "moe_ep", "moe_tp", "moe_dp")
    parallel: dict[str, Any] = {f"{kind}_{part}": value for kind in kinds for part, value in (("rank", 0), ("size", 1))}
    parallel |= {"pp_group": alone, "moe_ep_group": alone}
    published = runtime_context._CONTEXT.override_server_args(model_path=str(folder), device="cpu")
    with published, runtime_context.get_parallel().override(**parallel):
        config = ModelConfig(str(folder), dtype="float32")
        chosen, _ = ModelRegistry.resolve_model_cls(config.hf_config.architectures)
        with set_default_torch_dtype(torch.float32):
            model = _initialize_model(config, LoadConfig())
        forget(model)
        loader = DefaultModelLoader(LoadConfig())
        model.load_weights(loader._get_all_weights(config, model))
        shape = config.hf_config.mamba2_cache_params.shape
        sizes = {"class": chosen.__name__, "state": list(shape.temporal), "channels": shape.conv_dim}
        sizes["groups"] = groups_of(model)
    return held_by(model), sizes


def held_by(model: Any) -> dict[str, torch.Tensor]:
    """Every parameter once, and the head also where it is tied."""
    return dict(model.named_parameters()) | {"lm_head.weight": model.lm_head.weight}


def groups_of(model: torch.nn.Module) -> int:
    """The groups that all mixers of a model have."""
    (groups,) = {module.n_groups for module in model.modules() if hasattr(module, "ssm_state_size")}
    return int(groups)


SHOWN = 3  # faults of a checkpoint
TOLERANCE = 1e-4
"""Of a logit, in float32."""


def read_with_mlx_lm(folder: Path, ids: list[int], prompt: int, count: int) -> tuple[Any, Any, list[int]]:
    """Logits (length, vocabulary) in one piece and token by token, and ``count`` greedy tokens after a prompt."""
    import mlx.core as mx
    import numpy as np
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)

    def step(piece: list[int], cache: Any = None) -> Any:
        return np.array(model(mx.array([piece]), cache=cache))[0]

    cache = make_prompt_cache(model)
    stepwise = np.concatenate([step([token], cache) for token in ids])
    cache, greedy = make_prompt_cache(model), list(ids[:prompt])
    last = step(greedy, cache)[-1]
    for _ in range(count):
        greedy.append(int(last.argmax()))
        last = step(greedy[-1:], cache)[-1]
    return step(ids), stepwise, greedy[prompt:]


def compare_logits(entry: Written, folder: Path) -> tuple[str, list[str]]:
    """What mlx-lm makes of a checkpoint, in words, and how it differs from transformers."""
    expected = entry.expected(folder)
    logits, greedy = expected["logits"].numpy(), expected["greedy"].tolist()
    try:
        whole, stepwise, found = read_with_mlx_lm(
            folder / entry.folder, expected["ids"].tolist(), int(expected["prompt"]), len(greedy)
        )
    except (ValueError, KeyError, TypeError) as error:
        return "not loaded", [f"{type(error).__name__}: {str(error).splitlines()[0]}"]
    differences = {"prefill": abs(whole - logits).max(), "token by token": abs(stepwise - logits).max()}
    faults = [f"logits differ by {value:.2g} ({way})" for way, value in differences.items() if not value <= TOLERANCE]
    if found != greedy:
        faults.append(f"greedy decoding says {found}, transformers {greedy}")
    least = f"{len(logits)} positions, largest difference {max(differences.values()):.1e} of {abs(logits).max():.3g}"
    return least, faults


READERS: dict[str, Callable[[Path], Read]] = {"vllm": read_with_vllm, "sglang": read_with_sglang}
NEVER_READ = (".q_norm.weight", ".k_norm.weight")  # SGLang's Falcon-H1 makes them and does not use them
_MERGED = {  # an engine's tensor to those of the file that it is put together from, front to back
    ".qkv_proj.": (".q_proj.", ".k_proj.", ".v_proj."),
    ".gate_up_proj.": (".gate_proj.", ".up_proj."),
}
_EXPERTS = {  # an engine's tensor of all experts to the file's, of all or of each
    ".experts.w13_weight": (".input_linear.weight", ".experts.{}.up_proj.weight"),
    ".experts.w2_weight": (".output_linear.weight", ".experts.{}.down_proj.weight"),
}


@torch.no_grad()
def forget(model: torch.nn.Module) -> None:
    """Fill every parameter with NaN, so that one that no weight reaches shows."""
    for parameter in model.parameters():
        parameter.fill_(torch.nan)


def spelt_alike(name: str) -> str:
    """A tensor's name without what engines rename."""
    for prefix in ("backbone.", "model."):
        name = name.removeprefix(prefix)
    for theirs, ours in (("embeddings.", "embed_tokens."), ("norm_f.", "norm."), ("feed_forward.", "mlp.")):
        name = name.replace(theirs, ours)
    for theirs, ours in (
        (".routed_experts.", "."),
        (".router.layer.", ".gate."),
        (".mamba.mamba.", ".mamba."),
        (".self_attn.", "."),
    ):
        name = name.replace(theirs, ours)
    name = re.sub(r"(_adapter_list\.\d+)\.([AB])\.", lambda found: f"{found[1]}.{'AB'.index(found[2])}.", name)
    return name.replace(".A_log", ".A")


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The file's tensors as engines hold them: A in place of its logarithm, a tied head by its own name."""
    tensors = {}
    for name, value in safetensors.torch.load_file(folder / "model.safetensors").items():
        held = -torch.exp(value.float()) if name.endswith(".A_log") else value.float()
        tensors[spelt_alike(name)] = held
    tensors.setdefault("lm_head.weight", tensors["embed_tokens.weight"])
    return tensors


def parts_of(name: str, stored: Mapping[str, torch.Tensor]) -> list[str] | None:
    """The file's tensors that an engine's one is put together from; None if there are none."""
    if name in stored:
        return [name]
    for merged, parts in _MERGED.items():
        names = [name.replace(merged, part) for part in parts]
        if merged in name and all(part in stored for part in names):
            return names
    for held, (together, each) in _EXPERTS.items():
        if held not in name:
            continue
        if (found := name.replace(held, together)) in stored:
            return [found]
        names = []
        while (found := name.replace(held, each.format(len(names)))) in stored:
            names.append(found)
        return names or None
    return None


def compare_weights(engine: str, entry: Written, folder: Path) -> tuple[str, list[str]]:
    """What vLLM or SGLang makes of a checkpoint, in words, and how it differs from the files."""
    try:
        held, sizes = READERS[engine](folder / entry.folder)
    except NotImplementedError as error:  # a layer that cannot even be built here
        return f"not checked, {error}", []
    except (ValueError, KeyError, AssertionError, AttributeError, RuntimeError, TypeError) as error:
        return "not loaded", [f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"]
    stored = stored_tensors(folder / entry.folder)
    found, used = [], set()
    for full_name, parameter in held.items():
        name = spelt_alike(full_name)
        parts = parts_of(name, stored)
        if parts is None:
            if not name.endswith(NEVER_READ):
                found.append(f"{full_name} is not in the checkpoint")
            continue
        used.update(parts)
        values = [stored[part] for part in parts]
        join = torch.stack if ".experts." in name and len(values) > 1 else torch.cat
        ours, theirs = join(values) if len(values) > 1 else values[0], parameter.detach().float()
        rows = theirs[: len(ours)] if name in ("lm_head.weight", "embed_tokens.weight") else theirs  # padded at the end
        if rows.shape != ours.shape:
            found.append(f"{full_name} has shape {tuple(theirs.shape)}, the checkpoint {tuple(ours.shape)}")
        elif not torch.equal(rows, ours):
            known = torch.isfinite(rows).all()
            found.append(f"{full_name} has other values" if known else f"{full_name} was never loaded")
    found += [f"{name} is not in the engine's model" for name in stored.keys() - used]
    found += [
        f"{name} is {sizes[name]}, expected {expected}"
        for name, expected in entry.sizes.items()
        if sizes[name] != expected
    ]
    return f"{sizes['class']}, {len(held)} tensors, state {sizes['state']}", sorted(found)


def check(engine: str, folder: Path) -> int:
    """Print what an engine makes of every checkpoint; the number that are not as ghostssm says."""
    unexpected = 0
    for entry in read_index(folder):
        says, reason = entry.levels[engine], entry.reasons[engine]
        with contextlib.redirect_stdout(sys.stderr):
            words, found = (
                compare_logits(entry, folder) if engine == "mlx-lm" else compare_weights(engine, entry, folder)
            )
        # What lies in the forward pass does not show where none is run.
        as_expected = bool(found) == (says == "no") if engine == "mlx-lm" else not found or says == "no"
        unexpected += not as_expected
        print(f"{entry.name}: {words}")
        shown = found if len(found) <= SHOWN else [*found[: SHOWN - 1], f"and {len(found) - SHOWN + 1} more"]
        for fault in shown:
            print(f"  {'as expected' if as_expected else 'FAULT'}: {fault}")
        if says == "no":
            print(f"  ghostssm: {reason}")
    return unexpected


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=("write", *READERS, "mlx-lm", *(f"{engine}-capacity" for engine in PLANNERS)))
    parser.add_argument("folder", type=Path, nargs="?")
    arguments = parser.parse_args()
    engine, folder = arguments.step.removesuffix("-capacity"), arguments.folder
    if folder is None and arguments.step == engine:
        parser.error(f"{engine} needs a FOLDER")
    if engine == "write":
        print(f"{len(write_checkpoints(folder))} checkpoints in {folder}")
        return 0
    module = engine.replace("-", "_")
    if importlib.util.find_spec(module) is None:
        print(f"{engine} is not installed here.", file=sys.stderr)
        return 1

    # These ask whether optional packages are there; they must not take an empty module for one.
    import transformers.image_utils
    import transformers.modeling_utils

    replacement = _Replacement(REPLACEABLE - {module})
    sys.meta_path.append(replacement)
    unexpected = 0
    if arguments.step == engine:
        unexpected = check(engine, folder)
    else:
        if engine == "vllm":
            on_a_cpu()
        print(f"{record(engine, version(module))} plans in {RECORDS[engine].name}")
    print(f"{engine} {version(module)}, transformers {transformers.__version__}, torch {torch.__version__}")
    print(f"replaced by empty modules: {', '.join(sorted(replacement.replaced)) or 'nothing'}")
    return 1 if unexpected else 0


if __name__ == "__main__":
    sys.exit(main())
