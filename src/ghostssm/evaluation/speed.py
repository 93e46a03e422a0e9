"""Prefill and decode speed, and peak memory, of a model under several plans, measured in turn in one process."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from ghostssm.evaluation.roofline import wait_for
from ghostssm.models.families import family_of, layout_of, mixers_of
from ghostssm.models.forward import fast_forward, replaced_forward
from ghostssm.ops.state_format import FLOAT32_STORAGE, StateStorage
from ghostssm.plan.decision import Decision, Selection
from ghostssm.plan.plan import Plan
from ghostssm.plan.surgery import pruned
from ghostssm.progress import Progress, silent

Key = TypeVar("Key", bound=Hashable)
_ROUNDS = 3
_STEPS = 6
_CLEAR_PEAK = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Rate:
    """Tokens per second: the median, and those of the slowest and the fastest round."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, tokens: int, rounds: Sequence[Sequence[float]]) -> Rate:
        """The speed of work on so many tokens, from the seconds that it took, once or more in each round."""
        speeds = [tokens / statistics.median(times) for times in rounds]
        return cls(tokens / statistics.median(chain.from_iterable(rounds)), min(speeds), max(speeds))

    @property
    def text(self) -> str:
        """The median, and half of the range as a share of it."""
        return f"{self.median:,.0f} ±{(self.high - self.low) / 2 / self.median:.0%}"


@dataclass
class Timings:
    """One plan at one batch size: wall times of whole prefills, of single decode steps by round, and peak memory."""

    prefills: list[float] = field(default_factory=list)
    rounds: list[list[float]] = field(default_factory=list)
    peak_bytes: int = 0

    def prefill(self, tokens: int) -> Rate:
        """The speed of a prefill, from the tokens of all sequences together."""
        return Rate.of(tokens, [[seconds] for seconds in self.prefills])

    def decode(self, batch: int) -> Rate:
        """The decode speed of all sequences of a batch together."""
        return Rate.of(batch, self.rounds)


@dataclass(frozen=True)
class Speedup:
    """How many times faster one plan decodes than another: the median over rounds, and the range.

    Rounds are compared in pairs, since what slows the machine for a while slows both plans of a round.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, slower: Timings, faster: Timings) -> Speedup:
        """The speedup from timings that `measure` took in the same rounds."""
        pairs = zip(slower.rounds, faster.rounds, strict=True)
        ratios = [statistics.median(before) / statistics.median(after) for before, after in pairs]
        return cls(statistics.median(ratios), min(ratios), max(ratios))

    def decided(self, bound: float = 1.0) -> bool:
        """Whether all rounds agree on whether it is more than ``bound`` times."""
        return not self.low <= bound <= self.high


def measure(
    model: PreTrainedModel,
    plans: Mapping[Key, Plan | None],
    batches: Sequence[int],
    prompt: int,
    progress: Progress = silent,
    rounds: int = _ROUNDS,
    storages: Mapping[Key, StateStorage] = {},
) -> dict[tuple[Key, int], Timings]:
    """Time the accelerated model under several plans; keyed by the plan's key and the batch size.

    The plans take turns, several rounds of a few tokens each: a drift of the machine's speed then falls on all alike.
    At one batch size they follow right after one another.

    Args:
        plans: None for the model as it is. storages: how the state is kept under a plan, where it is not float32.
    """
    timings = {(key, batch): Timings() for batch in batches for key in plans}
    turns = [turn for _ in range(rounds) for turn in timings]
    for index, (key, batch) in enumerate(turns):
        progress("decode", index, len(turns))
        forward = partial(fast_forward, storage=storages.get(key, FLOAT32_STORAGE))
        plan = plans[key]
        as_planned = nullcontext(model) if plan is None else pruned(model, plan)
        with as_planned as smaller, replaced_forward(mixers_of(smaller), forward):
            reset_peak(smaller.device)
            _run(smaller, batch, prompt, timings[key, batch])
            timings[key, batch].peak_bytes = max(timings[key, batch].peak_bytes, peak_bytes(smaller.device))
    progress("decode", len(turns), len(turns))
    return timings


def _run(model: PreTrainedModel, batch: int, prompt: int, timings: Timings) -> None:
    """One prefill and a few decode steps; the first step pays for warming up and is dropped."""
    ids = torch.zeros(batch, prompt, dtype=torch.long, device=model.device)
    cache = family_of(model.config).cache_argument
    clock = [_now(model)]
    with torch.inference_mode():
        output: Any = model(input_ids=ids, return_dict=True, use_cache=True, logits_to_keep=1)
        clock.append(_now(model))
        for _ in range(_STEPS):
            token = output.logits[:, -1:].argmax(-1)
            output = model(input_ids=token, return_dict=True, use_cache=True, **{cache: output[cache]})
            clock.append(_now(model))
    prefill, _, *steps = (after - before for before, after in pairwise(clock))
    timings.prefills.append(prefill)
    timings.rounds.append(steps)


def _now(model: PreTrainedModel) -> float:
    wait_for(model.device)
    return time.perf_counter()


def reset_peak(device: torch.device) -> None:
    """Start to measure the peak anew, from what is in use now; for a CPU's memory only Linux can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        _CLEAR_PEAK.write_text("5")
    except OSError:
        return


def peak_bytes(device: torch.device) -> int:
    """The largest memory since the last reset, or since the process began where there is none.

    On a GPU it is that of tensors, elsewhere what is resident.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def first_channels(model: PreTrainedModel, state_size: int) -> Plan:
    """The plan that keeps the first channels everywhere: which channels are kept has no influence on speed."""
    layout = layout_of(model.config)
    first = Decision(Selection.whole(layout.with_state_size(state_size)))
    return Plan(
        method="first",
        model_type=model.config.model_type,
        n_groups=layout.n_groups,
        state_size=layout.state_size,
        decisions={mixer.name: first for mixer in mixers_of(model)},
    )
