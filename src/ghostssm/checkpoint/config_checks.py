"""What a config.json may say before transformers acts on it.

transformers builds lists as long as the number of layers, follows entries that name other files and repositories, and
can fetch code that an entry asks for. A config that others wrote is checked and stripped first.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import PreTrainedConfig

from ghostssm.errors import ModelError
from ghostssm.files.reading import number_faults
from ghostssm.models.transformers_private import rotary_types

MOST_LAYERS = 4096
MOST_MODULES = 100_000
"""Of a model whose weight files are not at hand."""
_MOST_NUMBER = 2**31 - 1
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_CHUNKS = ("chunk_size", "mamba_chunk_size")
# Each makes transformers open another file, or fetch and run code.
_ACTING_ENTRIES = frozenset(
    {
        "auto_map",
        "configuration_files",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "experts_implementation",
        "_experts_implementation",
        "_experts_implementation_internal",
        "custom_pipelines",
        "distributed_config",
        "kernel_config",
        "trust_remote_code",
        "use_kernels",
    }
)


def checked_config(
    config: dict[str, Any], where: str, config_class: type[PreTrainedConfig] | None = None
) -> dict[str, Any]:
    """A config without entries that would have transformers open other files or run code.

    Args:
        config_class: that the config is for; whole numbers become floats where it has floats.

    Raises:
        ModelError: NaN, a number beyond what sizes and token ids can be, more layers than any model has, or a chunk
            size of no tokens.
    """
    config = without_acting_entries(config)
    if config_class is not None:
        config = with_floats(config, config_class)
    faults = number_faults(config, _MOST_NUMBER)
    faults += [
        f"{name} is {count}, expected at most {MOST_LAYERS}"
        for name in _LAYER_COUNTS
        if isinstance(count := config.get(name), (int, float)) and count > MOST_LAYERS
    ]
    faults += [
        f"{name} is {size}, expected a positive integer such as 256"
        for name in _CHUNKS
        if isinstance(size := config.get(name), int) and size < 1
    ]
    if faults:
        raise ModelError(f"{where} can't be the config of a model: {'; '.join(faults[:8])}.")
    return config


def without_acting_entries(config: dict[str, Any]) -> dict[str, Any]:
    """A config without entries that would have transformers open other files or run code."""
    return {key: _decoded(value) for key, value in config.items() if key not in _ACTING_ENTRIES}


def with_floats(values: dict[str, Any], config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Config values with floats for whole numbers where a class has floats, as rotary embeddings everywhere.

    JSON writers make 1 of 1.0, which transformers' classes refuse, and 100000000000 of 1e11, which is no size.
    """
    fields = {field.name: field.type for field in dataclasses.fields(config_class)}
    types = {**rotary_types(), **fields}
    names = {name for name, kind in types.items() if re.search(r"\bfloat\b", str(kind)) and "int" not in str(kind)}
    return {key: _as_floats(value, names, key in names) for key, value in values.items()}


def _as_floats(value: Any, names: set[str], wanted: bool) -> Any:
    if isinstance(value, dict):
        return {key: _as_floats(inner, names, key in names) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_as_floats(inner, names, wanted) for inner in value)
    exact = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    return float(value) if wanted and exact else value


def _decoded(value: Any) -> Any:
    """A JSON value without acting entries, and with transformers' spelling of numbers that JSON lacks undone.

    Nesting is bounded by the JSON reader.
    """
    if isinstance(value, dict):
        if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return {key: _decoded(inner) for key, inner in value.items() if key not in _ACTING_ENTRIES}
    return [_decoded(inner) for inner in value] if isinstance(value, list) else value


@contextmanager
def bounded_modules(most: int) -> Iterator[None]:
    """Within the context, raise ModelError as soon as a model has more than ``most`` modules.

    So building ends soon, whichever count in a config is too large.
    """
    count = 0

    def registered(_: nn.Module, __: str, ___: nn.Module | None) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise ModelError(
                f"The config describes a model of more than {most} parts, far more than its weight files hold or any "
                "published model has."
            )

    handle = register_module_module_registration_hook(registered)
    try:
        yield
    finally:
        handle.remove()
