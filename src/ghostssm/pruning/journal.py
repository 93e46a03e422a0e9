"""What a run knows so far, while it makes a plan; here in memory, in a streamed run on disk."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ghostssm.plan.decision import Decision


class Findings:
    """What a walk learns about each block, in memory.

    Attributes:
        entries: a JSON value for every block that is finished with, front to back.
    """

    def __init__(self) -> None:
        self.entries: list[Any] = []

    def restore(self, hidden: Tensor) -> None:
        """Replace the hidden states before the first block by those before the first block that has no findings yet.

        Args:
            hidden: of this process's windows; overwritten in place.
        """

    def add(self, finding: Any, hidden: Tensor | None = None) -> None:
        """Note what was learnt about the next block.

        Args:
            hidden: what leaves it, if that was computed.
        """
        self.entries.append(finding)


class Journal:
    """Decisions and scores in memory.

    Attributes:
        done: how many blocks, front to back, are finished with. decided: how many of them have a mixer.
        curves: what a smaller state costs each mixer, where the recipe asks for sizes per layer.
    """

    def __init__(self) -> None:
        self.done = self.decided = 0
        self.curves = Findings()
        self._decisions: dict[str, tuple[Decision, Tensor]] = {}

    def decisions(self) -> dict[str, tuple[Decision, Tensor]]:
        """The decision on every mixer so far, with the scores behind it, by the mixer's name."""
        return self._decisions

    def restore(self, hidden: Tensor) -> None:
        """Replace the hidden states before the first block by those before block number ``done``."""

    def record(
        self,
        block: nn.Module,
        name: str | None = None,
        decision: Decision | None = None,
        score: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> None:
        """Note that a block is finished with.

        Args:
            block: as the model has it, with its weights; the decision was not applied to it.
            name, decision, score: of its mixer, if it has one.
            hidden: what reaches the next block, if that was computed.
        """
        self.done += 1
        if name is not None and decision is not None and score is not None:
            self._decisions[name] = decision, score
            self.decided += 1
