"""Mamba-2 language models with per-layer state sizes and projected states.

A head's decay is one number per token, so the recurrence commutes with any linear map of the state channels. With
matrices T_B and T_C of shape (n, r),

    B'_t = T_B^T B_t    C'_t = T_C^T C_t    H'_t = a_t H'_{t-1} + dt_t x_t B'_t^T    y_t = H'_t C'_t + D x_t

runs on a state of r channels where the stock layer has n, and H'_t = H_t T_B throughout.

Shape letters: b batch, l length, g group, h head, p head dim, n state size, r projected state size.

Saved models carry a copy of this file: it imports nothing but PyTorch, transformers and its configuration.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.integrations.accelerate import force_accelerate_hooks
from transformers.models.mamba2.modeling_mamba2 import (
    Mamba2Block,
    Mamba2ForCausalLM,
    Mamba2Mixer,
    Mamba2Model,
    Mamba2PreTrainedModel,
    Mamba2RMSNorm,
    apply_mask_to_padding_states,
    causal_conv1d_fn,
    causal_conv1d_update,
    mamba2_chunk_scan,
    mamba2_selective_state_update,
)

from .configuration_ghost_mamba2 import GhostMamba2Config


def project(stream: Tensor, projection: Tensor) -> Tensor:
    """B or C in the basis of the smaller state.

    Args:
        stream: (b, l, g, n).
        projection: (g, n, r).

    Returns:
        (b, l, g, r).
    """
    return torch.einsum("blgn,gnr->blgr", stream, projection)


class GhostMamba2Mixer(Mamba2Mixer):  # type: ignore[misc]
    """A Mamba-2 mixer with its layer's sizes.

    Attributes:
        ssm_state_size: n, the width of each group's B and C in in_proj and conv1d.
        projected_state_size: r, or None in a layer without projection, which is then a stock mixer.
        B_projection, C_projection: (g, n, r) in the model's dtype, or None.
    """

    def __init__(self, config: GhostMamba2Config, layer_idx: int, initialize_mixer_weights: bool = True):
        layer_config = copy.copy(config)
        layer_config.state_size = config.state_size_of(layer_idx)
        super().__init__(layer_config, layer_idx, initialize_mixer_weights=False)
        self.projected_state_size = config.projected_state_size_of(layer_idx)
        for name in ("B_projection", "C_projection"):
            projection = None
            if self.projected_state_size is not None:
                projection = nn.Parameter(torch.empty(self.n_groups, self.ssm_state_size, self.projected_state_size))
            self.register_parameter(name, projection)
        if initialize_mixer_weights and self.dt_bias.device.type != "meta":
            self.init_mamba2_weights()

    @torch.no_grad()
    def init_mamba2_weights(self) -> None:
        """As in the stock mixer; and projections that keep the first r channels of every group."""
        super().init_mamba2_weights()
        for projection in (self.B_projection, self.C_projection):
            if projection is not None:
                identity = torch.eye(*projection.shape[1:], device=projection.device, dtype=projection.dtype)
                init.copy_(projection, identity.expand_as(projection))

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """One layer's mixing of positions, (b, l, hidden_size) to the same.

        Args:
            hidden_states: (b, l, hidden_size), normalised.
            cache_params: transformers' cache, updated in place; its recurrent state is (b, h, p, r), or
                (b, h, p, n) in a layer without projection. None for none.
            attention_mask: (b, l), 0 where a position is padding; None for none.
        """
        forward = super().forward if self.projected_state_size is None else self._projected_forward
        mixed: Tensor = forward(hidden_states, cache_params=cache_params, attention_mask=attention_mask, **kwargs)
        return mixed

    # The convolution's weight is used without calling conv1d, so offloading would not bring it in by itself.
    @force_accelerate_hooks("conv1d")  # type: ignore[untyped-decorator]
    def _projected_forward(
        self, hidden_states: Tensor, cache_params: Any, attention_mask: Tensor | None, **kwargs: Any
    ) -> Tensor:
        dtype, length = hidden_states.dtype, hidden_states.shape[1]
        conv_state, recurrent_state = None, None
        if cache_params is not None:
            # Both before the convolution updates the cache: from then on an empty layer counts as filled.
            conv_state = cache_params.get_conv_state(self.layer_idx, state_idx=0)
            recurrent_state = cache_params.get_recurrent_state(self.layer_idx, state_idx=0)

        projected = self.in_proj(apply_mask_to_padding_states(hidden_states, attention_mask))
        gate, xBC, dt = projected.split([self.intermediate_size, self.conv_dim, self.num_heads], dim=-1)
        xBC = apply_mask_to_padding_states(self._convolve(xBC, conv_state, cache_params, **kwargs), attention_mask)
        group_width = self.n_groups * self.ssm_state_size
        x, B, C = xBC.split([self.intermediate_size, group_width, group_width], dim=-1)
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        B = project(B.unflatten(-1, (self.n_groups, self.ssm_state_size)), self.B_projection)
        C = project(C.unflatten(-1, (self.n_groups, self.ssm_state_size)), self.C_projection)

        if recurrent_state is not None and length == 1:
            y = self._step(recurrent_state, x[:, 0], dt[:, 0], B[:, 0], C[:, 0], **kwargs)[:, None]
        else:
            y = self._scan(recurrent_state, x, dt, B, C, cache_params, **kwargs)
        contextualized: Tensor = self.out_proj(self.norm(y.flatten(-2), gate).to(dtype))
        return contextualized

    def _convolve(self, xBC: Tensor, conv_state: Tensor | None, cache_params: Any, **kwargs: Any) -> Tensor:
        """Convolution and activation, (b, l, conv_dim) to the same; updates the cache's window."""
        length = xBC.shape[1]
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        xBC = xBC.transpose(1, 2)
        convolved: Tensor
        if conv_state is not None and length == 1 and not cache_params.is_recording_past(self.layer_idx):
            convolved = causal_conv1d_update(xBC, conv_state, weight, bias, activation=self.activation)
        else:
            if cache_params is not None:
                xBC = cache_params.update_conv_state(xBC, self.layer_idx, conv_kernel_size=self.conv_kernel_size)
            convolved = causal_conv1d_fn(xBC, weight, bias, activation=self.activation, **kwargs)
        # The cache hands earlier positions along with the new ones.
        return convolved[..., -length:].transpose(1, 2)

    def _step(self, state: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, **kwargs: Any) -> Tensor:
        """y (b, h, p) of one token: x (b, h, p), dt (b, h), B and C (b, g, r); updates ``state`` in place."""
        # Expanded, not copied: the kernel sees by the stride of 0 that all channels of a head share a number.
        y: Tensor = mamba2_selective_state_update(
            state,
            x,
            dt[..., None].expand(-1, -1, self.head_dim),
            -torch.exp(self.A_log.float())[:, None, None].expand(-1, self.head_dim, state.shape[-1]),
            B,
            C,
            self.D[:, None].expand(-1, self.head_dim),
            z=None,
            dt_bias=self.dt_bias[:, None].expand(-1, self.head_dim),
            dt_softplus=True,
            **kwargs,
        )
        return y

    def _scan(
        self, state: Tensor | None, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, cache_params: Any, **kwargs: Any
    ) -> Tensor:
        """y (b, l, h, p): x (b, l, h, p), dt (b, l, h), B and C (b, l, g, r); stores the final state in the cache."""
        scanned = mamba2_chunk_scan(
            x,
            dt,
            -torch.exp(self.A_log.float()),
            B,
            C,
            chunk_size=self.chunk_size,
            D=self.D,
            z=None,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=self.time_step_limit,
            initial_states=state,
            return_final_states=cache_params is not None,
            **kwargs,
        )
        y: Tensor
        if cache_params is None:
            y = scanned
        else:
            y, final_state = scanned
            cache_params.update_recurrent_state(final_state, layer_idx=self.layer_idx)
        return y


