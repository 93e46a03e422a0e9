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
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ghostssm.errors import InputError
from ghostssm.models.families import mixers_of
from ghostssm.models.mixer import Mixer, mixer_output, split_streams
from ghostssm.ops.decode import StepWeights, block_norm, decode_step_, norm_step
from ghostssm.ops.ssd import ssd
from ghostssm.ops.step import at_least_float32

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Forward = Callable[..., Tensor]
"""Called with a mixer view, then as the mixer's own forward."""
_SEVERAL_SEQUENCES = ("seq_idx", "cu_seqlens")
"""Arguments that say that a row holds several sequences, one after the other."""


def accelerate(model: PreTrainedModel, *, state_dtype: torch.dtype = torch.float32) -> None:
    """Give every Mamba-2 mixer of a model the faster forward; a no-op where it has it already.

    Args:
        model: of transformers, dense or pruned; changed in place.
        state_dtype: of the recurrent state in the cache, float32 or bfloat16. bfloat16 halves the state's traffic and
            rounds it once per token.

    Raises:
        InputError: another state dtype.
        ModelError: the model has no Mamba-2 mixers that ghostssm knows.
    """
    if state_dtype not in (torch.float32, torch.bfloat16):
        raise InputError(f"The state dtype is {state_dtype}; expected torch.float32 or torch.bfloat16.")
    for mixer in mixers_of(model):
        _replace(mixer, partial(fast_forward, state_dtype=state_dtype))
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
    state_dtype: torch.dtype = torch.float32,
    **_: Any,
) -> Tensor:
    """A mixer's forward pass with transformers' cache and padding mask.

    Args:
        hidden_states: (b, l, hidden_size).
        cache_params: transformers' cache, updated in place; None for none.
        attention_mask: (b, l), 0 where a position is padding; None for none.
    """
    layer = mixer.layer_index
    conv_window = None if cache_params is None else cache_params.get_conv_state(layer, state_idx=0)
    state = None if cache_params is None else cache_params.get_recurrent_state(layer, state_idx=0)
    if attention_mask is not None:
        hidden_states = hidden_states * attention_mask[..., None].to(hidden_states.dtype)
    z, xBC, dt = mixer.project_in(hidden_states)

    one_token = hidden_states.shape[1] == 1 and attention_mask is None
    if one_token and state is not None and conv_window is not None and not cache_params.is_recording_past(layer):
        return _decode_step(mixer, xBC[:, 0], dt[:, 0], z[:, 0], conv_window, state)[:, None]

    context = xBC
    if cache_params is not None:
        context = cache_params.update_conv_state(
            xBC.transpose(1, 2), layer, conv_kernel_size=mixer.layout.conv_kernel
        ).transpose(1, 2)
    s = split_streams(mixer, context, dt, z, attention_mask)
    y, final_state = ssd(s.x, s.dt, mixer.A, s.B, s.C, at_least_float32(mixer.D), state)
    if cache_params is not None:
        # Dense, as the kernels of the decode step want it; chunks leave it transposed.
        cache_params.update_recurrent_state(final_state.to(state_dtype).contiguous(), layer_idx=layer)
    return mixer_output(mixer, y, z)


def _decode_step(mixer: Mixer, xBC: Tensor, dt: Tensor, z: Tensor, conv_window: Tensor, state: Tensor) -> Tensor:
    """The mixer's output (b, hidden_size) for one token; both states are updated in place."""
    norm, dtype = mixer.norm, mixer.out_proj.weight.dtype
    y = decode_step_(conv_window, state, xBC, dt, z if norm is None else None, _step_weights(mixer))
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
        B_maps=None if projection is None else projection.B,
        C_maps=None if projection is None else projection.C,
    )
