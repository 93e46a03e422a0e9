"""The decisions so far, while a plan is made."""

from __future__ import annotations

from torch import Tensor, nn

from ghostssm.plan.decision import Decision


class Journal:
    """Decisions and scores in memory.

    Attributes:
        done: how many blocks, front to back, are finished with.
        decisions, scores: of the mixers in them, by name.
    """

    def __init__(self) -> None:
        self.done = 0
        self.decisions: dict[str, Decision] = {}
        self.scores: dict[str, Tensor] = {}

    def restore(self, hidden: Tensor) -> None:
        """Replace the hidden states that reach the first block by those that reach block number ``done``."""

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
            self.decisions[name], self.scores[name] = decision, score
