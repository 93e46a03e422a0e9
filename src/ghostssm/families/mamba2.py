"""Pure Mamba-2 language models: transformers' ``Mamba2ForCausalLM``."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from ghostssm.families.base import register
from ghostssm.layout import SSDLayout
from ghostssm.mixer import Mixer


class Mamba2Family:
    model_type = "mamba2"

    def layout(self, config: PreTrainedConfig) -> SSDLayout:
        return SSDLayout(
            hidden_size=config.hidden_size,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            n_groups=config.n_groups,
            state_size=config.state_size,
            conv_kernel=config.conv_kernel,
        )

    def set_state_size(self, config: PreTrainedConfig, state_size: int) -> None:
        config.state_size = state_size

    def serving_keys(self, config: PreTrainedConfig) -> dict[str, Any]:
        """What SGLang and mlx-lm read and transformers' Mamba2Config does not have."""
        return {"intermediate_size": self.layout(config).intermediate_size, "rms_norm": True}

    def resize(self, module: nn.Module, layout: SSDLayout) -> None:
        mixer: Any = module
        mixer.ssm_state_size = layout.state_size
        mixer.conv_dim = layout.conv_dim

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        backbone: Any = model.backbone
        return list(backbone.layers)

    def mixer(self, config: PreTrainedConfig, block: nn.Module, index: int) -> Mixer:
        module: Any = block.mixer
        low, high = config.time_step_limit
        return Mixer(
            name=f"backbone.layers.{index}.mixer",
            layer_index=index,
            module=module,
            layout=self.layout(config),
            in_proj=module.in_proj,
            conv1d=module.conv1d,
            dt_bias=module.dt_bias,
            A_log=module.A_log,
            D=module.D,
            norm_weight=module.norm.weight,
            norm_eps=module.norm.variance_epsilon,
            out_proj=module.out_proj,
            dt_limit=(float(low), float(high)),
        )


register(Mamba2Family())
