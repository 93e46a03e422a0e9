"""Small pruned checkpoints of every family, for `check_engines.py`: written by ghostssm, with transformers' logits.

Every weight is drawn so that no term is trivial, and multipliers differ from 1 and from each other. The models have
N = 64 and are pruned to N' = 32, the reference model from 128.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers

STATE_SIZE = 32
TOKENS = 40
PROMPT = 8
GREEDY = 20
INDEX = "checkpoints.json"

_SIZES: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96}
_TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
_MIXERS = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 64, "mamba_n_groups": 1, "mamba_chunk_size": 16}
_MAMBA2 = {"num_hidden_layers": 2, "num_heads": 8, "head_dim": 16, "state_size": 64, "chunk_size": 16}
_GRANITE = {
    **_ATTENTION,
    **_MIXERS,
    **{"num_hidden_layers": 3, "layer_types": ["mamba", "attention", "mamba"], "shared_intermediate_size": 80},
    **{"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3},
}
_FALCON = {
    **_ATTENTION,
    **_MIXERS,
    **{"num_hidden_layers": 3, "mamba_d_ssm": 128, "rope_theta": 5000.0, "ssm_multipliers": [0.5, 1.5, 0.7, 1.2, 0.9]},
    **{"ssm_in_multiplier": 1.3, "ssm_out_multiplier": 0.6, "mlp_multipliers": [0.8, 1.4]},
    **{"attention_out_multiplier": 1.2, "embedding_multiplier": 4.0, "lm_head_multiplier": 0.5},
}
_NEMOTRON = {
    **_ATTENTION,
    **{"head_dim": 16, "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 64, "chunk_size": 16},
    # transformers raises dt to the least that training drew, the others do not; no step here is as small.
    "time_step_min": 1e-9,
}
_EXPERTS = {"n_routed_experts": 4, "moe_intermediate_size": 24, "moe_shared_expert_intermediate_size": 40}
_ZAMBA2 = {
    **{"num_hidden_layers": 6, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "mamba", "hybrid"]},
    **{"mamba_d_state": 64, "mamba_ngroups": 2, "n_mamba_heads": 8, "chunk_size": 16, "time_step_min": 1e-9},
    **{"num_attention_heads": 4, "num_mem_blocks": 2, "adapter_rank": 4, "use_mem_rope": True},
    **{"use_shared_attention_adapter": True, "max_position_embeddings": 128},
}
REFERENCES = ("reference", "reference, stored head")
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba2": ("Mamba2", _MAMBA2 | {"n_groups": 1}),
    "mamba2, tied": ("Mamba2", _MAMBA2 | {"n_groups": 1, "tie_word_embeddings": True}),
    "mamba2, two groups": ("Mamba2", _MAMBA2 | {"n_groups": 2}),
    "mamba2, epsilon": ("Mamba2", _MAMBA2 | {"n_groups": 1, "layer_norm_epsilon": 1e-2}),
    "mamba2, limits on dt": ("Mamba2", _MAMBA2 | {"n_groups": 1, "time_step_limit": (0.05, 0.4)}),
    "bamba": ("Bamba", _ATTENTION | _MIXERS | {"num_hidden_layers": 3, "attn_layer_indices": [1]}),
    "falcon_h1": ("FalconH1", _FALCON),
    "falcon_h1, tied, norm": (
        "FalconH1",
        _FALCON | {"tie_word_embeddings": True, "mamba_rms_norm": True, "mamba_norm_before_gate": False},
    ),
    "falcon_h1, norm before gate": ("FalconH1", _FALCON | {"mamba_rms_norm": True}),
    "falcon_h1, two groups": ("FalconH1", _FALCON | {"mamba_n_groups": 2}),
    "falcon_h1, norm, two groups": (
        "FalconH1",
        _FALCON | {"mamba_n_groups": 2, "mamba_rms_norm": True, "mamba_norm_before_gate": False},
    ),
    "falcon_h1, key multiplier": ("FalconH1", _FALCON | {"key_multiplier": 0.7}),
    "falcon_h1, attention multiplier": ("FalconH1", _FALCON | {"attention_in_multiplier": 0.9}),
    "falcon_h1, mixer biases": ("FalconH1", _FALCON | {"mamba_proj_bias": True}),
    "falcon_h1, output biases": ("FalconH1", _FALCON | {"projectors_bias": True}),
    "falcon_h1, attention biases": ("FalconH1", _FALCON | {"attention_bias": True}),
    "falcon_h1, MLP biases": ("FalconH1", _FALCON | {"mlp_bias": True}),
    "falcon_h1, limits on dt": ("FalconH1", _FALCON | {"time_step_limit": (0.05, 0.4)}),
    "granitemoehybrid": ("GraniteMoeHybrid", _GRANITE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "granitemoehybrid, groups": (
        "GraniteMoeHybrid",
        _GRANITE | {"num_local_experts": 4, "num_experts_per_tok": 2, "mamba_n_groups": 4},
    ),
    "granitemoehybrid, dense, rotary, tied": (
        "GraniteMoeHybrid",
        _GRANITE
        | {
            "num_local_experts": 0,
            "position_embedding_type": "rope",
            "rope_theta": 5000.0,
            "tie_word_embeddings": True,
        },
    ),
    "granitemoehybrid, dense, biases": (
        "GraniteMoeHybrid",
        _GRANITE | {"num_local_experts": 0, "mamba_proj_bias": True, "attention_bias": True, "mamba_conv_bias": False},
    ),
    "granitemoehybrid, limits on dt": (
        "GraniteMoeHybrid",
        _GRANITE | {"num_local_experts": 0, "time_step_limit": (0.05, 0.4)},
    ),
    "nemotron_h": (
        "NemotronH",
        _NEMOTRON | {"n_groups": 2, "layers_block_type": ["mamba", "mlp", "attention", "mamba"]},
    ),
    "nemotron_h, experts": (
        "NemotronH",
        _NEMOTRON | _EXPERTS | {"n_groups": 8, "layers_block_type": ["mamba", "moe", "attention", "mamba"]},
    ),
    "nemotron_h, latent experts in groups": (
        "NemotronH",
        _NEMOTRON
        | _EXPERTS
        | {"n_groups": 2, "layers_block_type": ["mamba", "moe", "attention", "mamba"], "moe_latent_size": 32}
        | {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
    ),
    "nemotron_h, biases": (
        "NemotronH",
        _NEMOTRON | {"n_groups": 2, "use_bias": True, "layers_block_type": ["mamba", "mlp", "attention", "mamba"]},
    ),
    "zamba2": ("Zamba2", _ZAMBA2),
}
"""Name to class prefix and sizes."""


@dataclass(frozen=True)
class Written:
    """A pruned checkpoint in a folder.

    Attributes:
        sizes: the shape of a sequence's state, the channels of conv1d and the groups, of every mixer.
        levels: engine to what `ghostssm.advise` says of it: runs, slow or no. reasons: why, where it says so.
    """

    name: str
    folder: str
    sizes: dict[str, Any]
    levels: dict[str, str]
    reasons: dict[str, str]

    def expected(self, folder: Path) -> dict[str, torch.Tensor]:
        """Of transformers, in float32: ``logits`` (length, vocabulary) of ``ids`` (length,), and what follows greedily.

        ``greedy`` (count,) are the tokens after the first ``prompt`` ids.
        """
        return safetensors.torch.load_file(folder / f"{self.folder}.expected")


def random_model(name: str) -> Any:
    """The model of a name in `MODELS`, before it is pruned."""
    family, sizes = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(_SIZES | _TOKENS | sizes))
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
            elif "norm" in key or key.endswith(".D"):
                parameter.uniform_(0.5, 1.5)
            elif key.endswith(("A_log", "dt_bias")):
                parameter.uniform_(-2, 1)
            else:
                parameter.normal_(std=0.1)
    return model


def write_checkpoints(folder: Path) -> list[Written]:
    """Write every checkpoint, the logits, and an index of them all, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [checkpoint_of(name, folder) for name in (*REFERENCES, *MODELS)]
    (folder / INDEX).write_text(json.dumps([asdict(entry) for entry in written], indent=1))
    return written


