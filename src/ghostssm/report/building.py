"""The reports of a checkpoint's folder and of a comparison: what pruning cost, what it bought, what the state does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ghostssm.checkpoint.description import Description, describe
from ghostssm.checkpoint.manifest import Manifest
from ghostssm.checkpoint.place import is_hub_id
from ghostssm.engines.capacity import DEFAULT_CONTEXT, Footprint, capacity_cells
from ghostssm.errors import ModelError
from ghostssm.evaluation.roofline import Machine
from ghostssm.ops.state_format import FLOAT32, StateFormat
from ghostssm.plan.distillation import Distillation
from ghostssm.plan.measurement import Measurement
from ghostssm.plan.plan import Plan
from ghostssm.report.figures import MOST_CHANNELS, Figure
from ghostssm.report.figures.cost import (
    baselines_figure,
    capacity_figure,
    decode_figure,
    size_figure,
    speed_figure,
    window_figure,
)
from ghostssm.report.figures.state import hankel_figure, phantom_figure, saliency_figure
from ghostssm.report.figures.training import distillation_figure
from ghostssm.report.page import Card, Report, Section, Table, Texts
from ghostssm.report.telling import (
    advice_of,
    command,
    engine_tables,
    is_distilled,
    manifest_table,
    prune_command,
    repeating_command,
    running,
)
from ghostssm.units import bytes_text, plus_minus, sizes_text, text_name
from ghostssm.workflows.compare_result import Comparison, Row, comparison_cells, labelled
from ghostssm.workflows.report_measuring import predicted_speed
from ghostssm.workflows.report_record import DecodeSpeed, Record, Samples, WindowLosses

_NO_LOSS = 700.0
"""No loss is as large as this: the exponential of it overflows."""
_MEMORIES = (24 << 30, 80 << 30, 141 << 30)
"""Bytes of GPUs that are sold as having 24, 80 and 141 GB."""
_COST, _BOUGHT, _STATE = "What it cost", "What it bought", "What the state does"


def checkpoint_report(folder: Path, state_dtype: str | None = None) -> Report:
    """The report of a checkpoint that ghostssm wrote, from its plan, and its manifest and record if they are there.

    Args:
        state_dtype: in which the state is kept; that which the plan says, or float32, if not given. What was measured
            in another dtype is left out.

    Raises:
        PlanError: the folder holds no plan, or a broken one.
        InputError: its manifest or record is broken.
    """
    plan = Plan.read(folder, changes=False)
    manifest = Manifest.read(folder) if Manifest.is_in(folder) else None
    record = Record.read(folder, list(plan.selections), (plan.n_groups, plan.state_size))
    measured, form = None if manifest is None else manifest.measured, StateFormat.of(plan.state_dtype or FLOAT32)
    if state_dtype is not None and StateFormat.of(state_dtype) != form:
        record, measured, form = record.kept_in(state_dtype), None, StateFormat.of(state_dtype)
    described = _described(folder)
    sizes = sizes_text(plan.state_sizes)
    bought: list[Figure | Table | Texts] = []
    if record.decode:
        names = {"pruned": _in_dtype("pruned", form)}
        bought += [decode_figure([replace(each, model=names.get(each.model, each.model)) for each in record.decode])]
    if described is not None:
        footprints = {f"N = {plan.state_size}": described.footprint(plan.state_size)}
        footprints[_in_dtype(f"N' = {sizes}", form)] = described.footprint(form=form)
        bought += [*_capacity(footprints), *engine_tables({f"N' = {sizes}": advice_of(described, None, written=True)})]
    state = [saliency_figure({plan.method: plan})] if plan.has_scores else []
    if (seen := record.observations) is not None:
        state[:0] = [phantom_figure(seen, plan), hankel_figure(seen, plan)]
    made: list[Figure | Table | Texts] = [] if manifest is None else [manifest_table(manifest)]
    lost: list[Figure | Table | Texts] = [window_figure(record.losses)] if record.losses else []
    lost += [*_baselines(measured), *_trainings({"training": plan})]
    base = None if manifest is None else manifest.base_model
    return Report(
        title=f"{Path(base or plan.model_type).name}: state size {plan.state_size} to {sizes}",
        subtitle=_in_dtype(f"method {plan.method}, family {plan.model_type}", form),
        cards=[
            *_loss_cards(measured, form),
            *map(_training_card, plan.distillations),
            *_state_cards(plan, described, form),
            *_speed_cards(record.decode, form),
        ],
        sections=[
            Section(_COST, [*lost, *_texts(record.samples)]),
            Section(_BOUGHT, bought),
            Section(_STATE, state),
            Section("Where it comes from", [*made, _repeating(repeating_command(plan, manifest))]),
        ],
        missing=_missing(plan, record, manifest, measured is not None, form),
        details={} if manifest is None else {"All of ghostssm.json": manifest.as_json()},
    )


def comparison_report(comparison: Comparison) -> Report:
    """The report of methods and sizes side by side; the comparison's request had ``report``."""
    basis = comparison.basis
    assert basis is not None
    described, windows, observations = basis.description, basis.evaluation, basis.observations
    dense, *others = comparison.rows
    labels = {(row.label, row.state_size): _label(row) for row in others}
    pruned = {labels[cell]: evaluation for cell, evaluation in comparison.evaluations.items() if cell in labels}
    losses = WindowLosses.of(windows, comparison.evaluations[dense.method, dense.state_size], pruned)
    cost: list[Figure | Table | Texts] = [size_figure(comparison.rows), window_figure(losses)] if others else []
    cost += _trainings({f"{method}, N' = {size}": plan for (method, size), plan in comparison.plans.items()})
    bought: list[Figure | Table | Texts] = []
    if speeds := _speeds(comparison, described, basis.machine):
        bought += [speed_figure(comparison.rows)] if others else []
        bought += [decode_figure(speeds)]
    footprints = {f"N = {dense.state_size}": described.footprint()}
    advice = {f"N = {dense.state_size}": advice_of(described, None)}
    ranked = sorted(comparison.plans.values(), key=lambda plan: (plan.needs_own_class, -plan.kept_state_size))
    for plan in ranked:
        size = f"N' = {plan.kept_state_size}"
        smaller = replace(described, state_sizes=plan.state_sizes)
        own = plan.needs_own_class
        footprints.setdefault(size, smaller.footprint() if own else described.footprint(plan.kept_state_size))
        advice.setdefault("own class" if own else size, advice_of(described, plan))
    bought += [*_capacity(footprints), *engine_tables(advice)]
    name = described.name if is_hub_id(described.name) else text_name(described.name)
    asked = {**basis.request.as_json(), "model": name, "report": "FILE"}
    seen = [] if observations is None else [phantom_figure(observations), hankel_figure(observations)]
    return Report(
        title=f"{Path(described.name).name}: methods compared",
        subtitle=f"{len(windows)} windows of {windows.length} tokens of {text_name(windows.text_name)}",
        cards=[
            Card("Dense model", f"{dense.perplexity:.3f}", f"perplexity, N = {dense.state_size}"),
            Card("State per sequence, dense", bytes_text(dense.state_bytes), "float32, all layers"),
            *_best_cards(comparison, described),
        ],
        sections=[
            Section(_COST, [*cost, Table("All figures", *comparison_cells(comparison.rows)), *_texts(basis.samples)]),
            Section(_BOUGHT, bought),
            Section(_STATE, [*seen, *_comparison_saliency(comparison.plans)]),
            Section("Where it comes from", [_repeating(command("compare", asked))]),
        ],
    )


