"""Small models of every family, with random weights and no term of a mixer that is trivial."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from ghostssm.models.families import family_of, mixers_of
from ghostssm.ops import compiled
from tests.conftest import VOCABULARY

_COMMON = {"vocab_size": VOCABULARY, "hidden_size": 32, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
_MIXER = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_chunk_size": 16}
_FALCON = {
    **_ATTENTION,
    **_MIXER,
    "num_hidden_layers": 3,
    "mamba_d_ssm": 64,
    "mamba_n_groups": 2,
    "mamba_proj_bias": True,
    "ssm_multipliers": [0.7, 1.3, 0.9, 1.1, 0.8],
    "ssm_in_multiplier": 1.25,
    "ssm_out_multiplier": 0.6,
    "attention_in_multiplier": 0.9,
    "attention_out_multiplier": 1.2,
    "key_multiplier": 0.5,
    "embedding_multiplier": 2.5,
    "lm_head_multiplier": 0.3,
    "mlp_multipliers": [0.8, 0.7],
}
_ZAMBA2 = {
    "num_hidden_layers": 6,
    "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "mamba", "hybrid"],
    "mamba_d_state": 16,
    "mamba_ngroups": 2,
    "n_mamba_heads": 8,
    "chunk_size": 16,
    "time_step_min": 0.2,  # reached by some heads
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_mem_blocks": 2,
    "adapter_rank": 4,
    "use_mem_rope": True,
}
_NEMOTRON = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "ssm_state_size": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 4,
    "chunk_size": 16,
    "time_step_min": 0.2,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "n_routed_experts": 4,
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "codestral-mamba": (
        "Mamba2",
        {
            "num_hidden_layers": 3,
            "num_heads": 16,
            "head_dim": 4,
            "n_groups": 8,
            "state_size": 16,
            "chunk_size": 16,
            "tie_word_embeddings": False,
            "time_step_limit": (0.05, 0.4),
        },
    ),
    "bamba": (
        "Bamba",
        {
            **_ATTENTION,
            **_MIXER,
            "num_hidden_layers": 4,
            "attn_layer_indices": [1],
            "mamba_n_groups": 2,
            "mamba_proj_bias": True,
            "time_step_limit": (0.05, 0.4),
            "z_loss_coefficient": 0.1,
        },
    ),
    "zamba2": ("Zamba2", _ZAMBA2),
    "zamba2-adapters": ("Zamba2", {**_ZAMBA2, "use_shared_attention_adapter": True, "add_bias_linear": True}),
    "falcon_h1": ("FalconH1", _FALCON),
    "falcon_h1-norm": ("FalconH1", {**_FALCON, "mamba_rms_norm": True, "mamba_norm_before_gate": False}),
    "falcon_h1-norm-first": (
        "FalconH1",
        {**_FALCON, "mamba_rms_norm": True, "mamba_norm_before_gate": True, "tie_word_embeddings": True},
    ),
    "granite": (
        "GraniteMoeHybrid",
        {
            **_ATTENTION,
            **_MIXER,
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
            "mamba_n_groups": 4,
            "mamba_conv_bias": False,
            "num_local_experts": 4,
            "shared_intermediate_size": 24,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.6,
            "attention_multiplier": 0.25,
            "logits_scaling": 4.0,
            "position_embedding_type": "rope",
            "tie_word_embeddings": True,
        },
    ),
    "granite-dense": (
        "GraniteMoeHybrid",
        {
            **_ATTENTION,
            **_MIXER,
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "num_local_experts": 0,
            "shared_intermediate_size": 24,
        },
    ),
    "nemotron_h": (
        "NemotronH",
        {**_NEMOTRON, "layers_block_type": ["mamba", "mlp", "attention", "mamba", "moe", "mamba"]},
    ),
}
"""Name to class prefix and sizes."""


def tiny_hybrid(case: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """The model of a case."""
    prefix, sizes = CASES[case]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{prefix}Config")(**(_COMMON | sizes | overrides))
    config._experts_implementation = "eager"  # the grouped product knows no float64
    model: PreTrainedModel = getattr(transformers, f"{prefix}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif parameter.ndim > 1:
                parameter.normal_(std=0.2)
            else:
                parameter.normal_(std=0.1)
        for mixer in mixers_of(model):
            mixer.in_proj.weight.normal_(std=0.3)
            mixer.conv1d.weight.normal_(std=0.5)
            mixer.A_log.uniform_(-1, 2)
            mixer.dt_bias.uniform_(-3, 0)
            mixer.D.normal_()
    return model.eval()


@contextmanager
def float64_throughout() -> Iterator[None]:
    """Within the context transformers computes in float64 also where its code asks for float32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(compiled, "kernels", None)  # they tell dtypes by these names
        yield


def stepwise(model: PreTrainedModel, ids: Tensor, pieces: Sequence[int], mask: Tensor | None = None) -> Tensor:
    """Logits when the ids arrive in pieces, through one cache; ``mask`` (b, l) is 0 for padding on the left."""
    cache_argument = family_of(model.config).cache_argument
    logits, cache, start = [], None, 0
    for piece in pieces:
        stop = start + piece
        extra: dict[str, Any] = {} if mask is None else {"attention_mask": mask[:, :stop]}
        if model.config.model_type != "mamba2":
            extra["position_ids"] = torch.arange(start, stop)[None]  # Bamba does not count on from its cache
        output = model(input_ids=ids[:, start:stop], use_cache=True, **{cache_argument: cache}, **extra)
        logits.append(output.logits)
        cache, start = output[cache_argument], stop
    return torch.cat(logits, dim=1)
