"""What a report shows of a checkpoint's folder, or of a comparison."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ghostssm._version import __version__
from ghostssm.checkpoint.description import Description, describe
from ghostssm.checkpoint.manifest import Manifest
from ghostssm.errors import ModelError
from ghostssm.evaluation.roofline import Machine
from ghostssm.plan.measurement import Measurement
from ghostssm.plan.plan import Plan
from ghostssm.report.figures import MOST_CHANNELS, Figure
from ghostssm.report.figures.cost import decode_figure, size_figure, window_figure
from ghostssm.report.figures.state import hankel_figure, phantom_figure, saliency_figure
from ghostssm.report.page import Card, Report, Table
from ghostssm.units import bytes_text, plus_minus, sizes_text, text_name
from ghostssm.workflows.comparison import Basis, Comparison, Row, comparison_cells
from ghostssm.workflows.observing import predicted_speed
from ghostssm.workflows.record import DecodeSpeed, Record, WindowLosses

_NO_LOSS = 700.0
"""No loss is so large: its perplexity would be no number."""


def checkpoint_report(folder: Path) -> Report:
    """Of a checkpoint that ghostssm wrote: its plan, manifest and record, as far as they are there.

    Raises:
        PlanError: the folder holds no plan, or a broken one.
        InputError: its manifest or record is broken.
    """
    plan = Plan.read(folder, changes=False)
    manifest = Manifest.read(folder) if Manifest.is_in(folder) else None
    record = Record.read(folder, list(plan.selections), (plan.n_groups, plan.state_size))
    described = _described(folder)
    measured = None if manifest is None else manifest.measured
    figures: list[Figure] = []
    if record.observations is not None:
        figures += [phantom_figure(record.observations, plan), hankel_figure(record.observations, plan)]
    if plan.has_scores:
        figures.append(saliency_figure({plan.method: plan}))
    if record.losses is not None:
        figures.append(window_figure(record.losses))
    if record.decode:
        figures.append(decode_figure(record.decode))
    sizes = sizes_text(plan.state_sizes)
    base = None if manifest is None else manifest.base_model
    return Report(
        title=f"{Path(base or plan.model_type).name}: state size {plan.state_size} to {sizes}",
        subtitle=f"method {plan.method}, family {plan.model_type}",
        cards=[
            *_state_cards(plan, described),
            *_loss_cards(measured),
            *_speed_cards(record.decode),
        ],
        figures=figures,
        missing=_missing(plan, record, manifest),
        details={} if manifest is None else {"Manifest": manifest.as_json()},
    )


def comparison_report(comparison: Comparison) -> Report:
    """Of methods and sizes side by side, as `ghostssm.compare` found them for a request with ``report``."""
    basis = comparison.basis
    assert basis is not None
    described, windows, observations = basis.description, basis.evaluation, basis.observations
    dense, *others = comparison.rows
    labels = {(row.label, row.state_size): f"{row.label}, N' = {row.state_size}" for row in others}
    found = {labels[cell]: evaluation for cell, evaluation in comparison.evaluations.items() if cell in labels}
    losses = WindowLosses.of(windows, comparison.evaluations[dense.method, dense.state_size], found)
    figures = [size_figure(comparison.rows), window_figure(losses)] if others else []
    speeds = _speeds(comparison, described, basis.machine)
    if speeds:
        figures.append(decode_figure(speeds))
    if observations is not None:
        figures += [phantom_figure(observations), hankel_figure(observations)]
    figures += _comparison_saliency(comparison.plans)
    cards = [
        Card("Dense model", f"{dense.perplexity:.3f}", f"perplexity, N = {dense.state_size}"),
        Card("State per sequence, dense", bytes_text(dense.state_bytes), "float32, all layers"),
    ]
    for size in sorted({row.state_size for row in others}, reverse=True):
        best = min((row for row in others if row.state_size == size), key=lambda row: row.excess)
        cards.append(
            Card(f"Best at N' = {size}", best.label, f"excess loss {plus_minus(best.excess, best.standard_error)}")
        )
    return Report(
        title=f"{Path(described.name).name}: methods compared",
        subtitle=f"{len(windows)} windows of {windows.length} tokens of {text_name(windows.text_name)}",
        cards=cards,
        figures=figures,
        tables=[Table("All figures", *comparison_cells(comparison.rows))],
        details={"Settings": _settings(basis)},
    )


def _settings(basis: Basis) -> dict[str, Any]:
    """What the comparison was asked for, and what the texts gave."""
    texts = {
        role: {"text": text_name(part.text_name), "windows": len(part), "window_length": part.length}
        for role, part in (("calibration", basis.calibration), ("evaluation", basis.evaluation))
    }
    return {"ghostssm": __version__, **basis.request.as_json(), "device": basis.request.device, **texts}


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
    """Of the dense model and of every shape of state once: methods that give the same one decode alike."""
    names: dict[str, tuple[Row, Plan | None]] = {}
    for row in comparison.rows:
        plan = comparison.plans.get((row.method, row.state_size))
        name = "dense" if plan is None else f"N' = {plan.kept_state_size}"
        if plan is not None and plan.needs_own_class:
            name = f"{row.method}, N' = {row.state_size}"
        names.setdefault(name, (row, plan))
    return [
        DecodeSpeed(name, batch, speed, None if machine is None else predicted_speed(described, machine, batch, plan))
        for name, (row, plan) in names.items()
        for batch, speed in row.tokens_per_second.items()
    ]


def _described(folder: Path) -> Description | None:
    try:
        return describe(str(folder))
    except ModelError:
        return None


def _state_cards(plan: Plan, described: Description | None) -> list[Card]:
    layers = f"{len(plan.selections)} layers"
    note = f"mean {plan.mean_state_size:.4g} over {layers}" if plan.needs_own_class else f"in each of {layers}"
    cards = [Card("State size", f"{plan.state_size} → {sizes_text(plan.state_sizes)}", note)]
    if described is not None:
        before, after = described.state_bytes(plan.state_size), described.state_bytes()
        cards.append(
            Card(
                "State per sequence",
                f"{bytes_text(before)} → {bytes_text(after)}",
                f"{1 - after / before:.0%} less; float32, all layers",
            )
        )
    return cards


def _loss_cards(measured: Measurement | None) -> list[Card]:
    """From the manifest, which may be anybody's: what can't be a loss is not shown."""
    if measured is None:
        return []
    losses = (measured.dense_loss, measured.pruned_loss, measured.excess.mean)
    if not all(abs(loss) < _NO_LOSS for loss in losses):
        return []
    where = f"{measured.windows} windows of {measured.window_length} tokens of {text_name(measured.text)}"
    perplexities = f"{math.exp(measured.dense_loss):.3f} → {math.exp(measured.pruned_loss):.3f}"
    return [
        Card("Excess loss", measured.excess_text, f"nats per token; {where}"),
        Card("Perplexity", perplexities, "dense, pruned"),
    ]


def _speed_cards(speeds: Sequence[DecodeSpeed]) -> list[Card]:
    by_batch = {
        batch: {speed.model: speed.tokens_per_second for speed in speeds if speed.batch == batch}
        for batch in sorted({speed.batch for speed in speeds})
    }
    ratios = {
        batch: found["pruned"] / found["dense"]
        for batch, found in by_batch.items()
        if {"dense", "pruned"} <= set(found)
    }
    if not ratios:
        return []
    best = max(ratios, key=lambda batch: ratios[batch])
    rest = ", ".join(f"{ratio:.2f}x at {batch}" for batch, ratio in ratios.items() if batch != best)
    return [Card("Decoding", f"{ratios[best]:.2f}x dense", f"measured at batch {best}" + (f"; {rest}" if rest else ""))]


def _missing(plan: Plan, record: Record, manifest: Manifest | None) -> list[tuple[str, str]]:
    base = (None if manifest is None else manifest.base_model) or "MODEL"
    made = plan.provenance
    size = plan.kept_state_size if made is None else made.requested_state_size
    words = ["ghostssm", "prune", base, "--method", plan.method, "--state-size", str(size), "--output", "DIR"]
    again = shlex.join(words)
    if made is not None:
        seen = made.calibration
        again += f" --calibration {shlex.quote(seen.text)} --windows {seen.windows}"
        again += f" --window-length {seen.window_length}"
        again += " --groups pooled" if made.groups == "pooled" else ""
    missing = []
    reported = {"phantom plot and Hankel singular values": record.observations, "decode speed": record.decode}
    if unreported := [what for what, found in reported.items() if not found]:
        missing.append((", ".join(unreported), f"{again} --report"))
    if record.losses is None or manifest is None or manifest.measured is None:
        missing.append(("excess loss and its windows", f"{again} --evaluate TEXT"))
    if not plan.has_scores:
        missing.append(("scores", again))
    if manifest is None:
        missing.append(("what produced the checkpoint (ghostssm.json)", again))
    return missing
