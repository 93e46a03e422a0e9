"""Whether vLLM and SGLang read checkpoints that ghostssm writes, by their own code, on a CPU and without kernels.

    python tools/check_engines.py vllm
    python tools/check_engines.py sglang

Run it where ghostssm and the engine are installed; compiled and GPU-only parts of the engine need not be. Four
checkpoints at N' = 32 are written: the built-in model and a small one with two groups, each with a tied and with a
stored head. Then the engine's own code parses the config, builds the model and loads the weights, and every parameter
that it holds is compared, bit by bit, with what the file says. No forward pass is run: it needs the kernels.

Exit code 0 if every checkpoint is read as expected, 1 otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch
import transformers

STATE_SIZE = 32
# What an engine imports for GPUs, images, audio or grammars; replaced by empty modules where it is missing.
REPLACEABLE = frozenset(
    {
        *("triton", "flashinfer", "sgl_kernel", "cuda", "tvm_ffi", "torchao", "torchvision", "av"),
        *("decord", "xgrammar", "llguidance", "outlines_core", "mistral_common"),
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

    def __init__(self) -> None:
        self.replaced: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        top = name.partition(".")[0]
        if top not in REPLACEABLE:
            return None
        self.replaced.add(top)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Nothing(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


Read = tuple[Mapping[str, torch.Tensor], Mapping[str, Any]]
"""What an engine holds after loading: parameters by its own names, and sizes that it took from the config."""


def read_with_vllm(folder: Path) -> Read:
    import vllm.platforms
    from vllm.config import DeviceConfig, ModelConfig, VllmConfig, set_current_vllm_config
    from vllm.config.load import LoadConfig
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.model_executor.models import registry
    from vllm.platforms.cpu import CpuPlatform
    from vllm.utils.torch_utils import set_default_torch_dtype

    vllm.platforms._current_platform = CpuPlatform()
    # Model classes are looked at in a process of their own, which would lack the replacements.
    registry._run_in_subprocess = lambda function: function()
    config = ModelConfig(model=str(folder), tokenizer=str(folder), dtype="float32", enforce_eager=True)
    whole = VllmConfig(model_config=config, device_config=DeviceConfig(device="cpu"))
    with set_current_vllm_config(whole), tempfile.TemporaryDirectory() as scratch:
        init_distributed_environment(1, 0, f"file://{scratch}/rendezvous", 0, backend="gloo")
        initialize_model_parallel(1, 1)
        with set_default_torch_dtype(torch.float32):
            model = initialize_model(vllm_config=whole)
        forget(model)
        get_model_loader(LoadConfig()).load_weights(model, config)
        convolution, state = model.get_mamba_state_shape_from_config(whole)
        sizes = {"class": type(model).__name__, "state": tuple(state), "conv_channels": convolution[-1]}
        held = dict(model.named_parameters())
        if config.hf_config.tie_word_embeddings:
            held["lm_head.weight"] = model.lm_head.weight
        cleanup_dist_env_and_memory()
    return held, sizes


def read_with_sglang(folder: Path) -> Read:
    from sglang.srt import runtime_context
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_loader.loader import DefaultModelLoader
    from sglang.srt.models.registry import ModelRegistry

    parallel = {"tp_rank": 0, "tp_size": 1, "attn_tp_rank": 0, "attn_tp_size": 1}
    published = runtime_context._CONTEXT.override_server_args(model_path=str(folder), device="cpu")
    with published, runtime_context.get_parallel().override(**parallel):
        config = ModelConfig(str(folder), dtype="float32")
        chosen, _ = ModelRegistry.resolve_model_cls(config.hf_config.architectures)
        model = chosen(config.hf_config)
        forget(model)
        loader = DefaultModelLoader(LoadConfig())
        model.load_weights(loader._get_all_weights(config, model))
        shape = config.hf_config.mamba2_cache_params.shape
        sizes = {"class": chosen.__name__, "state": tuple(shape.temporal), "conv_channels": shape.conv_dim}
    # Their names, spelt as in the file.
    renamed = {
        name.replace("model.embed_tokens.", "model.embeddings.")
        .replace("model.norm.", "model.norm_f.")
        .replace("model.", "backbone.", 1): value
        for name, value in model.named_parameters()
    }
    return renamed, sizes


READERS: dict[str, Callable[[Path], Read]] = {"vllm": read_with_vllm, "sglang": read_with_sglang}
TIES_HEADS = {"vllm": True, "sglang": False}


@torch.no_grad()
def forget(model: torch.nn.Module) -> None:
    """Fill every parameter with NaN, so that one that no weight reaches shows."""
    for parameter in model.parameters():
        parameter.fill_(torch.nan)


def expected(folder: Path, tied: bool) -> dict[str, torch.Tensor]:
    """The file's tensors as an engine holds them: A in place of its logarithm, a tied head by its own name."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    if tied:
        tensors["lm_head.weight"] = tensors["backbone.embeddings.weight"]
    return {
        name.replace(".A_log", ".A"): -torch.exp(value.float()) if name.endswith(".A_log") else value.float()
        for name, value in tensors.items()
    }


