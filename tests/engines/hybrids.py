"""Small hybrids with random weights, straight from transformers' classes."""

from __future__ import annotations

from typing import Any

import torch
import transformers

ATTENTION: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
MIXERS: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 12, "mamba_n_groups": 1}
SIZES: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
GRANITE = {
    **{"layer_types": ["linear_attention", "full_attention", "linear_attention"], "shared_intermediate_size": 80},
    **{"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3},
}
NEMOTRON: dict[str, Any] = {
    **{"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 12, "n_groups": 2, "head_dim": 16},
    "num_hidden_layers": None,
}
EXPERTS: dict[str, Any] = {
    **{"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"], "n_routed_experts": 6},
    **{"num_experts_per_tok": 3, "moe_intermediate_size": 48, "moe_shared_expert_intermediate_size": 80},
    **{"routed_scaling_factor": 2.5, "norm_topk_prob": True},
}
HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon_h1": (
        "FalconH1",
        {
            **{"mamba_d_ssm": 128, "mamba_n_groups": 2, "mamba_rms_norm": True, "mamba_norm_before_gate": False},
            **{"ssm_multipliers": [0.5, 1.5, 0.7, 1.2, 0.9], "ssm_in_multiplier": 1.3, "ssm_out_multiplier": 0.6},
            **{"mlp_multipliers": [0.8, 1.4], "key_multiplier": 0.7, "attention_in_multiplier": 0.9},
            **{"attention_out_multiplier": 1.2, "embedding_multiplier": 4.0, "lm_head_multiplier": 0.5},
        },
    ),
    "falcon_h1, no norm, tied": (
        "FalconH1",
        {"mamba_d_ssm": 128, "mamba_rms_norm": False, "tie_word_embeddings": True, "lm_head_multiplier": 0.5},
    ),
    "bamba": ("Bamba", {"attn_layer_indices": [1], "mamba_n_groups": 4}),
    "granitemoehybrid": ("GraniteMoeHybrid", GRANITE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "granitemoehybrid, dense, rotary": (
        "GraniteMoeHybrid",
        GRANITE | {"num_local_experts": 0, "position_embedding_type": "rope", "tie_word_embeddings": True},
    ),
    "nemotron_h": ("NemotronH", NEMOTRON | {"layers_block_type": ["linear_attention", "full_attention", "mlp"]}),
    "nemotron_h, experts": ("NemotronH", NEMOTRON | EXPERTS),
    "nemotron_h, latent experts in groups, untied": (
        "NemotronH",
        NEMOTRON
        | EXPERTS
        | {"moe_latent_size": 24, "n_group": 3, "topk_group": 2, "norm_topk_prob": False, "tie_word_embeddings": False},
    ),
}


def hybrid_model(name: str) -> Any:
    """Every weight is drawn so that no term is trivial; multipliers differ from 1 and from each other."""
    family, options = HYBRIDS[name]
    values = {key: value for key, value in (SIZES | ATTENTION | MIXERS | options).items() if value is not None}
    if family == "NemotronH":
        values = {key: value for key, value in values.items() if key not in MIXERS}
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**values)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
            elif "norm" in key or key.endswith(".D"):
                parameter.uniform_(0.5, 1.5)
            elif key.endswith(("A_log", "dt_bias")):
                parameter.uniform_(-2, 1)
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.uniform_(-0.5, 0.5)
    return model
