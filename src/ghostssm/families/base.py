"""What the rest of the project needs to know of a model family, and the registry of families."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import nn
from transformers import PreTrainedConfig

from ghostssm.errors import ModelError
from ghostssm.layout import SSDLayout
from ghostssm.mixer import Mixer


class Family(Protocol):
    """One model family. Families are stateless; only they know transformers' class and config names."""

    model_type: str

    def layout(self, config: PreTrainedConfig) -> SSDLayout:
        """The sizes of the family's mixers, from a config alone."""
        ...

    def set_state_size(self, config: PreTrainedConfig, state_size: int) -> None:
        """Write a new state size into a config."""
        ...

    def resize(self, module: nn.Module, layout: SSDLayout) -> None:
        """Set the sizes that a mixer module keeps beside its tensors."""
        ...

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The residual blocks of a model, front to back, with or without a mixer."""
        ...

    def mixer(self, config: PreTrainedConfig, block: nn.Module, index: int) -> Mixer | None:
        """The Mamba-2 mixer of block number ``index``, if it has one."""
        ...


@runtime_checkable
class ServedElsewhere(Protocol):
    """A family whose config.json needs more keys than transformers writes, so that other engines can read it."""

    def serving_keys(self, config: PreTrainedConfig) -> dict[str, Any]:
        """These keys and their values."""
        ...


_FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    _FAMILIES[family.model_type] = family


def supported_model_types() -> tuple[str, ...]:
    return tuple(sorted(_FAMILIES))


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a config.

    Raises:
        ModelError: no family here has that model type.
    """
    return family_named(config.model_type)


def family_named(model_type: str) -> Family:
    """The family of a ``model_type``; raises as :func:`family_of`."""
    try:
        return _FAMILIES[model_type]
    except KeyError:
        raise ModelError(
            f"The model type is {model_type!r}, in which ghostssm knows no Mamba-2 layers; "
            f"expected one of: {', '.join(supported_model_types())}."
        ) from None


def mixers_of(model: nn.Module) -> list[Mixer]:
    """Every Mamba-2 mixer of a model, front to back."""
    config = model.config
    family = family_of(config)
    found = (family.mixer(config, block, index) for index, block in enumerate(family.blocks(model)))
    return [mixer for mixer in found if mixer is not None]
