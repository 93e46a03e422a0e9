"""``ghostssm inspect``: what a checkpoint is, without loading its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ghostssm.cli import arguments
from ghostssm.cli.console import bytes_text, print_facts, print_json, print_table

if TYPE_CHECKING:
    from ghostssm import Advice


def inspect(
    model: arguments.Model,
    state_size: Annotated[
        list[int] | None, typer.Option("--state-size", metavar="R ...", help="Also say what these state sizes save.")
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option("--batch", metavar="B ...", help="Also predict decode speed at these batch sizes."),
    ] = None,
    engine: arguments.Engines = None,
    as_json: arguments.AsJson = False,
) -> None:
    """Show a model's sizes, the state it keeps per sequence, and which engines run it; weights are not loaded.

    ghostssm inspect reference
    ghostssm inspect state-spaces/mamba2-1.3b --state-size 64 32 --batch 1 64
    """
    from ghostssm import advise, describe
    from ghostssm.bench.roofline import measure_machine, predicted_step_seconds
    from ghostssm.errors import InputError
    from ghostssm.feasibility import check_state_size

    batches = batch or []
    if any(count < 1 for count in batches):
        raise InputError(f"The batch size is {min(batches)}; expected at least 1.")
    found = describe(model)
    layout = found.layout
    if state_size and not found.is_stock:
        raise InputError(
            f"{model} has a projected state or a state size per layer; inspect the original model for cuts."
        )
    sizes = [None, *(state_size or [])]
    for size in state_size or []:
        check_state_size(size, layout.state_size)
    advice = [
        advise(
            layout if size is None else layout.with_state_size(size),
            found.family,
            engines=engine,
            own_class=not found.is_stock,
            tied_head=found.tied_head,
        )
        for size in sizes
    ]
    machine = measure_machine(batches) if batches else None
    cuts: list[dict[str, Any]] = [
        {
            "state_size": sum(found.state_sizes) / found.layers if size is None else size,
            "state_bytes_float32": found.state_bytes(size),
            "state_bytes_bfloat16": found.state_bytes(size, bytes_per_number=2),
            "saved_fraction": 1 - found.state_bytes(size) / found.state_bytes(layout.state_size),
            "parameters": found.parameters - found.removed_parameters(size),
            "predicted_tokens_per_second": {
                count: count / predicted_step_seconds(found, machine, count, size) for count in batches if machine
            },
            "engines": [dataclasses.asdict(entry) for entry in entries],
        }
        for size, entries in zip(sizes, advice, strict=True)
    ]
    if as_json:
        print_json(dataclasses.asdict(found) | {"layers": found.layers, "cuts": cuts})
        return
    print_facts(
        [
            ("model", found.name),
            ("family", f"{found.family}, {found.dialect} dialect"),
            ("Mamba-2 layers", str(found.layers)),
            ("heads", f"{layout.num_heads} of {layout.head_dim}"),
            ("groups", str(layout.n_groups)),
            ("state size N", str(layout.state_size)),
            ("hidden size", str(layout.hidden_size)),
            ("vocabulary", str(found.vocab_size)),
            ("parameters", f"{found.parameters:,}"),
        ]
    )
    print()
    print_table(
        [
            *("N'", "state per sequence, fp32", "bf16", "saved", "parameters"),
            *(f"predicted tok/s, batch {count}" for count in batches),
        ],
        [
            (
                f"{cut['state_size']:g}",
                bytes_text(cut["state_bytes_float32"]),
                bytes_text(cut["state_bytes_bfloat16"]),
                f"{cut['saved_fraction']:.0%}",
                f"{cut['parameters']:,}",
                *(f"{speed:,.0f}" for speed in cut["predicted_tokens_per_second"].values()),
            )
            for cut in cuts
        ],
    )
    print()
    _print_advice([f"{cut['state_size']:g}" for cut in cuts], advice)


def _print_advice(sizes: Sequence[str], advice: Sequence[Sequence[Advice]]) -> None:
    """Engines by state sizes, then the reasons: of all sizes at once where they agree."""
    by_engine = list(zip(*advice, strict=True))
    rows = [(entries[0].engine, *(entry.level for entry in entries)) for entries in by_engine]
    print_table(["engine", *(f"N' = {size}" for size in sizes)], rows)
    print()
    for entries in by_engine:
        reasons: dict[str, list[str]] = {}
        for size, entry in zip(sizes, entries, strict=True):
            if entry.reason:
                reasons.setdefault(f"{entry.level}: {entry.reason}", []).append(size)
        for reason, where in reasons.items():
            print(f"{entries[0].engine}, N' = {', '.join(where)}: {reason}.")
