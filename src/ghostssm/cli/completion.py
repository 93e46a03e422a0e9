"""What the shell offers for a half-typed value; the names of methods, engines and the like.

Names are written out here, because the registries import PyTorch. There can be other names once these are imported.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from ghostssm.checkpoint.place import REFERENCE
from ghostssm.errors import unknown_name

METHODS = (
    *("output", "balanced", "ghost", "output-single", "rrqr", "product", "controllability", "observability"),
    *("taylor", "taylor-layer", "magnitude", "random", "sparsegpt", "sparsegpt-all"),
)
ENGINES = (
    *("transformers-cpu", "transformers-cuda", "mamba_ssm", "vllm", "sglang", "llama.cpp-cpu", "llama.cpp-cuda"),
    *("llama.cpp-vulkan", "llama.cpp-sycl", "llama.cpp-opencl", "llama.cpp-metal", "mlx-lm"),
)
STATE_DTYPES = ("float32", "bfloat16", "float16", "int8", "fp8", "int4", "tiers")
TABLES = ("sparsity", "size")
PUBLISHED_MODELS = tuple(f"state-spaces/mamba2-{size}" for size in ("130m", "370m", "780m", "1.3b", "2.7b"))
STEPS = ("distill", "refit", "repair")
_PER_LAYER = "per-layer"
_REPAIRS = ("+repair", "+refit100+repair", "+per-layer")
_TEXT_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")


class Kind(NamedTuple):
    """How the shell completes values of one kind, how they are checked, and whether they may hold commas."""

    complete: Callable[[str], list[str]] | None = None
    check: Callable[[str], None] | None = None
    commas: bool = False


def _starting(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def check_recipe(text: str) -> None:
    """Raise InputError for a recipe with an unknown method or step."""
    method, *parts = text.split("+")
    _check("method", METHODS, method)
    for part in parts:
        _check("recovery step", (*STEPS, _PER_LAYER), re.sub(r"\d+$", "", part))


def _check(what: str, known: Iterable[str], name: str) -> None:
    if name not in known and "ghostssm.methods" not in sys.modules:  # else the registries have all names, and check
        raise unknown_name(what, name, known)


def methods(incomplete: str) -> list[str]:
    """Methods; once a method is typed out, also the method with recovery steps."""
    recipes = [f"{name}{repair}" for name in METHODS if incomplete.startswith(name) for repair in _REPAIRS]
    return _starting((*METHODS, *recipes), incomplete)


def models(incomplete: str) -> list[str]:
    """The built-in model and folders; once something is typed, also the published checkpoints that begin so."""
    hub = PUBLISHED_MODELS if incomplete else ()
    return [*_starting((REFERENCE, *hub), incomplete), *_paths(incomplete, ())]


def published_models(incomplete: str) -> list[str]:
    return [*_starting(PUBLISHED_MODELS, incomplete), *_paths(incomplete, ())]


def texts(incomplete: str) -> list[str]:
    """The named corpora, folders, and files that can be read as text."""
    return [*_starting(("wikitext2", "stdlib"), incomplete), *_paths(incomplete, _TEXT_SUFFIXES)]


def _paths(incomplete: str, suffixes: tuple[str, ...]) -> list[str]:
    """Folders, and files with one of the suffixes, that begin with what is typed; hidden ones after a dot only."""
    head, slash, tail = incomplete.rpartition("/")
    try:
        paths = sorted(Path(head + slash or ".").iterdir())
    except OSError:
        return []
    return [
        f"{head}{slash}{path.name}"
        for path in paths
        if path.name.startswith(tail or "")
        and (tail.startswith(".") or not path.name.startswith("."))
        and (path.is_dir() or path.suffix in suffixes)
    ]


def _named(what: str, names: tuple[str, ...]) -> Kind:
    return Kind(lambda incomplete: _starting(names, incomplete), lambda name: _check(what, names, name))


KINDS = {
    **dict.fromkeys(("MODEL", "BASE", "STUDENT"), Kind(models)),
    "CHECKPOINT": Kind(published_models, commas=True),
    "TEXT": Kind(texts, commas=True),
    "TASK": Kind(commas=True),
    "RECIPE": Kind(methods, check_recipe),
    "ENGINE": _named("engine", ENGINES),
    "TABLE": _named("table", TABLES),
    "DTYPE": _named("state dtype", STATE_DTYPES),
    "DEVICE": Kind(lambda incomplete: _starting(("cpu", "cuda"), incomplete)),
}
"""By what an option's value is called in the help."""
