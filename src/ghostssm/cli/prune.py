"""``ghostssm prune``: one model, one recipe, one size, to a checkpoint."""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ghostssm.cli.console import print_facts, print_json, print_table, print_text
from ghostssm.cli.parsing import AsJson, asks_for
from ghostssm.extras import check_drawable
from ghostssm.files.outputs import PAGE_FILE
from ghostssm.report.screen import carried_out, note
from ghostssm.text.sources import is_corpus
from ghostssm.units import bytes_text, one_or_all
from ghostssm.workflows.options import Option
from ghostssm.workflows.requests import PruneRequest

if TYPE_CHECKING:
    from ghostssm import Description
    from ghostssm.workflows.prune_checks import PruneOutcome


def _amended(
    request: PruneRequest,
    repair: Annotated[bool | None, Option(panel="How", flag="--repair/--no-repair")] = None,
    refit: Annotated[int | None, Option("STEPS", "How", least=0)] = None,
    distill: Annotated[int | None, Option("STEPS", "How", least=1)] = None,
    per_layer: Annotated[bool, Option(panel="How")] = False,
) -> PruneRequest:
    """The request with its recipe changed by the options beside ``--method``; refused if its page can't be drawn.

    Args:
        repair: add the step 'repair' to the recipe, or take it out. It fits the output projection to the smaller state.
        refit: add the step 'refit' to the recipe, with so many training steps per layer; 0 takes it out.
        distill: steps in which the whole pruned model then learns from the unpruned one, on the calibration windows.
        per_layer: let every layer have a state size of its own: larger where a cut costs more.
    """
    if request.report:
        check_drawable()
    method, *steps = request.recipe.split("+")
    changed = {"refit": refit, "repair": repair, "distill": distill, "per-layer": per_layer or None}
    kept = [step for step in steps if changed.get(step.rstrip("0123456789")) is None]
    first = [f"refit{refit}"] if refit else []
    last = ["repair"] * bool(repair) + ([f"distill{distill}"] if distill else []) + ["per-layer"] * per_layer
    return dataclasses.replace(request, recipe="+".join([method, *first, *kept, *last]))


@asks_for(PruneRequest, amended=_amended)
def prune(request: PruneRequest, as_json: AsJson = False) -> None:
    """Shrink the state of a model, from size N to N', and write a checkpoint that loads like the original.

    It needs one of --state-size, --budget, --max-excess-loss and --state-bytes. After the first layer it tells how
    long the rest takes. By default it reads 128 windows of 2048 tokens; with --windows 16 --method ghost a first
    result comes much sooner.

    ghostssm prune state-spaces/mamba2-130m --state-size 64 --output smaller
    ghostssm prune MODEL --state-bytes 1/4 --engine vllm --output smaller
    """
    import ghostssm
    from ghostssm.workflows.prune import prune as use_case

    begun = time.perf_counter()
    outcome = carried_out(use_case, request)
    assert outcome.written is not None
    page = ghostssm.write_report(outcome.written, outcome.written / PAGE_FILE) if request.report else None
    _print(outcome, outcome.written, page, time.perf_counter() - begun, as_json)
    if as_json:
        return
    if outcome.plan.state_dtype is not None:
        _print_serving(outcome.plan.state_dtype, ghostssm.describe(str(outcome.written)), request.engines)
    if steps := _next_steps(request, outcome):
        print_facts([("next", steps[0]), *(("or", step) for step in steps[1:])])


def _print(outcome: PruneOutcome, written: Path, page: Path | None, seconds: float, as_json: bool) -> None:
    """Print where the result is and what it is."""
    import ghostssm
    from ghostssm.checkpoint.left_out import LeftOut
    from ghostssm.checkpoint.manifest import Manifest
    from ghostssm.ops.state_format import FLOAT32, StateFormat

    plan, measured = outcome.plan, outcome.measured
    made = plan.provenance
    searched, choice = (None, None) if made is None else (made.search, made.choice)
    described = ghostssm.describe(str(written))
    missing = Manifest.read(written).left_out or LeftOut()
    before = described.state_bytes(plan.state_size)
    after = one_or_all(plan.state_sizes)
    if as_json:
        print_json(
            {
                "output": str(written),
                "method": plan.method,
                "state_size": {"before": plan.state_size, "after": after},
                "state_bytes": {"before": before, "after": described.state_bytes()},
                "measured": None if measured is None else measured.as_json(),
                "searched": None if searched is None else searched.as_json(),
                "choice": None if choice is None else choice.as_json(),
                "left_out": missing.as_json(),
                "report": None if page is None else str(page),
                "hub": outcome.address,
                "seconds": seconds,
            }
        )
        return
    for text in missing.notes:
        note(f"note: {text}")
    facts = [
        ("written", str(written)),
        ("state size", f"{plan.state_size} -> {after if isinstance(after, int) else ' '.join(map(str, after))}"),
        ("state per sequence, fp32", f"{bytes_text(before)} -> {bytes_text(described.state_bytes())}"),
    ]
    if plan.state_dtype is not None and plan.state_dtype != FLOAT32.name:
        kept = described.state_bytes(form=StateFormat.of(plan.state_dtype))
        facts.append((f"the same in {plan.state_dtype}", bytes_text(kept)))
    if searched is not None:
        facts.append(("excess loss", searched.text))
    if choice is not None:
        facts.append(("chosen", choice.text))
    if measured is not None:
        facts.append(("excess loss", f"{measured.excess_text} nats per token, on {measured.text}"))
    if page is not None:
        facts.append(("report", str(page)))
    if outcome.address is not None:
        facts.append(("uploaded", outcome.address))
    print_facts([*facts, ("time", f"{seconds:.0f} s")])
    if choice is not None:
        print()
        print_table(*choice.cells())
    if measured is not None and measured.compared:
        print()
        print_text(f"What baselines lose on {measured.text}; {plan.method} was written:")
        print_table(*measured.cells(), text_columns=2)


def _next_steps(request: PruneRequest, outcome: PruneOutcome) -> list[str]:
    """The commands that show what the result lost, and what it is, as far as this one did not."""
    made, output = outcome.plan.provenance, str(outcome.written)
    steps = [] if request.report else [["report", output]]
    if outcome.measured is None and (made is None or (made.search is None and made.choice is None)):
        text = request.calibration if is_corpus(request.calibration) else "TEXT"
        steps.insert(0, ["evaluate", output, "--against", request.model, "--text", text])
    return [shlex.join(["ghostssm", *step]) for step in steps]


def _print_serving(state_dtype: str, described: Description, engines: Sequence[str]) -> None:
    """Print how the engines that were named, or all, are told the state's dtype, and transformers with our loops."""
    from ghostssm.cli.serving import print_states
    from ghostssm.workflows.inspect import serving_engines

    print()
    print_states(serving_engines(engines, described), described.config, [state_dtype])
    if state_dtype != "float32":
        print()
        print_text(
            f'transformers keeps it so after ghostssm.accelerate(model, state_dtype="{state_dtype}"); ghostssm '
            "generate and ghostssm evaluate do so by themselves."
        )
