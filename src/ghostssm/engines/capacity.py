"""How many sequences a GPU's memory holds while they are decoded: arithmetic on a config, no weights needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ghostssm.models.layout import SSDLayout
from ghostssm.ops.state_format import FLOAT32, StateFormat, Tiers
from ghostssm.units import bytes_text

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

DEFAULT_CONTEXT = 8192
"""Tokens of context at which keys and values are counted."""
_ATTENTION = frozenset({"full_attention", "hybrid"})
"""What transformers calls a layer that keeps keys and values, alone or beside a mixer."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of a model that is being decoded.

    Left out: activations and workspace, what an engine keeps for itself, and what paging wastes, which
    `ghostssm.engines.admission` counts for each engine. How the sum changes with the state size is what it is for.

    Attributes:
        weights: once. state: recurrent state of one sequence, all mixers. conv: inputs of its convolutions.
        mixers: how many. taps: inputs of a convolution, of which some engines keep all but the newest.
        token: keys and values of one token, all attention layers. attention_layers: how many.
        context: tokens of a sequence.
    """

    weights: int
    state: int
    conv: int
    mixers: int
    taps: int
    token: int
    attention_layers: int
    context: int

    @property
    def cache(self) -> int:
        """Keys and values of one sequence."""
        return self.context * self.token

    @property
    def sequence(self) -> int:
        """Bytes that one more sequence takes."""
        return self.state + self.conv + self.cache

    @property
    def state_share(self) -> float:
        """The recurrent state's part of what a sequence takes."""
        return self.state / self.sequence

    def sequences(self, memory: int) -> int:
        """How many sequences so many bytes hold beside the weights; 0 where not even these fit."""
        return max(0, memory - self.weights) // self.sequence


def footprint(
    layout: SSDLayout,
    state_sizes: Sequence[int],
    parameters: int,
    config: PreTrainedConfig,
    context: int = DEFAULT_CONTEXT,
    form: StateFormat = FLOAT32,
    tiers: Sequence[Tiers] = (),
    *,
    number_bytes: int = 2,
) -> Footprint:
    """Of a model with mixers of these state sizes.

    Args:
        layout: of the widest mixer; the convolutions of all are counted as wide.
        parameters: numbers in the weights.
        context: tokens whose keys and values a sequence keeps.
        form: of the state, scales included. tiers: of the mixers, where the model says them.
        number_bytes: of a number in weights, convolution windows, keys and values.
    """
    layers, numbers = attention_shape(config)
    return Footprint(
        weights=parameters * number_bytes,
        state=form.model_bytes(layout.intermediate_size, state_sizes, tiers),
        conv=len(state_sizes) * layout.conv_state_numbers * number_bytes,
        mixers=len(state_sizes),
        taps=layout.conv_kernel,
        token=layers * numbers * number_bytes,
        attention_layers=layers,
        context=context,
    )


def attention_shape(config: PreTrainedConfig) -> tuple[int, int]:
    """How many layers keep keys and values, and the numbers that one of them keeps of a token."""
    layers = sum(kind in _ATTENTION for kind in getattr(config, "layer_types", None) or ())
    if not layers:
        return 0, 0
    head_dim = next(
        (size for name in ("attention_head_dim", "head_dim") if (size := getattr(config, name, None))),
        config.hidden_size // config.num_attention_heads,
    )
    return layers, 2 * int(config.num_key_value_heads) * int(head_dim)


def capacity_cells(footprints: Mapping[str, Footprint]) -> tuple[list[str], list[list[str]]]:
    """Headers and lines of a table: what the weights and each sequence take.

    Args:
        footprints: by what their lines begin with, a state size.
    """
    cached = any(each.cache for each in footprints.values())
    return ["N'", "weights", "state/seq", "conv/seq", *["keys, values/seq"] * cached], [
        [label, *map(bytes_text, (each.weights, each.state, each.conv, *[each.cache] * cached))]
        for label, each in footprints.items()
    ]
