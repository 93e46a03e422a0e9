"""How many sequences each engine takes at once: its own rules for caches, as arithmetic on a footprint.

The memory is what an engine may use for weights and caches: by default vLLM takes 0.92 of a GPU and SGLang somewhat
less. Activations and workspace come off it as well, and are left out here.
"""

from __future__ import annotations

from dataclasses import dataclass

from ghostssm.engines.capacity import Footprint


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


_VLLM_STEP = 16
_SGLANG_RATIO = 0.9


def _window(footprint: Footprint) -> int:
    """Bytes of convolution windows without the newest input."""
    return footprint.conv * (footprint.taps - 1) // footprint.taps


def _ceil(count: int, size: int) -> int:
    return -(-count // size)
