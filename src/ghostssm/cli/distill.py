"""``ghostssm distill``: a pruned checkpoint learns from the model that it was pruned from."""

from __future__ import annotations

import time

from ghostssm.cli.console import print_facts, print_json
from ghostssm.cli.parsing import AsJson, asks_for
from ghostssm.report.screen import carried_out
from ghostssm.workflows.requests import DistillRequest


@asks_for(DistillRequest)
def distill(request: DistillRequest, as_json: AsJson = False) -> None:
    """Let a pruned model learn the unpruned model's predictions, to give back what pruning took.

    ghostssm distill small --teacher MODEL --text wikitext2 --output healed
    ghostssm distill small --teacher MODEL --text ORG/NAME --output healed
    """
    from ghostssm.workflows.distill import distill as use_case

    begun = time.perf_counter()
    outcome = carried_out(use_case, request)
    seconds, done = time.perf_counter() - begun, outcome.distillation
    if as_json:
        print_json({"output": str(outcome.written), **done.as_json(), "seconds": seconds})
        return
    facts = [
        ("written", str(outcome.written)),
        ("trained", f"{done.steps} steps, {done.tokens:,} tokens of {done.text}{done.rounded_text}; {done.ended}"),
        (
            f"excess loss, {done.held_out_windows} held-out windows",
            f"{done.curve[0].excess_text} -> {done.best.excess_text} nats per token (step {done.kept_step})",
        ),
    ]
    for before, after in zip(done.before, done.after, strict=True):
        facts.append((f"excess loss on {after.text}", f"{before.excess_text} -> {after.excess_text} nats per token"))
    print_facts([*facts, ("time", f"{seconds:.0f} s")])
