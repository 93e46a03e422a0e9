"""Language models whose Mamba-2 layers may differ in state size, and may project their state.

A head's decay is one number per token, so the recurrence commutes with any linear map of the state channels. With
matrices T_B and T_C of shape (n, r),

    B'_t = T_B^T B_t    C'_t = T_C^T C_t    H'_t = a_t H'_{t-1} + dt_t x_t B'_t^T    y_t = H'_t C'_t + D x_t

runs on a state of r channels where the stock layer has n, and H'_t = H_t T_B throughout.

A model here is a stock one of transformers whose mixers are replaced by ours once it is built. Blocks, attention,
experts, caches and heads are therefore the family's own.

Shape letters: b batch, l length, g group, h head, p head dim, n state size, r projected state size.

Saved models carry a copy of this file: it imports nothing but PyTorch, transformers and its configurations.
"""

import copy
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BambaForCausalLM,
    BambaModel,
    FalconH1ForCausalLM,
    FalconH1Model,
    GraniteMoeHybridForCausalLM,
    GraniteMoeHybridModel,
    Mamba2ForCausalLM,
    Mamba2Model,
    NemotronHForCausalLM,
    NemotronHModel,
    PreTrainedModel,
    Zamba2ForCausalLM,
    Zamba2Model,
)
from transformers import initialization as init
from transformers.integrations.accelerate import force_accelerate_hooks
from transformers.models.falcon_h1.modeling_falcon_h1 import compute_mup_vector
from transformers.models.mamba2.modeling_mamba2 import (
    apply_mask_to_padding_states,
    causal_conv1d_fn,
    causal_conv1d_update,
    mamba2_chunk_scan,
    mamba2_selective_state_update,
)

from .configuration_ghost import (
    GhostBambaConfig,
    GhostConfig,
    GhostFalconH1Config,
    GhostGraniteMoeHybridConfig,
    GhostMamba2Config,
    GhostNemotronHConfig,
    GhostZamba2Config,
)


def project(stream: Tensor, projection: Tensor) -> Tensor:
    """B or C in the basis of the smaller state.

    Args:
        stream: (b, l, g, n).
        projection: (g, n, r).

    Returns:
        (b, l, g, r).
    """
    return torch.einsum("blgn,gnr->blgr", stream, projection)


class GhostMixer(nn.Module):
    """What is put before a family's own mixer class: its layer's sizes, and a projection.

    Attributes:
        ssm_state_size: n, the width of each group's B and C in in_proj and conv1d.
        projected_state_size: r, or None in a layer without projection, which is then a stock mixer.
        B_projection, C_projection: (g, n, r) in the model's dtype, or None.
        state_tiers: the layer's in the config, for whoever stores the state.
    """

    B_projection: Any
    C_projection: Any
    # Of the stock mixer.
    num_heads: int
    head_dim: int
    n_groups: int
    ssm_state_size: int
    intermediate_size: int
    conv_dim: int
    conv_kernel_size: int
    layer_idx: int
    chunk_size: int
    activation: str
    time_step_limit: tuple[float, float]
    in_proj: nn.Linear
    conv1d: nn.Conv1d
    norm: nn.Module
    out_proj: nn.Linear
    dt_bias: nn.Parameter
    A_log: nn.Parameter
    D: nn.Parameter
    mup_vector: Tensor
    ssm_in_multiplier: float

    def __init__(self, config: GhostConfig, layer_idx: int):
        super().__init__(_layer_config(config, config.state_size_of(layer_idx)), layer_idx)
        self.projected_state_size = config.projected_state_size_of(layer_idx)
        self.state_tiers = config.state_tiers_of(layer_idx)
        for name in ("B_projection", "C_projection"):
            projection = None
            if self.projected_state_size is not None:
                projection = nn.Parameter(torch.empty(self.n_groups, self.ssm_state_size, self.projected_state_size))
            self.register_parameter(name, projection)

    @torch.no_grad()
    def init_projections(self) -> None:
        """Keep the first r channels of every group."""
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

        hidden_states = apply_mask_to_padding_states(hidden_states, attention_mask)
        if hasattr(self, "mup_vector"):
            projected = self.in_proj(hidden_states * self.ssm_in_multiplier) * self.mup_vector
        else:
            projected = self.in_proj(hidden_states)
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
        y = y.flatten(-2)
        normed = y * F.silu(gate) if isinstance(self.norm, nn.Identity) else self.norm(y, gate)
        contextualized: Tensor = self.out_proj(normed.to(dtype))
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


