"""What the rest of the project needs to know of a model family.

A family is a few names: what its config calls the sizes of a mixer, where its blocks are, and where in a block a mixer
may be. All else is read from the mixer modules, which have the same parts under the same names in every family. A
module without one of them is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ghostssm.errors import ModelError
from ghostssm.models.families import published
from ghostssm.models.layout import SSDLayout
from ghostssm.models.mixer import Mixer, Norm

_PARTS = ("in_proj", "conv1d", "dt_bias", "A_log", "D", "norm", "out_proj", "time_step_limit", "activation")
_SIZES = ("num_heads", "head_dim", "n_groups", "ssm_state_size", "conv_kernel_size")
_MULTIPLIERS = "mup_vector"
"""Falcon-H1's buffer of one multiplier per row of in_proj; all rows of z, of x, of B, of C, of dt have the same."""


@dataclass(frozen=True)
class ConfigKeys:
    """What a family's config calls the sizes of its mixers."""

    num_heads: str = "mamba_n_heads"
    head_dim: str = "mamba_d_head"
    n_groups: str = "mamba_n_groups"
    state_size: str = "mamba_d_state"
    conv_kernel: str = "mamba_d_conv"


@dataclass(frozen=True)
class Family:
    """One model family. Only families know transformers' class and config names.

    Attributes:
        model_type: as config.json has it.
        keys: what its config calls the sizes of a mixer.
        blocks_path: dotted path of the residual blocks in the model.
        mixer_paths: where in a block its mixer may be; another kind of layer may be there, or nothing.
        own_keys: what its config.json has in another form than transformers writes.
        cache_argument: the name of the model's argument for its cache, and of the cache in its output.
        is_hybrid: whether layers of other kinds stand between the Mamba-2 ones.
        is_own_class: whether it is our own class, for a projected state or a state size per layer.
        shared_parts: of a config, parts of layers that have their weights from another layer's: from the one's path to
            the other's. Files may hold them more than once.
        unread_layers_keys: the config's keys for layers that transformers' class leaves in the files. The first counts
            these layers; transformers' config works out the others, for other engines. Empty without such layers.
    """

    model_type: str
    keys: ConfigKeys = ConfigKeys()
    blocks_path: str = "model.layers"
    mixer_paths: tuple[str, ...] = ("mamba",)
    own_keys: published.OwnKeys = lambda config: {}
    cache_argument: str = "past_key_values"
    is_hybrid: bool = True
    is_own_class: bool = False
    shared_parts: Callable[[PreTrainedConfig], Mapping[str, str]] = lambda config: {}
    unread_layers_keys: tuple[str, ...] = ()

    def layout(self, config: PreTrainedConfig) -> SSDLayout:
        """The sizes of the family's mixers, from a config alone; raises ModelError for a config without them."""
        missing = [key for key in ("hidden_size", *vars(self.keys).values()) if not hasattr(config, key)]
        if missing:
            raise self._unknown_version(f"the config has no {', '.join(missing)}")
        sizes = {size: getattr(config, key) for size, key in vars(self.keys).items()}
        return SSDLayout(hidden_size=config.hidden_size, **sizes)

    def set_state_size(self, config: PreTrainedConfig, state_size: int) -> None:
        """Write a new state size into a config."""
        setattr(config, self.keys.state_size, state_size)

    @torch.inference_mode(False)  # a buffer that inference mode made would stop gradients
    def resize(self, module: nn.Module, layout: SSDLayout) -> None:
        """Set the sizes that a mixer module keeps beside its tensors."""
        mixer: Any = module
        multipliers = getattr(mixer, _MULTIPLIERS, None)
        if multipliers is not None:
            setattr(mixer, _MULTIPLIERS, _resized(multipliers, _layout_of(mixer), layout))
        mixer.ssm_state_size = layout.state_size
        mixer.conv_dim = layout.conv_dim
        if hasattr(mixer, "groups_time_state_size"):
            mixer.groups_time_state_size = layout.group_width

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The residual blocks of a model, front to back, with or without a mixer; raises ModelError if it has none."""
        blocks = _find(model, self.blocks_path)
        if not isinstance(blocks, nn.ModuleList):
            raise self._unknown_version(f"{type(model).__name__} has no blocks at {self.blocks_path}")
        return list(blocks)

    def mixer(self, block: nn.Module, index: int) -> Mixer | None:
        """The Mamba-2 mixer of block number ``index``, if it has one; raises ModelError for one of an unknown kind."""
        for path in self.mixer_paths:
            module = _find(block, path)
            if hasattr(module, "A_log"):  # only a state space has one
                return self._view(module, f"{self.blocks_path}.{index}.{path}", index)
        return None

    def _view(self, module: Any, name: str, index: int) -> Mixer:
        missing = [part for part in (*_PARTS, *_SIZES) if not hasattr(module, part)]
        if missing:
            raise self._unknown_version(f"{type(module).__name__} has no {', '.join(missing)}")
        layout = _layout_of(module)
        rows = {"in_proj": module.in_proj.out_features, "conv1d": module.conv1d.out_channels}
        expected = {"in_proj": layout.in_proj_rows, "conv1d": layout.conv_dim}
        if rows != expected:
            raise self._unknown_version(f"{name} has {rows} rows, where its sizes imply {expected}")
        if module.activation not in ("silu", "swish"):
            raise ModelError(
                f"The activation of {name} is {module.activation!r}; expected 'silu', as every published Mamba-2 has."
            )
        limits = module.time_step_limit
        if not isinstance(limits, (tuple, list)) or len(limits) != 2:
            raise self._unknown_version(f"the time_step_limit of {name} is {limits!r}, not a lower and an upper bound")
        multipliers = getattr(module, _MULTIPLIERS, None)
        return Mixer(
            name=name,
            layer_index=index,
            module=module,
            layout=layout,
            in_proj=module.in_proj,
            conv1d=module.conv1d,
            dt_bias=module.dt_bias,
            A_log=module.A_log,
            D=module.D,
            norm=self._norm(module.norm),
            out_proj=module.out_proj,
            dt_limit=(float(limits[0]), float(limits[1])),
            input_multiplier=getattr(module, "ssm_in_multiplier", 1.0),
            row_multipliers=None if multipliers is None else multipliers.flatten(),
        )

    def _norm(self, norm: Any) -> Norm | None:
        if isinstance(norm, nn.Identity):  # a mixer that has none gates by itself
            return None
        if not hasattr(norm, "weight") or not hasattr(norm, "variance_epsilon"):
            raise self._unknown_version(f"{type(norm).__name__} has no weight and variance_epsilon")
        return Norm(norm.weight, norm.variance_epsilon, gate_first=not getattr(norm, "norm_before_gate", False))

    def _unknown_version(self, fault: str) -> ModelError:
        return ModelError(
            f"This is no {self.model_type} model that ghostssm knows: {fault}. Expected a causal language model as "
            f"transformers 5.23 has it; installed is transformers {transformers.__version__}."
        )


def _find(module: nn.Module, path: str) -> Any:
    """What is at a dotted path, or None."""
    part: Any = module
    for name in path.split("."):
        part = getattr(part, name, None)
    return part


def _layout_of(mixer: Any) -> SSDLayout:
    """The sizes that a mixer module keeps beside its tensors."""
    return SSDLayout(
        hidden_size=mixer.in_proj.in_features,
        num_heads=mixer.num_heads,
        head_dim=mixer.head_dim,
        n_groups=mixer.n_groups,
        state_size=mixer.ssm_state_size,
        conv_kernel=mixer.conv_kernel_size,
    )


def _resized(multipliers: Tensor, old: SSDLayout, new: SSDLayout) -> Tensor:
    """(..., in_proj_rows) of the old sizes to the new ones, from the one value that each part has."""
    parts = multipliers.split(list(old.in_proj_sizes), dim=-1)
    sized = (part[..., :1].expand(*part.shape[:-1], size) for part, size in zip(parts, new.in_proj_sizes, strict=True))
    return torch.cat(list(sized), dim=-1)