def _label(row: Row) -> str:
    return f"{row.label}, N' = {row.state_size}"


def _best_cards(comparison: Comparison, described: Description) -> list[Card]:
    dense = comparison.rows[0]
    cards = []
    for contest in comparison.contests:
        at = f"at N' = {contest}" if isinstance(contest, int) else f"within {contest} of the state's bytes"
        for row in comparison.best(contest):
            plan = comparison.plans[row.method, row.state_size]
            where = "in any class" if plan.needs_own_class else "in a stock checkpoint"
            notes = [f"excess loss {plus_minus(row.excess, row.standard_error)}"]
            if speeds := row.tokens_per_second:
                batch = max(speeds)
                notes.append(f"{speeds[batch] / dense.tokens_per_second[batch]:.2f}x the dense speed at batch {batch}")
            notes.append(running(advice_of(described, plan)))
            cards.append(Card(f"Best {at} {where}", row.label, "; ".join(notes)))
    return cards


def _capacity(footprints: Mapping[str, Footprint]) -> list[Figure | Table | Texts]:
    figure = capacity_figure(footprints, _MEMORIES, DEFAULT_CONTEXT)
    return [figure, Table("What a sequence takes", *capacity_cells(footprints))]


def _texts(samples: Samples | None) -> list[Figure | Table | Texts]:
    if samples is None:
        return []
    caption = f"The likeliest token each time, after the same prompt, the beginning of a window of {samples.text}."
    return [Texts("How the models go on", {"prompt": samples.prompt, **samples.continuations}, caption)]


