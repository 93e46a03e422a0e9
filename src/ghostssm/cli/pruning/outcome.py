"""What became of a request to prune, and how it is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import ghostssm
from ghostssm.checkpoint.left_out import LeftOut
from ghostssm.checkpoint.manifest import Manifest
from ghostssm.checkpoint.tokenizer import renamed_class
from ghostssm.cli.console import bytes_text, note, print_facts, print_json
from ghostssm.plan.measurement import Measurement
from ghostssm.units import one_or_all


@dataclass(frozen=True)
class Outcome:
    """Attributes:
    written: the checkpoint's folder.
    measured: the loss before and after, if it was wanted. page: the report, likewise.
    """

    written: Path
    plan: ghostssm.Plan
    measured: Measurement | None = None
    page: Path | None = None


def note_renamed_class(checkpoint: ghostssm.Checkpoint | ghostssm.StreamedCheckpoint, written: Path) -> None:
    """Say so where the written tokenizer_config.json names another class than the base model's."""
    if renamed := renamed_class(checkpoint.tokenizer, written):
        note(f"note: {renamed}")


def print_outcome(outcome: Outcome, address: str | None, seconds: float, as_json: bool) -> None:
    """Tell where the result is and what it is; ``address`` is that of the upload, if there was one."""
    plan, measured = outcome.plan, outcome.measured
    searched = None if plan.provenance is None else plan.provenance.search
    found = ghostssm.describe(str(outcome.written))
    missing = Manifest.read(outcome.written).left_out or LeftOut()
    before = found.state_bytes(plan.state_size)
    after = one_or_all(plan.state_sizes)
    if as_json:
        print_json(
            {
                "output": str(outcome.written),
                "method": plan.method,
                "state_size": {"before": plan.state_size, "after": after},
                "state_bytes": {"before": before, "after": found.state_bytes()},
                "measured": None if measured is None else measured.as_json(),
                "searched": None if searched is None else searched.as_json(),
                "left_out": missing.as_json(),
                "report": None if outcome.page is None else str(outcome.page),
                "hub": address,
                "seconds": seconds,
            }
        )
        return
    for text in missing.notes:
        note(f"note: {text}")
    facts = [
        ("written", str(outcome.written)),
        ("state size", f"{plan.state_size} -> {after if isinstance(after, int) else ' '.join(map(str, after))}"),
        ("state per sequence, fp32", f"{bytes_text(before)} -> {bytes_text(found.state_bytes())}"),
    ]
    if searched is not None:
        facts.append(("excess loss", searched.text))
    if measured is not None:
        facts.append(("excess loss", f"{measured.excess_text} nats per token, on {measured.text}"))
    if outcome.page is not None:
        facts.append(("report", str(outcome.page)))
    if address is not None:
        facts.append(("uploaded", address))
    print_facts([*facts, ("time", f"{seconds:.0f} s")])
