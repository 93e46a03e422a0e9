"""Stock transformers Mamba-2 models with our prefill and decode step, in place.

    ghostssm.accelerate(model)      # same weights, same outputs, same cache object; only faster
    model.generate(...)
    ghostssm.restore(model)

Each mixer's ``forward`` is replaced on the instance. It follows the stock one step by step, so that ``generate``, left
padding with an attention mask, a cache that is used again, beam search and adapters that are added later work as
before. Rows that hold several sequences, marked by ``seq_idx``, are left to the stock forward. On a GPU the RMS norms
between the blocks run in one kernel instead of six.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ghostssm.models.families import mixers_of
from ghostssm.models.mixer import Mixer, mixer_output, split_streams
from ghostssm.ops.decode import StepWeights, block_norm, decode_step_, norm_step
from ghostssm.ops.state_format import FLOAT32_STORAGE, StateStorage
from ghostssm.ops.step import at_least_float32
from ghostssm.ops.stored import ssd_stored
from ghostssm.ops.straight_through import straight_through_scan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Forward = Callable[..., Tensor]
"""Called with a mixer view, then as the mixer's own forward."""
_SEVERAL_SEQUENCES = ("seq_idx", "cu_seqlens")
"""Arguments that say that a row holds several sequences, one after the other."""
_TOKENS = "ghostssm_tokens"
"""Of a cache's layer: how many tokens it has seen."""


def accelerate(
    model: PreTrainedModel,
    *,
    state_dtype: str | torch.dtype = torch.float32,
    state_rounding: str = "nearest",
    seed: int = 0,
) -> None:
    """Give every Mamba-2 mixer of a model the faster forward; a no-op where it has it already.

    Args:
        model: of transformers, dense or pruned; changed in place.
        state_dtype: of the recurrent state in the cache: float32, bfloat16, float16, int8, fp8 (e4m3) or int4, a torch
            dtype, or tiers for a model that says how many channels it keeps in how many bits. Narrower ones are rounded
            after a prompt and after every token; arithmetic stays float32. The last three, and tiers, have a float32
            scale per head and row of head_dim, and the cache holds bytes.
        state_rounding: ``nearest`` or ``stochastic``.
        seed: of the random numbers of stochastic rounding.

    Raises:
        InputError: another state dtype or rounding, or tiers for a model without them.
        ModelError: the model has no Mamba-2 mixers that ghostssm knows.
    """
    storage = StateStorage.of(state_dtype, state_rounding, seed)
    mixers = mixers_of(model)
    for mixer in mixers:
        storage.with_tiers(mixer.tiers)  # raises
    for mixer in mixers:
        _replace(mixer, partial(fast_forward, storage=storage))
    for norm in _block_norms(model):
        norm.__dict__["forward"] = partial(_norm_forward, norm)


def restore(model: PreTrainedModel) -> None:
    """Take back all that `accelerate` did.

    Args:
        model: that was given to it.
    """
    for module in (*(mixer.module for mixer in mixers_of(model)), *_block_norms(model)):
        module.__dict__.pop("forward", None)


def _block_norms(model: PreTrainedModel) -> list[nn.Module]:
    """The RMS norms of a model that have no gate; transformers has a class of them for every family."""
    return [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]


def _norm_forward(norm: Any, hidden_states: Tensor) -> Tensor:
    fused = block_norm(hidden_states, norm.weight, norm.variance_epsilon)
    return type(norm).forward(norm, hidden_states) if fused is None else fused


def rounded_forward(storage: StateStorage, first_sequence: int = 0) -> Forward:
    """Our forward with a state that is rounded after every token; to gradients, rounding is the identity.

    Args:
        first_sequence: number of the batch's first sequence, by which random numbers are drawn.
    """
    return partial(fast_forward, storage=replace(storage, sequence=first_sequence), every_token=True)


@contextmanager
def replaced_forward(mixers: Sequence[Mixer], forward: Forward | None = None) -> Iterator[None]:
    """Within the context the mixers' modules run ``forward`` (ours, if None); afterwards what they ran before."""
    before = [mixer.module.__dict__.get("forward") for mixer in mixers]
    try:
        for mixer in mixers:
            _replace(mixer, forward or fast_forward)
        yield
    finally:
        for mixer, own in zip(mixers, before, strict=True):
            if own is None:
                mixer.module.__dict__.pop("forward", None)
            else:
                mixer.module.__dict__["forward"] = own


def refresh(model: PreTrainedModel) -> None:
    """Let replaced forwards see the new sizes of a model's mixers, after a change of these."""
    for mixer in mixers_of(model):
        replacement = mixer.module.__dict__.get("forward")
        if isinstance(replacement, _Replacement):
            _replace(mixer, replacement.forward)