def _trainings(plans: Mapping[str, Plan]) -> list[Figure]:
    """The curves of all distillations that plans tell of."""
    trainings = {
        label if number == 1 else f"{label} {number}": training
        for label, plan in plans.items()
        for number, training in enumerate(plan.distillations, 1)
    }
    return [distillation_figure(trainings)] if trainings else []


def _repeating(words: str) -> Texts:
    return Texts(
        "The command that repeats it",
        {"": words},
        "Models and texts are named without their folders. Options at their default are left out.",
    )


def _comparison_saliency(plans: Mapping[tuple[str, int], Plan]) -> list[Figure]:
    """Scores of as many plans as a page holds, the smallest sizes first."""
    drawn: dict[str, Plan] = {}
    room = MOST_CHANNELS
    for (method, size), plan in sorted(plans.items(), key=lambda item: item[0][1]):
        room -= len(plan.selections) * plan.n_groups * plan.state_size
        if plan.has_scores and (room >= 0 or not drawn):
            drawn[f"{method}, N' = {size}"] = plan
    return [saliency_figure(drawn)] if drawn else []


def _speeds(comparison: Comparison, described: Description, machine: Machine | None) -> list[DecodeSpeed]:
    """The speeds of the dense model and of every shape of state, each once: methods of one shape decode alike."""
    names: dict[str, tuple[Row, Plan | None]] = {}
    for row in comparison.rows:
        plan = comparison.plans.get((row.method, row.state_size))
        name = "dense" if plan is None else f"N' = {plan.kept_state_size}"
        if plan is not None and plan.needs_own_class:
            name = f"{row.method}, N' = {row.state_size}"
        names.setdefault(labelled(name, row.state_dtype), (row, plan))
    return [
        DecodeSpeed(
            name,
            batch,
            speed,
            None
            if machine is None
            else predicted_speed(described, machine, batch, plan, StateFormat.of(row.state_dtype)),
            row.speed_range.get(batch),
        )
        for name, (row, plan) in names.items()
        for batch, speed in row.tokens_per_second.items()
    ]


def _described(folder: Path) -> Description | None:
    try:
        return describe(str(folder))
    except ModelError:
        return None


def _in_dtype(label: str, form: StateFormat) -> str:
    """A label with the dtype of the state, if that is not float32."""
    return label if form == FLOAT32 else f"{label}, state in {form.name}"


def _state_cards(plan: Plan, described: Description | None, form: StateFormat) -> list[Card]:
    layers = f"{len(plan.selections)} layers"
    note = f"mean {plan.mean_state_size:.4g} over {layers}" if plan.needs_own_class else f"in each of {layers}"
    cards = [Card("State size", f"{plan.state_size} → {sizes_text(plan.state_sizes)}", note)]
    if described is not None:
        before, after = described.state_bytes(plan.state_size), described.state_bytes(form=form)
        dtypes = "float32" if form == FLOAT32 else f"float32 → {form.name}"
        cards.append(
            Card(
                "State per sequence",
                f"{bytes_text(before)} → {bytes_text(after)}",
                f"{1 - after / before:.0%} less; {dtypes}, all layers",
            )
        )
    return cards


