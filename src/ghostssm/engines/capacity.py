"""How many sequences a GPU's memory holds while they are decoded: arithmetic on a config, no weights needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ghostssm.models.layout import SSDLayout
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

    Left out: activations and workspace, what an engine keeps for itself, and what paging wastes. vLLM, for example,
    leaves a tenth of the memory alone and pads the pages of a hybrid's attention layers to the size of a mixer's
    state. So real counts are lower; how they change with the state size is what the sum is for.

    Attributes:
        weights: once. state: recurrent state of one sequence, all layers. conv: windows of its convolutions.
        cache: keys and values of its context in a hybrid's attention layers.
    """

    weights: int
    state: int
    conv: int
    cache: int

    @property
    def sequence(self) -> int:
        """Bytes that one more sequence takes."""
        return self.state + self.conv + self.cache

    def sequences(self, memory: int) -> int:
        """How many sequences so many bytes hold beside the weights; 0 where not even these fit."""
        return max(0, memory - self.weights) // self.sequence


def footprint(
    layout: SSDLayout,
    state_sizes: Sequence[int],
    parameters: int,
    config: PreTrainedConfig,
    context: int = DEFAULT_CONTEXT,
    *,
    number_bytes: int = 2,
    state_number_bytes: float = 4,
) -> Footprint:
    """Of a model with mixers of these state sizes.

    Args:
        layout: of the widest mixer; the convolutions of all are counted as wide.
        parameters: numbers in the weights.
        context: tokens whose keys and values a sequence keeps.
        number_bytes: of a number in weights, convolution windows, keys and values. state_number_bytes: in the state.
    """
    return Footprint(
        weights=parameters * number_bytes,
        state=round(sum(state_sizes) * layout.intermediate_size * state_number_bytes),
        conv=len(state_sizes) * layout.conv_state_numbers * number_bytes,
        cache=context * cached_numbers(config) * number_bytes,
    )


def cached_numbers(config: PreTrainedConfig) -> int:
    """Numbers in the keys and values of one token, over all attention layers; 0 where there are none."""
    layers = sum(kind in _ATTENTION for kind in getattr(config, "layer_types", None) or ())
    if not layers:
        return 0
    head_dim = next(
        (size for name in ("attention_head_dim", "head_dim") if (size := getattr(config, name, None))),
        config.hidden_size // config.num_attention_heads,
    )
    return int(2 * layers * config.num_key_value_heads * head_dim)


def capacity_cells(footprints: Mapping[str, Footprint], memories: Sequence[int]) -> tuple[list[str], list[list[str]]]:
    """Headers and lines of a table: what each takes, and how many sequences each memory (bytes) holds.

    Args:
        footprints: by what their lines begin with, a state size.
    """
    cached = any(each.cache for each in footprints.values())
    headers = ["N'", "weights", "state/seq", "conv/seq", *["keys, values/seq"] * cached]
    headers += [f"sequences in {memory / 2**30:g} GiB" for memory in memories]
    return headers, [
        [
            label,
            *(bytes_text(count) for count in (each.weights, each.state, each.conv, *[each.cache] * cached)),
            *(f"{each.sequences(memory):,}" for memory in memories),
        ]
        for label, each in footprints.items()
    ]