def read_index(folder: Path) -> list[Written]:
    return [Written(**entry) for entry in json.loads((folder / INDEX).read_text())]


def checkpoint_of(name: str, folder: Path) -> Written:
    """Write the pruned checkpoint of a name in `REFERENCES` or `MODELS`, and the logits, into a folder."""
    path = folder / name.replace(",", "").replace(" ", "-")
    spec = "reference"
    if name in MODELS:
        dense = path.with_name(f"{path.name}.dense")
        random_model(name).save_pretrained(dense)
        spec = str(dense)
    return _with_logits(folder, name, write_pruned(spec, path, untie=name in REFERENCES[1:]))


def write_pruned(spec: str, output: Path, untie: bool = False) -> Path:
    """A model pruned to `STATE_SIZE`, in float32."""
    import ghostssm
    from ghostssm.text.windows import Windows

    checkpoint = ghostssm.load(spec, dtype=torch.float32)
    windows = Windows(torch.arange(1, 65)[None], "counting", "0" * 64, 1.0, 0)
    plan = ghostssm.Calibration(checkpoint.model, windows).plan("magnitude", STATE_SIZE)
    smaller = ghostssm.apply_plan(checkpoint.model, plan)
    pruned = ghostssm.Checkpoint(smaller, checkpoint.tokenizer, checkpoint.source)
    return ghostssm.save(pruned, plan, output, untie=untie)


def _with_logits(folder: Path, name: str, path: Path) -> Written:
    import ghostssm
    from ghostssm.models.families import family_of

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = torch.randint(1, 96, (TOKENS,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = model(ids[None]).logits[0]
        said = ids[:PROMPT]
        for _ in range(GREEDY):
            said = torch.cat([said, model(said[None]).logits[0, -1:].argmax(-1)])
    tensors = {"ids": ids, "logits": logits.contiguous(), "greedy": said[PROMPT:], "prompt": torch.tensor(PROMPT)}
    safetensors.torch.save_file(tensors, folder / f"{path.name}.expected")
    config = model.config
    layout = family_of(config).layout(config)
    advice = ghostssm.advise(
        layout,
        config.model_type,
        dialect="transformers",
        tied_head=config.tie_word_embeddings,
        config=config,
    )
    levels = {entry.engine: entry.level for entry in advice}
    state = [layout.num_heads, layout.head_dim, layout.state_size]
    sizes = {"state": state, "channels": layout.conv_dim, "groups": layout.n_groups}
    return Written(name, path.name, sizes, levels, {entry.engine: entry.reason for entry in advice})