def _loss_cards(measured: Measurement | None, form: StateFormat) -> list[Card]:
    """What the manifest says of the loss. Anybody may have written it, so what can't be a loss is not shown."""
    if measured is None:
        return []
    losses = (measured.dense_loss, measured.pruned_loss, measured.excess.mean)
    if not all(abs(loss) < _NO_LOSS for loss in losses):
        return []
    where = f"{measured.windows} windows of {measured.window_length} tokens of {text_name(measured.text)}"
    perplexities = f"{math.exp(measured.dense_loss):.3f} → {math.exp(measured.pruned_loss):.3f}"
    return [
        Card("Excess loss", measured.excess_text, _in_dtype(f"nats per token; {where}", form)),
        Card("Perplexity", perplexities, "dense, pruned"),
    ]


def _baselines(measured: Measurement | None) -> list[Figure | Table]:
    """The pruned model among the baselines that were measured beside it."""
    if measured is None or not measured.compared:
        return []
    caption = f"{measured.compared[0].recipe} is this checkpoint. Losses are over the dense model's, in nats per token."
    return [baselines_figure(measured), Table("The same in figures", *measured.cells(), caption)]


def _training_card(training: Distillation) -> Card:
    where = f"excess loss on {training.held_out_windows} held-out windows of {text_name(training.text)}"
    change = f"{training.curve[0].excess.mean:z.4f} → {training.best.excess.mean:z.4f}"
    return Card("Distillation", change, f"{where}; {training.tokens:,} tokens of training")


def _speed_cards(speeds: Sequence[DecodeSpeed], form: StateFormat) -> list[Card]:
    by_batch = {
        batch: {speed.model: speed.tokens_per_second for speed in speeds if speed.batch == batch}
        for batch in sorted({speed.batch for speed in speeds})
    }
    ratios = {
        batch: rates["pruned"] / rates["dense"]
        for batch, rates in by_batch.items()
        if {"dense", "pruned"} <= set(rates)
    }
    if not ratios:
        return []
    best = max(ratios, key=lambda batch: ratios[batch])
    rest = ", ".join(f"{ratio:.2f}x at {batch}" for batch, ratio in ratios.items() if batch != best)
    note = f"measured at batch {best}" + (f"; {rest}" if rest else "")
    return [Card("Decoding", f"{ratios[best]:.2f}x dense", _in_dtype(note, form))]


def _missing(
    plan: Plan, record: Record, manifest: Manifest | None, measured: bool, form: StateFormat
) -> list[tuple[str, str]]:
    if manifest is not None and is_distilled(manifest):
        return _missing_of_distilled(plan, manifest)
    kept: dict[str, Any] = {}
    if form.name != (plan.state_dtype or FLOAT32.name):
        kept = {"state_dtype": form.name}
        if plan.provenance is not None and plan.provenance.choice is not None:
            kept |= {"state_bytes": None, "state_size": plan.provenance.requested_state_size}
    missing, in_memory = [], {"stream": False, "offload": None, "resume": False, **kept}
    reported = {"phantom plot and Hankel singular values": record.observations, "decode speed": record.decode}
    if unreported := [what for what, part in reported.items() if not part]:
        missing.append((", ".join(unreported), prune_command(plan, manifest, report=True, **in_memory)))
    if record.losses is None or not measured:
        missing.append(("excess loss and its windows", prune_command(plan, manifest, evaluate="TEXT", **kept)))
    elif record.samples is None:
        missing.append(("texts of the models", prune_command(plan, manifest, report=True, **in_memory)))
    if not plan.has_scores:
        missing.append(("scores", prune_command(plan, manifest)))
    if manifest is None:
        missing.append(("what produced the checkpoint (ghostssm.json)", prune_command(plan, manifest)))
    return missing


def _missing_of_distilled(plan: Plan, manifest: Manifest) -> list[tuple[str, str]]:
    """What a distilled checkpoint lacks. Dense state and speed are those of the student: its own page has them."""
    request = manifest.request or {}
    missing = [("phantom plot, Hankel singular values, decode speed", command("report", {"model": request["student"]}))]
    if manifest.measured is None:
        missing.append(("excess loss on other text", repeating_command(plan, manifest, evaluate="TEXT")))
    return missing
