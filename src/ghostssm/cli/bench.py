"""``ghostssm bench``: what a smaller state buys on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ghostssm.cli import arguments
from ghostssm.cli.console import bytes_text, note_if, print_json, print_table, print_text, progress_reporter

if TYPE_CHECKING:
    from ghostssm.evaluation.speed import Speedup

_WORTH_IT = 1.1
"""A state size pays from the batch on at which decoding is at least so many times faster."""
_ROUNDS = 5
"""Where nothing differs, all rounds agree by chance one time in 16; of three rounds it would be one time in four."""


def bench(
    model: arguments.Model,
    state_size: Annotated[
        list[int],
        typer.Option("--state-size", metavar="N' ...", help="State sizes N' to measure beside the model's own N."),
    ] = [64, 32],  # noqa: B006  (read only)
    batch: Annotated[
        list[int],
        typer.Option("--batch", metavar="SIZE ...", callback=arguments.at_least(1), help="Sequences at a time."),
    ] = [1, 8, 32],  # noqa: B006
    prompt: Annotated[
        int,
        typer.Option(
            "--prompt-length",
            callback=arguments.at_least(1),
            help="Tokens per sequence to prefill.",
            metavar="TOKENS",
        ),
    ] = 128,
    device: arguments.Device = "cpu",
    as_json: arguments.AsJson = False,
) -> None:
    """Measure on this machine how fast a model reads a prompt (prefill) and writes (decode) at several state sizes.

    ghostssm bench state-spaces/mamba2-130m --batch 1 32 64 --state-size 64 32
    ghostssm bench MODEL --device cuda --batch 1 64 256
    """
    import torch

    import ghostssm
    from ghostssm.errors import InputError
    from ghostssm.evaluation.roofline import measure_machine, predicted_step_seconds
    from ghostssm.evaluation.speed import Rate, Speedup, first_channels, measure
    from ghostssm.models.layout import check_state_size
    from ghostssm.workflows.remarks import idle_gpu_remark

    described = ghostssm.describe(model)
    if not described.is_stock:
        raise InputError(f"{model} has a projected state or a state size per layer; bench the original model.")
    for size in state_size:
        check_state_size(size, described.layout.state_size)
    dense = described.layout.state_size
    sizes = [dense, *(size for size in state_size if size != dense)]
    note_if(idle_gpu_remark(device))
    loaded = ghostssm.load(model, dtype=torch.float32, device=device).model
    machine = measure_machine(batch, device)
    plans = {size: first_channels(loaded, size) for size in sizes}
    with progress_reporter() as progress:
        timings = measure(loaded, plans, batch, prompt, progress, _ROUNDS)

    rows: list[dict[str, Any]] = []
    for count in batch:
        dense_predicted = predicted_step_seconds(described, machine, count, dense)
        for size in sizes:
            timing = timings[size, count]
            predicted = predicted_step_seconds(described, machine, count, size)
            speedup = Speedup.of(timings[dense, count], timing)
            prefill = Rate.of(count * prompt, [[seconds] for seconds in timing.prefill])
            decode = Rate.of(count, timing.rounds)
            rows.append(
                {
                    "batch": count,
                    "state_size": size,
                    "state_bytes": count * described.state_bytes(size),
                    "prefill_tokens_per_second": prefill.median,
                    "prefill_range": [prefill.low, prefill.high],
                    "decode_tokens_per_second": decode.median,
                    "decode_range": [decode.low, decode.high],
                    "predicted_tokens_per_second": count / predicted,
                    "peak_memory_bytes": timing.peak_bytes,
                    "speedup": speedup.median,
                    "speedup_range": [speedup.low, speedup.high],
                    "predicted_speedup": dense_predicted / predicted,
                }
            )
    if as_json:
        print_json({"bandwidth": machine.bandwidth, "rates": machine.rates, "rows": rows})
        return
    _print_rows(rows, dense)
    print_text(
        f"±, and in brackets: the range over {_ROUNDS} rounds. Predicted: from {machine.bandwidth / 1e9:.1f} GB/s of "
        "this machine. Weights and state are in float32."
    )
    for size in sizes[1:]:
        speedups = {count: Speedup.of(timings[dense, count], timings[size, count]) for count in batch}
        print_text(f"N' = {size}: {_verdict(speedups)}.")


def _print_rows(rows: Sequence[Mapping[str, Any]], dense: int) -> None:
    print_table(
        [
            "batch",
            "N'",
            "state",
            "prefill tok/s",
            "decode tok/s",
            f"times N = {dense}",
            "times predicted",
            "peak memory",
        ],
        [
            (
                str(row["batch"]),
                str(row["state_size"]),
                bytes_text(row["state_bytes"]),
                _rate(row["prefill_tokens_per_second"], *row["prefill_range"]),
                _rate(row["decode_tokens_per_second"], *row["decode_range"]),
                "" if row["state_size"] == dense else _times(row["speedup"], *row["speedup_range"]),
                "" if row["state_size"] == dense else f"{row['predicted_speedup']:.2f}",
                bytes_text(row["peak_memory_bytes"]),
            )
            for row in rows
        ],
        text_columns=0,
    )


def _rate(median: float, low: float, high: float) -> str:
    """With half of the range as a share of it."""
    return f"{median:,.0f} ±{(high - low) / 2 / median:.0%}"


def _times(median: float, low: float, high: float) -> str:
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def _verdict(speedups: Mapping[int, Speedup]) -> str:
    """What to make of the measured speedups of one state size, by batch size; only what the rounds agree on."""
    undecided = [batch for batch, speedup in speedups.items() if not speedup.decided(_WORTH_IT)]
    faster = [batch for batch, speedup in speedups.items() if speedup.low > _WORTH_IT]
    told = []
    if faster:
        told.append(f"decodes at least {_WORTH_IT} times as fast at batch {_listed(faster)}")
    if undecided:
        told.append(f"undecided at batch {_listed(undecided)}, where the range has {_WORTH_IT} in it")
    if len(faster) + len(undecided) < len(speedups):
        others = [batch for batch in speedups if batch not in (*faster, *undecided)]
        told.append(f"less than {_WORTH_IT} times as fast at batch {_listed(others)}")
    return "; ".join(told)


def _listed(batches: Sequence[int]) -> str:
    return ", ".join(map(str, batches))
