"""``ghostssm bench``: what a smaller state buys on this machine."""

from __future__ import annotations

import statistics
from typing import Annotated, Any

import typer

from ghostssm.cli import arguments
from ghostssm.cli.console import bytes_text, note, print_json, print_table, progress_reporter

_WORTH_IT = 1.1
"""A state size pays from the batch on at which decoding is at least so many times faster."""


def bench(
    model: arguments.Model,
    state_size: Annotated[
        list[int], typer.Option("--state-size", metavar="R ...", help="State sizes to measure beside the model's own.")
    ] = [64, 32],  # noqa: B006  (read only)
    batch: Annotated[list[int], typer.Option("--batch", metavar="B ...", help="Batch sizes.")] = [1, 8, 32],  # noqa: B006
    prompt: Annotated[
        int, typer.Option("--prompt-length", min=1, help="Tokens per sequence to prefill.", metavar="N")
    ] = 128,
    device: arguments.Device = "cpu",
    as_json: arguments.AsJson = False,
) -> None:
    """Measure prefill and decode at several state sizes, beside what bandwidth and arithmetic predict.

    ghostssm bench state-spaces/mamba2-130m --batch 1 32 64 --state-size 64 32
    ghostssm bench MODEL --device cuda --batch 1 64 256
    """
    import torch

    import ghostssm
    from ghostssm.bench.decode import first_channels, measure
    from ghostssm.bench.roofline import measure_machine, predicted_step_seconds
    from ghostssm.errors import InputError
    from ghostssm.feasibility import check_state_size

    if min(batch) < 1:
        raise InputError(f"The batch size is {min(batch)}; expected at least 1.")
    described = ghostssm.describe(model)
    if not described.is_stock:
        raise InputError(f"{model} has a projected state or a state size per layer; bench the original model.")
    for size in state_size:
        check_state_size(size, described.layout.state_size)
    dense = described.layout.state_size
    sizes = [dense, *(size for size in state_size if size != dense)]
    loaded = ghostssm.load(model, dtype=torch.float32, device=device).model
    machine = measure_machine(batch, device)
    plans = {size: first_channels(loaded, size) for size in sizes}
    with progress_reporter() as progress:
        timings = measure(loaded, plans, batch, prompt, progress)

    rows: list[dict[str, Any]] = []
    for count in batch:
        dense_step = statistics.median(timings[dense, count].steps)
        dense_predicted = predicted_step_seconds(described, machine, count, dense)
        for size in sizes:
            step = statistics.median(timings[size, count].steps)
            predicted = predicted_step_seconds(described, machine, count, size)
            rows.append(
                {
                    "batch": count,
                    "state_size": size,
                    "state_bytes": count * described.state_bytes(size),
                    "prefill_tokens_per_second": count * prompt / statistics.median(timings[size, count].prefill),
                    "decode_tokens_per_second": count / step,
                    "predicted_tokens_per_second": count / predicted,
                    "peak_memory_bytes": timings[size, count].peak_bytes,
                    "speedup": dense_step / step,
                    "predicted_speedup": dense_predicted / predicted,
                }
            )
    if as_json:
        print_json({"bandwidth": machine.bandwidth, "rates": machine.rates, "rows": rows})
        return
    print_table(
        (
            "batch",
            "N'",
            "state",
            "prefill tok/s",
            "decode tok/s",
            "predicted",
            "times dense",
            "predicted",
            "peak memory",
        ),
        [
            (
                str(row["batch"]),
                str(row["state_size"]),
                bytes_text(row["state_bytes"]),
                f"{row['prefill_tokens_per_second']:,.0f}",
                f"{row['decode_tokens_per_second']:,.0f}",
                f"{row['predicted_tokens_per_second']:,.0f}",
                f"{row['speedup']:.2f}",
                f"{row['predicted_speedup']:.2f}",
                bytes_text(row["peak_memory_bytes"]),
            )
            for row in rows
        ],
        text_columns=0,
    )
    note(f"bandwidth {machine.bandwidth / 1e9:.1f} GB/s, weights and state in float32")
    for size in sizes[1:]:
        paying = [row["batch"] for row in rows if row["state_size"] == size and row["speedup"] >= _WORTH_IT]
        print(
            f"N' = {size} decodes at least {_WORTH_IT} times faster from batch {min(paying)} on"
            if paying
            else f"N' = {size} does not pay at these batch sizes: the weights are the traffic, not the state"
        )
