"""``ghostssm distill``: a pruned checkpoint learns from the model that it was pruned from."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from ghostssm.cli.console import note, print_facts, print_json, progress_reporter
from ghostssm.cli.requesting import AsJson, asks_for
from ghostssm.workflows.requests import DistillRequest

if TYPE_CHECKING:
    from ghostssm.workflows.distill import DistillOutcome


@asks_for(DistillRequest)
def distill(request: DistillRequest, as_json: AsJson = False) -> None:
    """Let a pruned model learn the unpruned model's predictions, to give back what pruning took.

    ghostssm distill small --teacher MODEL --text wikitext2 --output healed
    ghostssm distill small --teacher MODEL --text ORG/NAME --output healed

    Args:
        as_json: print the result as JSON.
    """
    from ghostssm.workflows.distill import distill as carry_out

    begun = time.perf_counter()
    with progress_reporter() as progress:
        outcome = carry_out(request, progress=progress, notify=note)
    _print(outcome, time.perf_counter() - begun, as_json)


def _print(outcome: DistillOutcome, seconds: float, as_json: bool) -> None:
    """Tell where the result is and what it is."""
    found = outcome.distillation
    if as_json:
        print_json({"output": str(outcome.written), **found.as_json(), "seconds": seconds})
        return
    facts = [
        ("written", str(Path(outcome.written))),
        ("trained", f"{found.steps} steps, {found.tokens:,} tokens of {found.text}; {found.ended}"),
        (
            f"excess loss, {found.held_out_windows} held-out windows",
            f"{found.curve[0].excess_text} -> {found.best.excess_text} nats per token (step {found.kept_step})",
        ),
    ]
    for before, after in zip(found.before, found.after, strict=True):
        facts.append((f"excess loss on {after.text}", f"{before.excess_text} -> {after.excess_text} nats per token"))
    print_facts([*facts, ("time", f"{seconds:.0f} s")])
