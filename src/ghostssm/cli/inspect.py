"""``ghostssm inspect``: what a checkpoint is, without loading its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from ghostssm.cli import serving
from ghostssm.cli.console import bytes_text, print_facts, print_json, print_table, print_text
from ghostssm.cli.requesting import AsJson, verb
from ghostssm.workflows.options import Option
from ghostssm.workflows.requests import MODEL

if TYPE_CHECKING:
    from ghostssm import Advice, Description
    from ghostssm.pruning.forecast import Forecast


@verb
def inspect(
    model: Annotated[str, MODEL],
    state_sizes: Annotated[tuple[int, ...], Option("N'", flag="--state-size")] = (),
    batches: Annotated[tuple[int, ...], Option("SIZE", flag="--batch", least=1)] = (),
    state_dtypes: Annotated[tuple[str, ...], Option("DTYPE", flag="--state-dtype")] = (),
    memories: Annotated[tuple[str, ...], Option("SIZE", flag="--memory")] = (),
    context: Annotated[int | None, Option("TOKENS", least=1)] = None,
    predict: Annotated[bool, Option()] = False,
    engines: Annotated[tuple[str, ...], Option("ENGINE", flag="--engine")] = (),
    as_json: AsJson = False,
) -> None:
    """Show a model's sizes, its state per sequence and which engines run it. Weights are not loaded.

    ghostssm inspect reference
    ghostssm inspect state-spaces/mamba2-1.3b --state-size 64 32 --batch 1 64 --memory 80GiB

    Args:
        model: hub id, local folder, or 'reference'.
        state_sizes: also say what a cut to state sizes N' saves.
        batches: also predict the decode speed on this machine, at these batch sizes.
        state_dtypes: also say how to serve it with such a state: float32, bfloat16, float16, int8, fp8 or int4.
        memories: also say how many sequences engines take in 80GiB, say.
        context: with --memory: tokens of a sequence; 8192 if not given.
        predict: also predict the time and memory that a prune with GHOST on 128 windows of 2048 tokens takes here.
        engines: engines, such as vllm or llama.cpp-cuda. 'ghostssm inspect reference' lists all of them.
        as_json: print the result as JSON.
    """
    from ghostssm import advise, describe
    from ghostssm.engines.capacity import DEFAULT_CONTEXT
    from ghostssm.errors import InputError
    from ghostssm.models.layout import check_state_size
    from ghostssm.ops.state_format import BFLOAT16, StateFormat
    from ghostssm.units import duration_text, memory_bytes

    if context is not None and not memories:
        raise InputError("--context counts with --memory only; add the memory of a GPU, such as --memory 80GiB.")
    context = DEFAULT_CONTEXT if context is None else context
    rooms = [memory_bytes(size) for size in memories or ()]
    found = describe(model)
    forms = [StateFormat.of(name) for name in state_dtypes or ["float32", *["tiers"] * bool(found.tiers)]]
    told = serving.engines_told(engines, found)
    layout = found.layout
    if state_sizes and not found.is_stock:
        raise InputError(
            f"{model} has a projected state or a state size per layer; inspect the original model for cuts."
        )
    sizes = [None, *state_sizes]
    for size in state_sizes:
        check_state_size(size, layout.state_size)
    forecast = _forecast(found, (state_sizes or [max(1, layout.state_size // 2)])[0]) if predict else None
    advice = [
        advise(
            layout if size is None else layout.with_state_size(size),
            found.family,
            engines=engines or None,
            dialect=found.dialect if size is None else None,  # what prune writes is in the dialect that is wanted
            own_class=not found.is_stock,
            tied_head=found.tied_head,
            config=found.config,
        )
        for size in sizes
    ]
    before = found.state_bytes(layout.state_size if found.pruning is None else found.pruning.state_size)
    predicted = _predicted_speeds(found, sizes, batches) if batches else {}
    cuts: list[dict[str, Any]] = [
        {
            "state_size": sum(found.state_sizes) / found.layers if size is None else size,
            "state_bytes_float32": found.state_bytes(size),
            "state_bytes_bfloat16": found.state_bytes(size, BFLOAT16),
            "saved_fraction": 1 - found.state_bytes(size) / before,
            "parameters": found.parameters - found.removed_parameters(size),
            "predicted_tokens_per_second": predicted.get(size, {}),
            "kept": serving.kept(found, size, forms, context),
            "admitted": serving.admissions(found, size, forms, context, rooms, told),
            "engines": [dataclasses.asdict(entry) for entry in entries],
        }
        for size, entries in zip(sizes, advice, strict=True)
    ]
    if as_json:
        facts = {name: value for name, value in dataclasses.asdict(found).items() if name != "config"}
        states = {each.name: each.states.as_json(found.config) for each in told}
        prune = None if forecast is None else dataclasses.asdict(forecast)
        facts |= {"layers": found.layers, "context": context, "predicted_prune": prune}
        print_json(facts | {"cuts": cuts, "states": states})
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
    labels = [str(most) if least == most else f"{least} to {most}", *map(str, state_sizes)]
    print()
    print_table(
        [
            *("N'", "state per sequence, fp32", "the same in bf16", "saved", "parameters"),
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
    if forecast is not None:
        print_text(
            f"A prune with GHOST on {forecast.tokens:,} tokens takes about {duration_text(forecast.seconds)} here, and "
            f"about {bytes_text(forecast.memory)} of memory, {bytes_text(forecast.streamed_memory)} with --stream."
        )
        print()
    if memories:
        admitted = (cut["admitted"] for cut in cuts)
        serving.print_admissions(dict(zip(labels, admitted, strict=True)), context)
    if memories or state_dtypes:
        serving.print_states(told, found.config, [form.name for form in forms])
    _print_advice(labels, advice)


def _forecast(found: Description, state_size: int) -> Forecast:
    """The prediction for a prune with GHOST and the default options."""
    from ghostssm.pruning.feasibility import check_original
    from ghostssm.pruning.forecast import forecast, product_rate
    from ghostssm.workflows.requests import CalibratingRequest

    check_original(found.is_stock)
    asked = CalibratingRequest()
    return forecast(found, state_size, asked.windows * asked.window_length, product_rate())


def _predicted_speeds(
    found: Description, sizes: Sequence[int | None], batches: Sequence[int]
) -> dict[int | None, dict[int, float]]:
    """Tokens per second by state size and batch size; imported here, since it takes model classes."""
    from ghostssm.evaluation.roofline import measure_machine, predicted_step_seconds

    machine = measure_machine(list(batches))
    return {
        size: {count: count / predicted_step_seconds(found, machine, count, size) for count in batches}
        for size in sizes
    }


def _state_facts(found: Description) -> list[tuple[str, str]]:
    """The state size, and how it came about in a pruned checkpoint."""
    from ghostssm.ops.state_format import TIERS

    stored, pruning = _sizes_text(found.state_sizes), found.pruning
    if pruning is None:
        return [("state size N", stored)]
    padding = "" if pruning.kept == found.state_sizes else f", padded to {stored}"
    facts = [
        ("state size", f"{pruning.state_size} -> {_sizes_text(pruning.kept)}{padding}"),
        ("pruned by", pruning.method),
    ]
    if pruning.state_dtype is not None:
        size = f", {bytes_text(found.state_bytes(form=TIERS))} per sequence" if found.tiers else ""
        facts.append(("state chosen for", pruning.state_dtype + size))
    if pruning.measured is not None:
        facts.append(("excess loss", f"{pruning.measured.excess_text} nats per token, on {pruning.measured.text}"))
    return facts


def _sizes_text(sizes: Sequence[int]) -> str:
    """One size, or those of all layers."""
    return " ".join(map(str, sizes if len(set(sizes)) > 1 else sizes[:1]))


def _print_advice(sizes: Sequence[str], advice: Sequence[Sequence[Advice]]) -> None:
    """Engines by state sizes, then the reasons, each once."""
    from ghostssm.engines.verdicts import Verdicts

    labels = [f"N' = {size}" for size in sizes]
    verdicts = Verdicts.of(dict(zip(labels, advice, strict=True)))
    print_table(["engine", *labels], verdicts.rows)
    print()
    for engines, reason in verdicts.reasons:
        print_text(f"{engines}: {reason}.")
    for sentence in verdicts.notes:
        print_text(sentence)
