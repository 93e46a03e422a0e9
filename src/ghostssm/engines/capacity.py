"""How many sequences a GPU's memory holds while they are decoded: arithmetic on a config, no weights needed.

A `Footprint` is what a model takes. An `Admission` is how many sequences an engine takes at once, by its own rules for
caches. The memory is what an engine may use for weights and caches: by default vLLM takes 0.92 of a GPU and SGLang
somewhat less. Activations and workspace come off it as well, and are left out here.
"""

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


_VLLM_STEP = 16


_SGLANG_RATIO = 0.9


@dataclass(frozen=True)
class Footprint:
    """Bytes of a model that is being decoded.

    Left out: activations and workspace, what an engine keeps for itself, and what paging wastes, which
    an `Admission` counts for each engine. It is for seeing how the sum changes with the state size.

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


@dataclass(frozen=True)
class Admission:
    """What fits.

    Attributes:
        sequences: of the footprint's context; a fraction where memory is paged, as engines report it.
        block_tokens: tokens of a page of keys and values; 0 where there are none, or no pages.
        page: bytes of a page, or of one sequence's state where there are no pages.
    """

    sequences: float
    block_tokens: int
    page: int
    context: int

    @property
    def tokens(self) -> int:
        """Of all the sequences."""
        return int(self.sequences * self.context)


def by_sum(footprint: Footprint, memory: int) -> Admission:
    """Of engines that allocate what a sequence takes and no more: transformers, mamba_ssm, mlx-lm."""
    return Admission(footprint.sequences(memory), 0, footprint.state + footprint.conv, footprint.context)


def in_llama_cpp(footprint: Footprint, memory: int) -> Admission:
    """llama.cpp: convolution windows in float32 too, without the newest input (llama-hparams.cpp, `n_embd_r`)."""
    recurrent = footprint.state + 2 * _window(footprint)
    sequences = max(0, memory - footprint.weights) // (recurrent + footprint.cache)
    return Admission(sequences, 0, recurrent, footprint.context)


def in_vllm(footprint: Footprint, memory: int, *, prefix_caching: bool = True) -> Admission:
    """vLLM: one page size for all layers of a hybrid.

    The attention layers' blocks are grown, in steps of 16 tokens, until a page holds a mixer's state
    (`Platform._align_hybrid_block_size`). Layers are put into groups of equal size, as large as the smaller kind has
    layers, or as the larger kind where that has less than half as many again
    (`_get_kv_cache_groups_uniform_page_size`). A block is a page in every layer of a group, all groups draw from one
    pool, and a sequence needs whole blocks: its context in attention groups, two states in each group of mixers with
    prefix caching, one without (`get_max_concurrency_for_kv_cache_config`). A model without attention has no prefix
    caching there, and one group.

    Args:
        prefix_caching: as by default; False is ``--no-enable-prefix-caching``.
    """
    available, mixer = max(0, memory - footprint.weights), (footprint.state + _window(footprint)) // footprint.mixers
    if not footprint.attention_layers:
        return Admission(available // (mixer * footprint.mixers), 0, mixer, footprint.context)
    token = footprint.token // footprint.attention_layers
    block_tokens = _VLLM_STEP * _ceil(mixer, _VLLM_STEP * token)
    page = block_tokens * token
    fewer, more = sorted((footprint.attention_layers, footprint.mixers))
    group = more if more < 1.5 * fewer else fewer
    blocks = available // (group * page)
    of_attention = _ceil(footprint.attention_layers, group) * _ceil(footprint.context, block_tokens)
    of_mixers = _ceil(footprint.mixers, group) * (2 if prefix_caching else 1)
    return Admission(blocks / (of_attention + of_mixers), block_tokens, page, footprint.context)


def in_sglang(footprint: Footprint, memory: int) -> Admission:
    """SGLang: two pools, of states and of tokens, 0.9 to 1 (``--mamba-full-memory-ratio``).

    One state is padding (`_handle_max_mamba_cache`). A sequence reserves three, because prefixes are cached, and two
    more in a hybrid, whose buffer overlaps with computation (`_calculate_mamba_ratio`; ``--disable-radix-cache`` makes
    it one).
    """
    available, state = max(0, memory - footprint.weights), footprint.state + _window(footprint)
    slots = max(0, int(available * _SGLANG_RATIO / (1 + _SGLANG_RATIO)) // state - 1)
    if not footprint.token:
        return Admission(slots // 3, 0, state, footprint.context)
    tokens = max(0, available - (slots + 1) * state) // footprint.token
    return Admission(min(slots // 5, tokens / footprint.context), 1, state, footprint.context)


def _window(footprint: Footprint) -> int:
    """Bytes of convolution windows without the newest input."""
    return footprint.conv * (footprint.taps - 1) // footprint.taps


def _ceil(count: int, size: int) -> int:
    return -(-count // size)