def _layer_config(config: GhostConfig, state_size: int) -> GhostConfig:
    """The config that a stock mixer of another state size reads."""
    layer_config = copy.copy(config)
    setattr(layer_config, config.size_keys["state_size"], state_size)
    return layer_config


@cache
def _mixer_class(stock: Any) -> Any:
    return type(f"Ghost{stock.__name__}", (GhostMixer, stock), {"__module__": __name__})


def _replace_mixers(model: nn.Module, config: GhostConfig) -> None:
    """Put our mixers in the place of a stock model's."""
    for parent in list(model.modules()):
        for name, stock in list(parent.named_children()):
            if not hasattr(stock, "A_log"):  # only a state space has one
                continue
            index: Any = stock.layer_idx
            if not config.state_size_of(index):
                raise ValueError(
                    f"state_sizes[{index}] is 0, but layer {index} has a Mamba-2 mixer; expected at least 1."
                )
            kind: Any = type(stock)
            mixer: Any = _mixer_class(kind)(config, index)
            if hasattr(stock, "mup_vector"):  # Falcon-H1
                multipliers = compute_mup_vector(_layer_config(config, mixer.ssm_state_size))
                mixer.register_buffer("mup_vector", multipliers, persistent=False)
            setattr(parent, name, mixer)


class GhostPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What is put before a family's own model classes."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, FalconH1Model):  # the stock class would give all mixers multipliers of one length
            return
        super()._init_weights(module)
        if isinstance(module, GhostMixer):
            module.init_projections()
            if hasattr(module, "mup_vector"):
                config = _layer_config(self.config, module.ssm_state_size)
                init.copy_(module.mup_vector, compute_mup_vector(config))


class GhostModel(GhostPreTrainedModel):
    """A family's model without a head, with our mixers."""

    def __init__(self, config: GhostConfig):
        super().__init__(config)
        _replace_mixers(self, config)
        self.post_init()


class GhostForCausalLM(GhostPreTrainedModel):
    """A family's model with a language modelling head around a `GhostModel`; ``generate`` is the family's own."""

    headless: ClassVar[type[GhostModel]]

    def __init__(self, config: GhostConfig):
        super().__init__(config)
        setattr(self, self.base_model_prefix, self.headless(config))
        self.post_init()


class GhostMamba2Model(GhostModel, Mamba2Model):  # type: ignore[misc]
    config_class = GhostMamba2Config


class GhostMamba2ForCausalLM(GhostForCausalLM, Mamba2ForCausalLM):  # type: ignore[misc]
    config_class, headless = GhostMamba2Config, GhostMamba2Model


class GhostBambaModel(GhostModel, BambaModel):  # type: ignore[misc]
    config_class = GhostBambaConfig


class GhostBambaForCausalLM(GhostForCausalLM, BambaForCausalLM):  # type: ignore[misc]
    config_class, headless = GhostBambaConfig, GhostBambaModel


class GhostFalconH1Model(GhostModel, FalconH1Model):  # type: ignore[misc]
    config_class = GhostFalconH1Config


class GhostFalconH1ForCausalLM(GhostForCausalLM, FalconH1ForCausalLM):  # type: ignore[misc]
    config_class, headless = GhostFalconH1Config, GhostFalconH1Model


class GhostGraniteMoeHybridModel(GhostModel, GraniteMoeHybridModel):  # type: ignore[misc]
    config_class = GhostGraniteMoeHybridConfig


class GhostGraniteMoeHybridForCausalLM(GhostForCausalLM, GraniteMoeHybridForCausalLM):  # type: ignore[misc]
    config_class, headless = GhostGraniteMoeHybridConfig, GhostGraniteMoeHybridModel


class GhostNemotronHModel(GhostModel, NemotronHModel):  # type: ignore[misc]
    config_class = GhostNemotronHConfig


class GhostNemotronHForCausalLM(GhostForCausalLM, NemotronHForCausalLM):  # type: ignore[misc]
    config_class, headless = GhostNemotronHConfig, GhostNemotronHModel


class GhostZamba2Model(GhostModel, Zamba2Model):  # type: ignore[misc]
    config_class = GhostZamba2Config


class GhostZamba2ForCausalLM(GhostForCausalLM, Zamba2ForCausalLM):  # type: ignore[misc]
    config_class, headless = GhostZamba2Config, GhostZamba2Model
