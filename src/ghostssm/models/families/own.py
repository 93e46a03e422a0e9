"""Our own classes, for projected states and a state size per layer: one beside every family of transformers."""

from __future__ import annotations

import shutil
from collections.abc import Container, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig

from ghostssm.models import own_class
from ghostssm.models.families.family import Family
from ghostssm.models.families.registry import register
from ghostssm.models.families.stock import HYBRIDS, MAMBA2
from ghostssm.models.layout import SSDLayout
from ghostssm.models.mixer import Mixer, Projection
from ghostssm.models.own_class import OWN_CONFIGS
from ghostssm.models.transformers_private import tied_weights, without_weights
from ghostssm.ops.state_format import Tiers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_OWN_KEYS = ("state_sizes", "projected_state_sizes", "state_tiers")
_OF_A_CLASS = ("model_type", "architectures", "auto_map", "transformers_version")
"""Entries of a config that differ between classes."""


class OwnFamily(Family):
    """Found as in the stock family; its mixers differ in size and may project their state."""

    def layout(self, config: PreTrainedConfig) -> SSDLayout:
        """The sizes of the widest layer."""
        sizes = [config.state_size_of(index) for index in range(config.num_hidden_layers)]
        return super().layout(config).with_state_size(max(sizes))

    def set_state_size(self, config: PreTrainedConfig, state_size: int) -> None:
        """The same in every layer, and not projected."""
        super().set_state_size(config, state_size)
        config.state_sizes = config.projected_state_sizes = config.state_tiers = None

    def mixer(self, block: nn.Module, index: int) -> Mixer | None:
        stock = super().mixer(block, index)
        if stock is None:
            return None
        module: Any = stock.module
        projected = module.B_projection is not None
        projection = Projection(module.B_projection, module.C_projection) if projected else None
        tiers = None if module.state_tiers is None else tuple((wide, narrow) for wide, narrow in module.state_tiers)
        return replace(stock, projection=projection, tiers=tiers)


for _stock in (MAMBA2, *HYBRIDS):
    _own = OWN_CONFIGS[_stock.model_type].model_type
    register(OwnFamily(**vars(_stock) | {"model_type": _own, "is_own_class": True}))


def own_model(
    model: PreTrainedModel,
    tensors: Mapping[str, Tensor],
    state_sizes: Mapping[int, int],
    projected_state_sizes: Mapping[int, int] | None,
    state_tiers: Mapping[int, Tiers] | None = None,
) -> PreTrainedModel:
    """A model of our own class from a stock model and the tensors of all its layers, which are not copied.

    Args:
        model: of which config and ties are taken.
        tensors: the whole state dict, sliced, with ``B_projection`` and ``C_projection`` in every projected mixer.
        state_sizes: of every layer with a mixer, by its index, the width of its B and C.
        projected_state_sizes: of the same layers, 0 for no projection.
        state_tiers: of the same layers.
    """
    config = model.config
    own = OWN_CONFIGS[config.model_type](**_values_of(config))
    own.state_sizes = _by_layer(state_sizes, config)
    own.projected_state_sizes = None if projected_state_sizes is None else _by_layer(projected_state_sizes, config)
    if state_tiers is not None:
        own.state_tiers = [[list(tier) for tier in state_tiers.get(i, ())] for i in range(config.num_hidden_layers)]
    setattr(own, own.size_keys["state_size"], max(state_sizes.values()))
    own.validate()
    return filled(own, tensors, tied_weights(model))


def write_code(folder: Path) -> None:
    """Write into a folder the code that a model of ours needs beside its config, as ``save_pretrained`` does."""
    for name in ("configuration_ghost.py", "modeling_ghost.py"):
        shutil.copyfile(Path(own_class.__path__[0]) / name, folder / name)


def stock_model(model: PreTrainedModel, tensors: Mapping[str, Tensor], state_size: int) -> PreTrainedModel:
    """A stock model from one of our own class and tensors of one size in all layers, which are not copied."""
    config = model.config
    stock = AutoConfig.for_model(config.model_type.removeprefix("ghost_"))
    values = {name: value for name, value in _values_of(config).items() if name not in _OWN_KEYS}
    stock = type(stock)(**values | {config.size_keys["state_size"]: state_size})
    return filled(stock, tensors, tied_weights(model))


def _values_of(config: PreTrainedConfig) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name not in _OF_A_CLASS}


def _by_layer(sizes: Mapping[int, int], config: PreTrainedConfig) -> list[int]:
    return [sizes.get(layer, 0) for layer in range(config.num_hidden_layers)]


def filled(config: PreTrainedConfig, tensors: Mapping[str, Tensor], tied: Container[str]) -> PreTrainedModel:
    """The model of a config with tensors of all its parameters, which are not copied.

    Args:
        tied: parameters that share another one's weight; a config may tie more, such as a head with values of its own.
    """
    dtype = next(value.dtype for value in tensors.values() if value.is_floating_point())
    model = without_weights(config, dtype)
    model.load_state_dict(dict(tensors), assign=True)
    ties = tied_weights(model)
    for name in [name for name in ties if name not in tied]:
        del ties[name]
    model.tie_weights(recompute_mapping=False)
    return model
