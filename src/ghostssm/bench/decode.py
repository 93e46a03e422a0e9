"""Decode speed of a model at several state sizes, measured in turn in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ghostssm.acceleration import replaced_forward
from ghostssm.families import family_of, mixers_of
from ghostssm.plan import Plan, Selection
from ghostssm.progress import Progress, silent
from ghostssm.surgery import pruned

_ROUNDS = 3
_STEPS = 6
_PROMPT = 8


def decode_speeds(
    model: PreTrainedModel, state_sizes: Sequence[int], batches: Sequence[int], progress: Progress = silent
) -> dict[int, dict[int, float]]:
    """Greedy decode speed of the accelerated model, tokens per second over the whole batch.

    Which channels are kept has no influence on speed, so each size keeps its first ones. The sizes take turns, several
    rounds of a few tokens each, and the median step counts: a drift of the machine's speed then falls on all alike.

    Returns:
        state size to batch size to tokens per second.
    """
    seconds: dict[tuple[int, int], list[float]] = {(size, batch): [] for size in state_sizes for batch in batches}
    turns = [(size, batch) for _ in range(_ROUNDS) for size in state_sizes for batch in batches]
    for index, (size, batch) in enumerate(turns):
        progress("decode", index, len(turns))
        with pruned(model, first_channels(model, size)), replaced_forward(mixers_of(model)):
            seconds[size, batch] += _step_seconds(model, batch)
    progress("decode", len(turns), len(turns))
    return {size: {batch: batch / statistics.median(seconds[size, batch]) for batch in batches} for size in state_sizes}


def _step_seconds(model: PreTrainedModel, batch: int) -> list[float]:
    """Wall time of single decode steps after a short prompt."""
    ids = torch.zeros(batch, _PROMPT, dtype=torch.long, device=model.device)
    seconds = []
    with torch.inference_mode():
        output: Any = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        for _ in range(_STEPS):
            _wait_for(model.device)
            begun = time.perf_counter()
            token = output.logits[:, -1:].argmax(-1)
            output = model(input_ids=token, cache_params=output.cache_params, use_cache=True)
            _wait_for(model.device)
            seconds.append(time.perf_counter() - begun)
    return seconds[1:]


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def first_channels(model: PreTrainedModel, state_size: int) -> Plan:
    layout = family_of(model.config).layout(model.config)
    selection = Selection((tuple(range(state_size)),) * layout.n_groups)
    return Plan(
        method="first",
        model_type=model.config.model_type,
        n_groups=layout.n_groups,
        state_size=layout.state_size,
        selections={mixer.name: selection for mixer in mixers_of(model)},
    )
