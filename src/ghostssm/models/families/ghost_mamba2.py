"""Mamba-2 with projected states or a state size per layer: our own class, ``GhostMamba2ForCausalLM``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Mamba2Config, PreTrainedConfig

from ghostssm.models.families.base import register
from ghostssm.models.families.stock import MAMBA2, StockFamily
from ghostssm.models.layout import SSDLayout
from ghostssm.models.mixer import Mixer, Projection
from ghostssm.models.own_class import GhostMamba2Config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class GhostMamba2Family(StockFamily):
    """Found as in a stock Mamba-2; its mixers differ in size and may project their state."""

    def layout(self, config: PreTrainedConfig) -> SSDLayout:
        """The sizes of the widest layer."""
        sizes = [config.state_size_of(index) for index in range(config.num_hidden_layers)]
        return super().layout(config).with_state_size(max(sizes))

    def set_state_size(self, config: PreTrainedConfig, state_size: int) -> None:
        """The same in every layer, and not projected."""
        super().set_state_size(config, state_size)
        config.state_sizes = config.projected_state_sizes = None

    def mixer(self, block: nn.Module, index: int) -> Mixer | None:
        stock = super().mixer(block, index)
        if stock is None:
            return None
        module: Any = stock.module
        projected = module.B_projection is not None
        return replace(stock, projection=Projection(module.B_projection, module.C_projection) if projected else None)


register(GhostMamba2Family(**vars(MAMBA2) | {"model_type": GhostMamba2Config.model_type, "is_own_class": True}))

_OWN_KEYS = ("state_sizes", "projected_state_sizes")


def projected_model(
    config: PreTrainedConfig,
    tensors: Mapping[str, Tensor],
    state_sizes: Sequence[int],
    projected_state_sizes: Sequence[int] | None,
) -> PreTrainedModel:
    """A model of our own class from a stock model's config and the tensors of all its layers, which are not copied.

    Args:
        tensors: the whole state dict, sliced, with ``B_projection`` and ``C_projection`` in every projected mixer.
        state_sizes: of every layer, the width of its B and C. projected_state_sizes: of every layer, 0 for none.
    """
    from ghostssm.models.own_class.classes import GhostMamba2ForCausalLM

    values = config.to_dict()
    for key in ("model_type", "architectures", "transformers_version", "layer_types"):
        values.pop(key, None)
    own = GhostMamba2Config(
        **(values | {"state_size": max(state_sizes), "state_sizes": list(state_sizes)}),
        projected_state_sizes=None if projected_state_sizes is None else list(projected_state_sizes),
    )
    with torch.device("meta"):
        model = GhostMamba2ForCausalLM(own)
    model.load_state_dict(dict(tensors), assign=True)
    model.tie_weights()
    return model.eval()


def stock_model(config: PreTrainedConfig, tensors: Mapping[str, Tensor], state_size: int) -> PreTrainedModel:
    """A stock model from a config of our own class and tensors of one size in all layers, which are not copied."""
    from transformers import Mamba2ForCausalLM

    values = config.to_dict()
    for key in (*_OWN_KEYS, "model_type", "architectures", "auto_map", "transformers_version", "layer_types"):
        values.pop(key, None)
    with torch.device("meta"):
        model = Mamba2ForCausalLM(Mamba2Config(**(values | {"state_size": state_size})))
    model.load_state_dict(dict(tensors), assign=True)
    model.tie_weights()
    stock: PreTrainedModel = model.eval()
    return stock
