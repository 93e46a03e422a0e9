"""Sources of the evidence on a mixer: a walk, all processes, or what was measured before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from ghostssm.calibration.open_block import OpenBlock
from ghostssm.calibration.processes import Ask
from ghostssm.calibration.samples import OutputSamples
from ghostssm.calibration.statistics import LayerStatistics
from ghostssm.methods.base import EvidenceSource, Known
from ghostssm.plan.decision import Decision


@dataclass(frozen=True, kw_only=True)
class Unpruned(Known):
    """Evidence for a one-shot method, which may ask for the mixer's gate gradients besides the weights."""

    gradients: Callable[[], Tensor]

    def saliency(self) -> Tensor:
        return self.gradients()


class Walked:
    """Evidence on the mixer of a block of a walk.

    Args:
        known: answers that were worked out before, and where they are kept.
        saliency: the mixer's, from gate gradients.
        seed: of the samples. tokens: on which the changes of decisions are measured.
    """

    def __init__(
        self,
        block: OpenBlock,
        known: dict[tuple[Any, ...], Any],
        saliency: Callable[[], Tensor],
        seed: int,
        tokens: int,
    ):
        self.saliency = saliency
        self._block, self._known, self._seed, self._tokens = block, known, seed, tokens

    def statistics(self) -> LayerStatistics:
        statistics: LayerStatistics = self._once(("statistics",), self._block.statistics)
        return statistics

    def samples(self) -> OutputSamples:
        samples: OutputSamples = self._once(("samples", self._seed), lambda: self._block.samples(self._seed))
        return samples

    def input_gram(self) -> Tensor:
        return self._block.input_gram()

    def changes(self, decisions: Sequence[Decision]) -> list[float]:
        return self._block.changes(decisions, self._tokens)

    def _once(self, question: tuple[Any, ...], answer: Callable[[], Any]) -> Any:
        if question not in self._known:
            self._known[question] = answer()
        return self._known[question]


class Measured:
    """Evidence that remembers the changes that were measured."""

    def __init__(self, source: EvidenceSource):
        self.statistics, self.samples = source.statistics, source.samples
        self.input_gram, self.saliency = source.input_gram, source.saliency
        self._changes = source.changes
        self._known: dict[int, tuple[float, Decision]] = {}  # by identity, which is unique while the decision is held

    def changes(self, decisions: Sequence[Decision]) -> list[float]:
        new = [decision for decision in decisions if id(decision) not in self._known]
        if new:
            self._known |= zip(map(id, new), zip(self._changes(new), new, strict=True), strict=True)
        return [self._known[id(decision)][0] for decision in decisions]


class Asked:
    """Evidence that process 0 asks for and all processes work out together."""

    def __init__(self, ask: Ask):
        self.statistics: Callable[[], LayerStatistics] = partial(ask, "statistics")
        self.samples: Callable[[], OutputSamples] = partial(ask, "samples")
        self.input_gram: Callable[[], Tensor] = partial(ask, "input_gram")
        self.saliency: Callable[[], Tensor] = partial(ask, "saliency")
        self.changes: Callable[[Sequence[Decision]], list[float]] = partial(ask, "changes")