class GhostMamba2Block(Mamba2Block):  # type: ignore[misc]
    """A stock residual block around a `GhostMamba2Mixer`."""

    def __init__(self, config: GhostMamba2Config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.mixer = GhostMamba2Mixer(config, layer_idx, initialize_mixer_weights=False)


class GhostMamba2PreTrainedModel(Mamba2PreTrainedModel):  # type: ignore[misc]
    """What both models share: the config class, and that a block is never split over devices."""

    config: GhostMamba2Config
    _no_split_modules = ["GhostMamba2Block"]  # noqa: RUF012  (as in every transformers model)


class GhostMamba2Model(GhostMamba2PreTrainedModel, Mamba2Model):  # type: ignore[misc]
    """Embeddings, blocks and the final norm; ``forward`` is ``Mamba2Model``'s."""

    def __init__(self, config: GhostMamba2Config):
        super(Mamba2Model, self).__init__(config)  # past Mamba2Model, which would build stock blocks of one size
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(GhostMamba2Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm_f = Mamba2RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self._register_load_state_dict_pre_hook(self.load_hook)
        self.post_init()


class GhostMamba2ForCausalLM(GhostMamba2PreTrainedModel, Mamba2ForCausalLM):  # type: ignore[misc]
    """The model with a language modeling head; ``forward`` and ``generate`` are ``Mamba2ForCausalLM``'s."""

    def __init__(self, config: GhostMamba2Config):
        super(Mamba2ForCausalLM, self).__init__(config)  # past Mamba2ForCausalLM, which would build a stock backbone
        self.backbone = GhostMamba2Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


__all__ = [
    "GhostMamba2Block",
    "GhostMamba2ForCausalLM",
    "GhostMamba2Mixer",
    "GhostMamba2Model",
    "GhostMamba2PreTrainedModel",
]
