"""``ghostssm inspect``: what a checkpoint is, without loading its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ghostssm.cli import arguments, serving
from ghostssm.cli.console import bytes_text, print_facts, print_json, print_table

if TYPE_CHECKING:
    from ghostssm import Advice, Description


def inspect(
    model: arguments.Model,
    state_size: Annotated[
        list[int] | None, typer.Option("--state-size", metavar="R ...", help="Also say what these state sizes save.")
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option("--batch", metavar="B ...", help="Also predict decode speed at these batch sizes."),
    ] = None,
    state_dtype: Annotated[
        list[str] | None,
        typer.Option(
            "--state-dtype",
            metavar="NAME ...",
            help="Also say how to serve it with such a state: float32, bfloat16, float16, int8, fp8 or int4.",
        ),
    ] = None,
    memory: Annotated[
        list[str] | None,
        typer.Option("--memory", metavar="SIZE ...", help="Also say how many sequences engines take in 80GiB, say."),
    ] = None,
    context: Annotated[
        int,
        typer.Option("--context", metavar="TOKENS", min=1, help="With --memory: tokens of a sequence."),
    ] = 8192,
    engine: arguments.Engines = None,
    as_json: arguments.AsJson = False,
) -> None:
    """Show a model's sizes, the state it keeps per sequence, and which engines run it; weights are not loaded.

    ghostssm inspect reference
    ghostssm inspect state-spaces/mamba2-1.3b --state-size 64 32 --state-dtype float32 bfloat16 --memory 80GiB
    """
    from ghostssm import advise, describe
    from ghostssm.errors import InputError
    from ghostssm.evaluation.roofline import measure_machine, predicted_step_seconds
    from ghostssm.ops.state_format import BFLOAT16, StateFormat
    from ghostssm.pruning.feasibility import check_state_size
    from ghostssm.units import memory_bytes

    batches = batch or []
    if any(count < 1 for count in batches):
        raise InputError(f"The batch size is {min(batches)}; expected at least 1.")
    memories = [memory_bytes(size) for size in memory or []]
    forms = [StateFormat.of(name) for name in state_dtype or ["float32"]]
    found = describe(model)
    told = serving.engines_told(engine, found)
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
            dialect=found.dialect if size is None else None,  # what prune writes is in the dialect that is wanted
            own_class=not found.is_stock,
            tied_head=found.tied_head,
            config=found.config,
        )
        for size in sizes
    ]
    before = found.state_bytes(layout.state_size if found.pruning is None else found.pruning.state_size)
    machine = measure_machine(batches) if batches else None
    cuts: list[dict[str, Any]] = [
        {
            "state_size": sum(found.state_sizes) / found.layers if size is None else size,
            "state_bytes_float32": found.state_bytes(size),
            "state_bytes_bfloat16": found.state_bytes(size, BFLOAT16),
            "saved_fraction": 1 - found.state_bytes(size) / before,
            "parameters": found.parameters - found.removed_parameters(size),
            "predicted_tokens_per_second": {
                count: count / predicted_step_seconds(found, machine, count, size) for count in batches if machine
            },
            "kept": serving.kept(found, size, forms, context),
            "admitted": serving.admissions(found, size, forms, context, memories, told),
            "engines": [dataclasses.asdict(entry) for entry in entries],
        }
        for size, entries in zip(sizes, advice, strict=True)
    ]
    if as_json:
        facts = {name: value for name, value in dataclasses.asdict(found).items() if name != "config"}
        states = {each.name: each.states.as_json(found.config) for each in told}
        print_json(facts | {"layers": found.layers, "context": context, "cuts": cuts, "states": states})
        return
    print_facts(
        [
            ("model", found.name),
            ("family", f"{found.family}, {found.dialect} dialect"),
            ("Mamba-2 layers", str(found.layers)),
            ("heads", f"{layout.num_heads} of {layout.head_dim}"),
            ("groups", str(layout.n_groups)),
            *_state_facts(found),
            ("hidden size", str(layout.hidden_size)),
            ("vocabulary", str(found.vocab_size)),
            ("parameters", f"{found.parameters:,}"),
        ]
    )
    least, most = min(found.state_sizes), max(found.state_sizes)
    labels = [str(most) if least == most else f"{least} to {most}", *map(str, state_size or [])]
    print()
    print_table(
        [
            *("N'", "state per sequence, fp32", "bf16", "saved", "parameters"),
            *(f"predicted tok/s, batch {count}" for count in batches),
        ],
        [
            (
                label,
                bytes_text(cut["state_bytes_float32"]),
                bytes_text(cut["state_bytes_bfloat16"]),
                f"{cut['saved_fraction']:.0%}",
                f"{cut['parameters']:,}",
                *(f"{speed:,.0f}" for speed in cut["predicted_tokens_per_second"].values()),
            )
            for label, cut in zip(labels, cuts, strict=True)
        ],
    )
    print()
    if memories:
        admitted = (cut["admitted"] for cut in cuts)
        serving.print_admissions(dict(zip(labels, admitted, strict=True)), context)
    if memories or state_dtype:
        serving.print_states(told, found.config, [form.name for form in forms])
    _print_advice(labels, advice)


def _state_facts(found: Description) -> list[tuple[str, str]]:
    """The state size, and how it came about in a pruned checkpoint."""
    stored, pruning = _sizes_text(found.state_sizes), found.pruning
    if pruning is None:
        return [("state size N", stored)]
    padding = "" if pruning.kept == found.state_sizes else f", padded to {stored}"
    facts = [
        ("state size", f"{pruning.state_size} -> {_sizes_text(pruning.kept)}{padding}"),
        ("pruned by", pruning.method),
    ]
    if pruning.measured is not None:
        facts.append(("excess loss", f"{pruning.measured.excess_text} nats per token, on {pruning.measured.text}"))
    return facts


def _sizes_text(sizes: Sequence[int]) -> str:
    """One size, or those of all layers."""
    return " ".join(map(str, sizes if len(set(sizes)) > 1 else sizes[:1]))


def _print_advice(sizes: Sequence[str], advice: Sequence[Sequence[Advice]]) -> None:
    """Engines by state sizes, then reasons and exports: of all engines and sizes at once where they agree."""
    by_engine = list(zip(*advice, strict=True))
    rows = [(entries[0].engine, *(entry.level for entry in entries)) for entries in by_engine]
    print_table(["engine", *(f"N' = {size}" for size in sizes)], rows)
    print()
    alike: dict[tuple[str, str], list[str]] = {}
    for entries in by_engine:
        reasons: dict[str, list[str]] = {}
        for size, entry in zip(sizes, entries, strict=True):
            if entry.reason:
                reasons.setdefault(f"{entry.level}: {entry.reason}", []).append(size)
        for reason, places in reasons.items():
            alike.setdefault((reason, ", ".join(places)), []).append(entries[0].engine)
    for (reason, where), names in alike.items():
        print(f"{', '.join(names)}, N' = {where}: {reason}.")
    exports: dict[str, list[str]] = {}
    for entries in by_engine:
        for options in dict.fromkeys(entry.export for entry in entries if entry.export):
            exports.setdefault(options, []).append(entries[0].engine)
    for options, names in exports.items():
        print(f"{', '.join(names)}: first ghostssm export {options}.")
