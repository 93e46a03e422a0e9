"""How models of each family appear in GGUF: llama.cpp's architecture, its keys, and its tensors.

The facts are those of llama.cpp's ``src/models/*.cpp`` (what is read and computed) and of the converter in its
``conversion/`` folder, version of July 2026. One entry of ``ARCHITECTURES`` is one family.
"""

from __future__ import annotations

import math
from typing import Any

from ghostssm.checkpoint.gguf import hybrids
from ghostssm.checkpoint.gguf.architecture import NO_LIMIT, Architecture, unless_tied
from ghostssm.errors import ModelError


def _mamba2_keys(writer: Any, config: Any) -> None:
    writer.add_context_length(NO_LIMIT)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(0)  # llama.cpp reads these two of every model
    writer.add_head_count(0)
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)


ARCHITECTURES: dict[str, Architecture] = {
    "mamba2": Architecture("mamba2", _mamba2_keys, tensors=unless_tied),
    "falcon_h1": hybrids.falcon_h1,
    "bamba": hybrids.granite,
    "granitemoehybrid": hybrids.granite,
    "nemotron_h": hybrids.nemotron_h,
}


def architecture_of(config: Any) -> Architecture:
    """The architecture of a transformers config.

    Raises:
        ModelError: llama.cpp has none, or computes something else than this config asks for.
    """
    try:
        found = ARCHITECTURES[config.model_type]
    except KeyError:
        raise ModelError(
            f"The model type is {config.model_type!r}, which can't be written as GGUF; "
            f"expected one of: {', '.join(sorted(ARCHITECTURES))}."
        ) from None
    low, high = _dt_limit(config)
    faults = found.faults(config)
    if low > 0 or high != math.inf:
        faults = [*faults, f"time_step_limit is {low:g} to {high:g}, and dt is not limited there"]
    if faults:
        raise ModelError(f"llama.cpp would compute another model ({found.name}): " + "; ".join(faults) + ".")
    return found


def _dt_limit(config: Any) -> tuple[float, float]:
    low, high = getattr(config, "time_step_limit", None) or (0.0, math.inf)
    return float(low), float(high)
