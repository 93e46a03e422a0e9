"""What vLLM and SGLang themselves say of their caches, on a CPU: for `check_engines.py`, which runs it, and for tests.

Published models are planned at several state sizes and dtypes, as for one GPU; nothing is allocated.

- vLLM, with FlashAttention, with and without prefix caching: ModelConfig and its rules for each architecture,
  `_align_hybrid_block_size`, `get_global_kv_cache_groups`, `get_kv_cache_configs`, `get_kv_cache_capacity`.
- SGLang, with the buffer that it takes for hybrids: its configs' `mamba2_cache_params`, `_handle_max_mamba_cache`,
  `_calculate_mamba_ratio`.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import types
from pathlib import Path
from typing import Any

from published_models import published_configs

_DATA = Path(__file__).parents[1] / "tests" / "data" / "configs"
RECORDS = {engine: _DATA / f"{engine}_capacity.json" for engine in ("vllm", "sglang")}
"""An engine's figures, with its version."""
CONTEXT = 8192
MEMORY = 40 * 2**30
"""For caches alone."""
MODELS = (
    *("Nemotron-H-8B", "Nemotron-H-47B", "Nemotron-3-Nano-30B-A3B"),
    *("Granite-4.0-H-Micro", "Granite-4.0-H-Tiny", "Granite-4.0-H-Small"),
    *("Falcon-H1-0.5B", "Falcon-H1-1.5B", "Falcon-H1-34B", "Bamba-9B"),
    *("Zamba2-1.2B", "Zamba2-2.7B", "Zamba2-7B", "Mamba-Codestral-7B"),
)
_SIZE_KEYS = ("ssm_state_size", "mamba_d_state", "state_size")


def cases(engine: str) -> list[dict[str, Any]]:
    """Model, state size, dtype and, for vLLM, prefix caching of every plan."""
    configs, found = published_configs(), []
    for model in MODELS:
        config = configs[model]
        if engine == "sglang" and config["model_type"] in ("bamba", "zamba2", "mamba2"):
            continue  # no class for two, and other rules for a model without attention
        trained = next(config[key] for key in _SIZE_KEYS if key in config)
        for size in (size for size in (256, 128, 64, 32) if size <= trained):
            for dtype in ("float32", "bfloat16"):
                case = {"model": model, "state_size": size, "state_dtype": dtype}
                # A model without attention has no prefix caching in vLLM.
                caching = [False] if config["model_type"] == "mamba2" else [True, False]
                found += [case | {"prefix_caching": each} for each in caching] if engine == "vllm" else [case]
    return found


def config_of(model: str, size: int) -> dict[str, Any]:
    """A config with N' in place of N; Bamba's, which vLLM has no class for, as Granite's, whose caches are alike."""
    config = published_configs()[model]
    config |= {key: size for key in _SIZE_KEYS if key in config}
    if config["model_type"] == "bamba":
        attention = config.pop("attn_layer_indices")
        layers = ["attention" if index in attention else "mamba" for index in range(config["num_hidden_layers"])]
        config |= {"model_type": "granitemoehybrid", "architectures": ["GraniteMoeHybridForCausalLM"]}
        config |= {"layer_types": layers, "num_local_experts": 0, "shared_intermediate_size": 14336}
    return config


