"""``ghostssm inspect``: what a checkpoint is, without loading its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ghostssm.cli import serving
from ghostssm.cli.console import print_facts, print_json, print_table, print_text
from ghostssm.cli.parsing import AsJson, asks_for
from ghostssm.units import bytes_text, duration_text, sizes_text
from ghostssm.workflows.requests import InspectRequest

if TYPE_CHECKING:
    from ghostssm import Description
    from ghostssm.workflows.inspect import Cut, Fit


@asks_for(InspectRequest)
def inspect(request: InspectRequest, as_json: AsJson = False) -> None:
    """Show a model's sizes, its state per sequence and which engines run it. Weights are not loaded.

    ghostssm inspect reference --state-bytes 1/4 1/8
    ghostssm inspect state-spaces/mamba2-1.3b --state-size 64 32 --memory 80GiB
    """
    from ghostssm.workflows.inspect import inspect as use_case

    outcome = use_case(request)
    if as_json:
        print_json(outcome.as_json())
        return
    described, cuts = outcome.description, outcome.cuts
    print_facts(_facts(described))
    print()
    labels = [sizes_text(described.state_sizes), *map(str, request.state_sizes)]
    _print_cuts(labels, cuts, request.batches)
    print()
    if outcome.fits:
        _print_fits(outcome.fits)
        print()
    if (forecast := outcome.forecast) is not None:
        print_text(
            f"A prune with GHOST on {forecast.tokens:,} tokens takes about {duration_text(forecast.seconds)} here, and "
            f"about {bytes_text(forecast.memory)} of memory, {bytes_text(forecast.streamed_memory)} with --stream."
        )
        print()
    if request.memories:
        admitted = {label: cut.admitted for label, cut in zip(labels, cuts, strict=True)}
        serving.print_admissions(admitted, outcome.context)
    if request.memories or request.state_dtypes:
        serving.print_states(outcome.serving, described.config, [form.name for form in outcome.forms])
        print()
    _print_advice(labels, cuts)


def _facts(described: Description) -> list[tuple[str, str]]:
    layout = described.layout
    active = f", of which a token meets {described.active_parameters:,}" if described.expert_parameters else ""
    return [
        ("model", described.name),
        ("family", f"{described.family}, {described.dialect} dialect"),
        ("Mamba-2 layers", str(described.layers)),
        ("heads", f"{layout.num_heads} of {layout.head_dim}"),
        ("groups", str(layout.n_groups)),
        *_state_facts(described),
        ("hidden size", str(layout.hidden_size)),
        ("vocabulary", str(described.vocab_size)),
        ("parameters", f"{described.parameters:,}{active}"),
    ]


def _state_facts(described: Description) -> list[tuple[str, str]]:
    """The state size, and how it came about in a pruned checkpoint."""
    from ghostssm.ops.state_format import TIERS

    stored, pruning = _all_sizes(described.state_sizes), described.pruning
    if pruning is None:
        return [("state size N", stored)]
    padding = "" if pruning.kept == described.state_sizes else f", padded to {stored}"
    facts = [
        ("state size", f"{pruning.state_size} -> {_all_sizes(pruning.kept)}{padding}"),
        ("pruned by", pruning.method),
    ]
    if pruning.state_dtype is not None:
        size = f", {bytes_text(described.state_bytes(form=TIERS))} per sequence" if described.tiers else ""
        facts.append(("state chosen for", pruning.state_dtype + size))
    if pruning.measured is not None:
        facts.append(("excess loss", f"{pruning.measured.excess_text} nats per token, on {pruning.measured.text}"))
    return facts


def _all_sizes(sizes: Sequence[int]) -> str:
    """One size, or those of all layers."""
    return " ".join(map(str, sizes if len(set(sizes)) > 1 else sizes[:1]))


def _print_cuts(labels: Sequence[str], cuts: Sequence[Cut], batches: Sequence[int]) -> None:
    """What each state size takes and saves."""
    headers = ["N'", "state per sequence, fp32", "the same in bf16", "saved", "parameters"]
    headers += [f"predicted tok/s, batch {batch}" for batch in batches]
    lines = [
        (
            label,
            bytes_text(cut.state_bytes_float32),
            bytes_text(cut.state_bytes_bfloat16),
            f"{cut.saved_fraction:.0%}",
            f"{cut.parameters:,}",
            *(f"{speed:,.0f}" for speed in cut.predicted_tokens_per_second.values()),
        )
        for label, cut in zip(labels, cuts, strict=True)
    ]
    print_table(headers, lines)


def _print_fits(fits: Sequence[Fit]) -> None:
    """The states that fit into so many bytes, by bound."""
    from ghostssm.report.telling import engines_text

    headers = ["within", "runs in", "N'", "state dtype", "state/seq"]
    lines = [
        [
            fit.within,
            engines_text(fit.engines) or "transformers with ghostssm.accelerate",
            str(fit.state_size),
            fit.state_dtype,
            bytes_text(fit.state_bytes),
        ]
        for fit in fits
    ]
    print_table(headers, lines, text_columns=2)
    print_text("ghostssm prune --state-bytes measures which of them loses least.")


def _print_advice(sizes: Sequence[str], cuts: Sequence[Cut]) -> None:
    """Engines by state sizes, then the reasons, each once."""
    from ghostssm.engines.verdicts import Verdicts

    verdicts = Verdicts.of({f"N' = {size}": cut.engines for size, cut in zip(sizes, cuts, strict=True)})
    print_table(["engine", *(f"N' = {size}" for size in sizes)], verdicts.rows)
    if verdicts.reasons or verdicts.notes:
        print()
    for engines, reason in verdicts.reasons:
        print_text(f"{engines}: {reason}.")
    for sentence in verdicts.notes:
        print_text(sentence)
