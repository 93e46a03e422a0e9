"""``ghostssm bench``: what a smaller state buys on this machine."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ghostssm.cli import arguments
from ghostssm.cli.console import bytes_text, note, note_if, print_json, print_table, progress_reporter

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
    from ghostssm.evaluation.speed import Speedup, first_channels, measure
    from ghostssm.pruning.feasibility import check_state_size
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
            rows.append(
                {
                    "batch": count,
                    "state_size": size,
                    "state_bytes": count * described.state_bytes(size),
                    "prefill_tokens_per_second": count * prompt / statistics.median(timing.prefill),
                    "decode_tokens_per_second": count / statistics.median(timing.steps),
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
    note(f"bandwidth {machine.bandwidth / 1e9:.1f} GB/s, weights and state in float32")
    for size in sizes[1:]:
        speedups = {count: Speedup.of(timings[dense, count], timings[size, count]) for count in batch}
        print(f"N' = {size} {_verdict(speedups)}")


def _print_rows(rows: Sequence[Mapping[str, Any]], dense: int) -> None:
    headers = ["batch", "N'", "state", "prefill tok/s", "decode tok/s", "predicted"]
    headers += ["times dense", "predicted", "peak memory"]
    print_table(
        headers,
        [
            (
                str(row["batch"]),
                str(row["state_size"]),
                bytes_text(row["state_bytes"]),
                f"{row['prefill_tokens_per_second']:,.0f}",
                f"{row['decode_tokens_per_second']:,.0f}",
                f"{row['predicted_tokens_per_second']:,.0f}",
                f"{row['speedup']:.2f}"
                + ("" if row["state_size"] == dense else " ({:.2f} to {:.2f})".format(*row["speedup_range"])),
                f"{row['predicted_speedup']:.2f}",
                bytes_text(row["peak_memory_bytes"]),
            )
            for row in rows
        ],
        text_columns=0,
    )


def _verdict(speedups: Mapping[int, Speedup]) -> str:
    """What to make of the measured speedups of one state size, by batch size."""
    undecided = [batch for batch, speedup in speedups.items() if not speedup.decided]
    paying = [batch for batch, speedup in speedups.items() if speedup.decided and speedup.median >= _WORTH_IT]
    if paying and min(paying) > max(undecided, default=0):
        return f"decodes at least {_WORTH_IT} times faster from batch {min(paying)} on"
    if undecided:
        return (
            f"is undecided at batch {' '.join(map(str, undecided))}, where the rounds disagree; measure again on a "
            "quieter machine, or at larger batches"
        )
    return "does not pay at these batch sizes: the weights are the traffic, not the state"