@dataclass(frozen=True)
class _Replacement:
    """A mixer's ``forward``: ours, with the view of the mixer that it works on."""

    mixer: Mixer
    forward: Forward

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if any(kwargs.get(name) is not None for name in _SEVERAL_SEQUENCES):
            # Only transformers' kernels keep sequences in one row apart; without them it says so.
            module = self.mixer.module
            return type(module).forward(module, *args, **kwargs)  # type: ignore[no-any-return]
        return self.forward(self.mixer.current(), *args, **kwargs)


def _replace(mixer: Mixer, forward: Forward) -> None:
    mixer.module.__dict__["forward"] = _Replacement(mixer, forward)


def fast_forward(
    mixer: Mixer,
    hidden_states: Tensor,
    cache_params: Any = None,
    attention_mask: Tensor | None = None,
    *,
    storage: StateStorage = FLOAT32_STORAGE,
    every_token: bool = False,
    **_: Any,
) -> Tensor:
    """A mixer's forward pass with transformers' cache and padding mask.

    Args:
        hidden_states: (b, l, hidden_size).
        cache_params: transformers' cache, updated in place; None for none.
        attention_mask: (b, l), 0 where a position is padding; None for none.
        storage: how the state is kept in the cache. every_token: round it after every token of a prompt too, as if
            they came one by one, and not only after the last.
    """
    layer = mixer.layer_index
    conv_window = None if cache_params is None else cache_params.get_conv_state(layer, state_idx=0)
    state = None if cache_params is None else cache_params.get_recurrent_state(layer, state_idx=0)
    if attention_mask is not None:
        hidden_states = hidden_states * attention_mask[..., None].to(hidden_states.dtype)
    z, xBC, dt = mixer.project_in(hidden_states)

    one_token = hidden_states.shape[1] == 1 and attention_mask is None
    storage = storage.at(layer, _counted_tokens(cache_params, layer, hidden_states.shape[1], fresh=state is None))
    storage = storage.with_tiers(mixer.tiers)
    if one_token and state is not None and conv_window is not None and not cache_params.is_recording_past(layer):
        return _decode_step(mixer, xBC[:, 0], dt[:, 0], z[:, 0], conv_window, state, storage)[:, None]

    context = xBC
    if cache_params is not None:
        context = cache_params.update_conv_state(
            xBC.transpose(1, 2), layer, conv_kernel_size=mixer.layout.conv_kernel
        ).transpose(1, 2)
    s = split_streams(mixer, context, dt, z, attention_mask)
    streams = (s.x, s.dt, mixer.A, s.B, s.C, at_least_float32(mixer.D))
    if every_token and storage.rounds and torch.is_grad_enabled() and s.x.requires_grad:
        return mixer_output(mixer, straight_through_scan(storage, *streams), z)
    y, final_state = ssd_stored(*streams, state, storage, every_token=every_token)
    if cache_params is not None:
        cache_params.update_recurrent_state(final_state, layer_idx=layer)
    return mixer_output(mixer, y, z)


def _counted_tokens(cache_params: Any, layer: int, length: int, *, fresh: bool) -> int:
    """How many tokens a cache's layer has seen before these, which it then counts too; random numbers depend on it."""
    if cache_params is None:
        return 0
    cached = cache_params.layers[layer]
    before: int = 0 if fresh else getattr(cached, _TOKENS, 0)
    setattr(cached, _TOKENS, before + length)
    return before


def _decode_step(
    mixer: Mixer, xBC: Tensor, dt: Tensor, z: Tensor, conv_window: Tensor, state: Tensor, storage: StateStorage
) -> Tensor:
    """The mixer's output (b, hidden_size) for one token; both states are updated in place."""
    norm, dtype = mixer.norm, mixer.out_proj.weight.dtype
    y = decode_step_(conv_window, state, xBC, dt, z if norm is None else None, _step_weights(mixer), storage)
    if norm is None:
        y = y.to(dtype)
    else:
        groups = mixer.layout.n_groups
        y = norm_step(y, z, norm.weight, norm.eps, groups, dtype, gate_first=norm.gate_first)
    projected: Tensor = mixer.out_proj(y)
    return projected


def _step_weights(mixer: Mixer) -> StepWeights:
    projection = mixer.projection
    return StepWeights(
        taps=mixer.conv1d.weight.squeeze(1),
        bias=mixer.conv1d.bias,
        dt_bias=mixer.dt_bias,
        A_log=mixer.A_log,
        D=mixer.D,
        groups=mixer.layout.n_groups,
        head_dim=mixer.layout.head_dim,
        B_maps=None if projection is None else projection.B,
        C_maps=None if projection is None else projection.C,
    )