def planned_by_vllm(case: dict[str, Any]) -> dict[str, Any]:
    """Its figures for one case."""
    from vllm.config import CacheConfig, DeviceConfig, ModelConfig, VllmConfig, set_current_vllm_config
    from vllm.model_executor.models import ModelRegistry
    from vllm.platforms.interface import Platform
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
    from vllm.v1.attention.backends.utils import resolve_kv_cache_layout
    from vllm.v1.core.kv_cache_planning import get_global_kv_cache_groups, get_kv_cache_configs
    from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec

    os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    config = config_of(case["model"], case["state_size"])
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "config.json").write_text(json.dumps(config))
        model = ModelConfig(
            model=scratch, skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True, max_model_len=CONTEXT
        )
        cache = CacheConfig(
            mamba_ssm_cache_dtype=case["state_dtype"], enable_prefix_caching=case["prefix_caching"], block_size=16
        )
        whole = VllmConfig(model_config=model, cache_config=cache, device_config=DeviceConfig(device="cpu"))
    cache = whole.cache_config
    cache.mamba_ssm_cache_dtype = case["state_dtype"]  # for want of a CPU kernel, it may have become float32
    if model.is_hybrid:
        Platform._align_hybrid_block_size(whole, FlashAttentionBackend)
    chosen, _ = ModelRegistry.resolve_model_cls(model.architecture, model_config=model)
    with set_current_vllm_config(whole):
        mixer = MambaSpec(
            shapes=chosen.get_mamba_state_shape_from_config(whole),
            dtypes=chosen.get_mamba_state_dtype_from_config(whole),
            block_size=cache.mamba_block_size,
            page_size_padded=cache.mamba_page_size_padded,
            mamba_cache_mode=cache.mamba_cache_mode,
        )
        attention = FullAttentionSpec(
            block_size=cache.block_size,
            num_kv_heads=model.get_num_kv_heads(whole.parallel_config),
            head_size=model.get_head_size(),
            dtype=model.dtype,
        )
        mixers, attentions = layer_counts(config)
        specs = {f"mixer.{index}": mixer for index in range(mixers)}
        specs |= {f"attention.{index}": attention for index in range(attentions)}
        layouts = [[layout.name for layout in FlashAttentionBackend.supported_kv_cache_layouts() or ()] or ["LBNHC"]]
        resolve_kv_cache_layout(whole, layouts, specs.values())
        groups = get_global_kv_cache_groups(whole, [specs])
        (plan,) = get_kv_cache_configs(whole, [specs], [MEMORY], groups)
        tokens, sequences = get_kv_cache_capacity(whole, plan)
    page = next(iter(groups)).kv_cache_spec.page_size_bytes
    return {"block_tokens": attention.block_size if attentions else 0, "page": page, "blocks": plan.num_blocks} | {
        "groups": len(groups),
        "tokens": tokens,
        "sequences": sequences,
    }


def layer_counts(config: dict[str, Any]) -> tuple[int, int]:
    """Mixers and attention layers, by the config's own words."""
    if pattern := config.get("hybrid_override_pattern"):
        return pattern.count("M"), pattern.count("*")
    if config["model_type"] == "falcon_h1":
        return config["num_hidden_layers"], config["num_hidden_layers"]
    kinds = config.get("layer_types") or config.get("layers_block_type") or ["mamba"] * config["num_hidden_layers"]
    return len(kinds) - kinds.count("attention"), len(kinds) - kinds.count("mamba")


def planned_by_sglang(case: dict[str, Any]) -> dict[str, Any]:
    """Its figures for one case: states, states per sequence, and bytes for tokens."""
    from sglang.srt import runtime_context
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.environ import envs
    from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator
    from sglang.srt.runtime_context import get_parallel, get_schedule

    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        Path(scratch, "config.json").write_text(json.dumps(config_of(case["model"], case["state_size"])))
        kinds = ("tp", "pp", "attn_tp", "attn_dp", "attn_cp", "moe_ep", "moe_tp", "moe_dp")
        ranks = {f"{kind}_{part}": value for kind in kinds for part, value in (("rank", 0), ("size", 1))}
        options = {"model_path": scratch, "device": "cpu", "mamba_radix_cache_strategy": "extra_buffer"}
        stack.enter_context(runtime_context._CONTEXT.override_server_args(**options))
        stack.enter_context(get_parallel().override(**ranks))
        stack.enter_context(envs.SGLANG_MAMBA_SSM_DTYPE.override(case["state_dtype"]))
        alone = types.SimpleNamespace(
            mambaish_config=ModelConfig(scratch, dtype="bfloat16").hf_config,
            **{"pp_size": 1, "attn_dp_size": 1, "extra_mamba_cache_bytes_per_req": 0, "hybrid_gdn_config": None},
            **{"hybrid_kda_config": None, "fused_entry_bytes": lambda _: None},
            spec_algorithm=types.SimpleNamespace(is_none=lambda: True),
        )
        rest = KVCacheConfigurator._handle_max_mamba_cache(alone, MEMORY / 2**30)
        ratio = KVCacheConfigurator._calculate_mamba_ratio(alone)
        return {"states": get_schedule().max_mamba_cache_size, "ratio": ratio, "rest": round(rest * 2**30)}


PLANNERS = {"vllm": planned_by_vllm, "sglang": planned_by_sglang}


def record(engine: str, engine_version: str) -> int:
    """Plan every case and write the record; the number of cases."""
    lines = [json.dumps(case | PLANNERS[engine](case)) for case in cases(engine)]
    head = json.dumps({engine: engine_version, "context": CONTEXT, "memory": MEMORY})
    RECORDS[engine].write_text(head[:-1] + ', "plans": [\n' + ",\n".join(lines) + "\n]}\n")
    return len(lines)
