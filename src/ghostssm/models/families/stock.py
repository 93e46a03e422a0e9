"""Every family of transformers' own model classes that has Mamba-2 mixers."""

from transformers import PreTrainedConfig

from ghostssm.models.families import published
from ghostssm.models.families.family import ConfigKeys, Family
from ghostssm.models.families.registry import register


def _shared_in_zamba2(config: PreTrainedConfig) -> dict[str, str]:
    """Its transformer blocks, of which there are a few, take turns before the hybrid layers."""
    blocks = [f"layers.{layer}.shared_transformer." for layer in config.hybrid_layer_ids]
    return {block: blocks[index % config.num_mem_blocks] for index, block in enumerate(blocks)}


MAMBA2 = Family(
    "mamba2",
    ConfigKeys("num_heads", "head_dim", "n_groups", "state_size", "conv_kernel"),
    blocks_path="backbone.layers",
    mixer_paths=("mixer",),
    own_keys=published.of_mamba2,
    cache_argument="cache_params",
    is_hybrid=False,
)
HYBRIDS = (
    Family("bamba", own_keys=published.of_bamba),
    Family("falcon_h1", own_keys=published.of_falcon_h1),
    Family("granitemoehybrid", own_keys=published.of_granitemoehybrid),
    Family(
        "nemotron_h",
        ConfigKeys("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel"),
        mixer_paths=("mixer",),
        own_keys=published.of_nemotron_h,
        unread_layers_keys=("num_nextn_predict_layers", "mtp_hybrid_override_pattern"),
    ),
    Family(
        "zamba2",
        ConfigKeys(num_heads="n_mamba_heads", head_dim="mamba_headdim", n_groups="mamba_ngroups"),
        mixer_paths=("mamba", "mamba_decoder.mamba"),  # alone, and after a shared transformer block
        shared_parts=_shared_in_zamba2,
    ),
)
for _family in (MAMBA2, *HYBRIDS):
    register(_family)