def faults(folder: Path, tied: bool, held: Mapping[str, torch.Tensor], sizes: Mapping[str, Any]) -> list[str]:
    """Every difference between what an engine holds and what the folder says."""
    config = transformers.AutoConfig.from_pretrained(folder)
    wanted = expected(folder, tied)
    found = [f"{name} is not in the checkpoint" for name in held if name not in wanted]
    found += [f"{name} is not in the engine's model" for name in wanted if name not in held]
    for name in wanted.keys() & held.keys():
        ours, theirs = wanted[name], held[name].detach().float()
        # Vocabularies are padded at the end.
        rows = theirs[: len(ours)] if name in ("lm_head.weight", "backbone.embeddings.weight") else theirs
        if rows.shape != ours.shape:
            found.append(f"{name} has shape {tuple(theirs.shape)}, the checkpoint {tuple(ours.shape)}")
        elif not torch.equal(rows, ours):
            found.append(f"{name} has other values" if torch.isfinite(rows).all() else f"{name} was never loaded")
    state = (config.num_heads, config.head_dim, config.state_size)
    channels = config.num_heads * config.head_dim + 2 * config.n_groups * config.state_size
    if sizes["state"] != state:
        found.append(f"its state is {sizes['state']}, expected {state}")
    if sizes["conv_channels"] != channels:
        found.append(f"its convolution has {sizes['conv_channels']} channels, expected {channels}")
    return sorted(found)


def write_checkpoints(folder: Path) -> Iterator[tuple[str, Path, bool]]:
    """Name, folder and whether the head is tied, of four pruned checkpoints."""
    import ghostssm
    from ghostssm.text.windows import Windows

    torch.manual_seed(0)
    config = transformers.Mamba2Config(
        vocab_size=320, hidden_size=64, num_hidden_layers=2, num_heads=8, head_dim=16, n_groups=2, state_size=64
    )
    config.tie_word_embeddings = True
    transformers.Mamba2ForCausalLM(config).save_pretrained(folder / "two-groups")
    for name, spec in (("reference", "reference"), ("two groups", str(folder / "two-groups"))):
        for tied in (True, False):
            checkpoint = ghostssm.load(spec)
            windows = Windows(torch.arange(1, 65)[None], "counting", "0" * 64, 1.0, 0)
            plan = ghostssm.Calibration(checkpoint.model, windows).plan("magnitude", STATE_SIZE)
            smaller = ghostssm.apply_plan(checkpoint.model, plan)
            written = ghostssm.save(
                ghostssm.Checkpoint(smaller, checkpoint.tokenizer, checkpoint.source),
                plan,
                folder / f"{name} {tied}".replace(" ", "-"),
                untie=not tied,
            )
            yield name, written, tied


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", choices=READERS)
    engine = parser.parse_args().engine

    # These ask whether optional packages are there; they must not take an empty module for one.
    import transformers.image_utils
    import transformers.modeling_utils

    with tempfile.TemporaryDirectory() as scratch:
        checkpoints = list(write_checkpoints(Path(scratch)))
        if importlib.util.find_spec(engine) is None:
            print(f"{engine} is not installed here.", file=sys.stderr)
            return 1
        replacement = _Replacement()
        sys.meta_path.append(replacement)
        unexpected = 0
        for name, folder, tied in checkpoints:
            with contextlib.redirect_stdout(sys.stderr):
                held, sizes = READERS[engine](folder)
            found = faults(folder, tied, held, sizes)
            refused = tied and not TIES_HEADS[engine]
            as_expected = found == ["lm_head.weight was never loaded"] if refused else not found
            unexpected += not as_expected
            head = "tied head" if tied else "stored head"
            print(f"{name}, N' = {STATE_SIZE}, {head}: {sizes['class']}, {len(held)} tensors, state {sizes['state']}")
            for fault in found or ["every name, shape and value as in the checkpoint"]:
                print(f"  {'as expected' if as_expected else 'FAULT'}: {fault}")
        version = getattr(sys.modules[engine], "__version__", "")
        print(f"{engine} {version}, transformers {transformers.__version__}, torch {torch.__version__}")
        print(f"replaced by empty modules: {', '.join(sorted(replacement.replaced)) or 'nothing'}")
    return 1 if unexpected else 0


if __name__ == "__main__":
    sys.exit(main())
