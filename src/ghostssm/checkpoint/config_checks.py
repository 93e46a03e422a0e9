"""What a config.json may say before transformers acts on it.

transformers builds lists as long as the number of layers, follows entries that name other files and repositories, and
can fetch code that an entry asks for. A config that others wrote is checked and stripped first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from ghostssm.errors import ModelError
from ghostssm.files.reading import number_faults

MOST_LAYERS = 4096
MOST_MODULES = 100_000
"""Of a model whose weight files are not at hand."""
_MOST_NUMBER = 2**31 - 1
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
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


def checked_config(config: dict[str, Any], where: str) -> dict[str, Any]:
    """A config without entries that would have transformers open other files or run code.

    Raises:
        ModelError: NaN, a number beyond what sizes and token ids can be, or more layers than any model has.
    """
    config = without_acting_entries(config)
    faults = number_faults(config, _MOST_NUMBER)
    faults += [
        f"{name} is {count}, expected at most {MOST_LAYERS}"
        for name in _LAYER_COUNTS
        if isinstance(count := config.get(name), (int, float)) and count > MOST_LAYERS
    ]
    if faults:
        raise ModelError(f"{where} can't be the config of a model: {'; '.join(faults[:8])}.")
    return config


def without_acting_entries(config: dict[str, Any]) -> dict[str, Any]:
    """A config without entries that would have transformers open other files or run code."""
    return {key: _decoded(value) for key, value in config.items() if key not in _ACTING_ENTRIES}


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
    """Within the context, ModelError once a model takes more modules than ``most``.

    Whatever count in a config a model class turns into modules, building then ends soon.
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
