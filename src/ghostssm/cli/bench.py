"""``ghostssm bench``: what a smaller state buys on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from ghostssm.cli import arguments
from ghostssm.cli.console import bytes_text, note, print_json, print_table, progress_reporter
from ghostssm.cli.requesting import requested

if TYPE_CHECKING:
    from ghostssm.evaluation.speed import Speedup
    from ghostssm.workflows.bench import BenchOutcome, BenchRow

_WORTH_IT = 1.1
"""A state size pays from the batch on at which decoding is at least so many times faster."""


def bench(
    model: arguments.Model,
    state_size: Annotated[
        list[int], typer.Option("--state-size", metavar="R ...", help="State sizes to measure beside the model's own.")
    ] = [64, 32],  # noqa: B006  (read only)
    batch: Annotated[list[int], typer.Option("--batch", metavar="B ...", help="Batch sizes.")] = [1, 8, 32],  # noqa: B006
    prompt_length: Annotated[
        int, typer.Option("--prompt-length", min=1, help="Tokens per sequence to prefill.", metavar="N")
    ] = 128,
    state_dtype: arguments.StateDtypes = ["float32"],  # noqa: B006  (read only)
    state_rounding: arguments.StateRounding = "nearest",
    device: arguments.Device = "cpu",
    as_json: arguments.AsJson = False,
) -> None:
    """Measure prefill and decode at several state sizes, beside what bandwidth and arithmetic predict.

    ghostssm bench state-spaces/mamba2-130m --batch 1 32 64 --state-size 64 32
    ghostssm bench MODEL --device cuda --batch 1 64 256
    """
    given = locals()
    from ghostssm.workflows.bench import BenchRequest
    from ghostssm.workflows.bench import bench as carry_out

    request = requested(BenchRequest, given, state_sizes=state_size, batches=batch, state_dtypes=state_dtype)
    with progress_reporter() as progress:
        outcome = carry_out(request, progress=progress, notify=note)
    if as_json:
        print_json(outcome.as_json())
        return
    headers = ["batch", "N'", "dtype", "state", "prefill tok/s", "decode tok/s", "predicted"]
    headers += ["times dense", "predicted", "peak memory"]
    print_table(headers, [_cells(row, _is_dense(row, outcome)) for row in outcome.rows], text_columns=0)
    note(f"bandwidth {outcome.machine.bandwidth / 1e9:.1f} GB/s, weights in float32")
    others: dict[tuple[int, str], dict[int, Speedup]] = {}
    for row in outcome.rows:
        if not _is_dense(row, outcome):
            others.setdefault((row.state_size, row.state_dtype), {})[row.batch] = row.speedup
    for (size, dtype), speedups in others.items():
        print(f"N' = {size}{'' if dtype == 'float32' else f' in {dtype}'} {_verdict(speedups)}")


def _is_dense(row: BenchRow, outcome: BenchOutcome) -> bool:
    return row.state_size == outcome.state_size and row.state_dtype == "float32"


def _cells(row: BenchRow, is_dense: bool) -> list[str]:
    spread = "" if is_dense else f" ({row.speedup.low:.2f} to {row.speedup.high:.2f})"
    return [
        str(row.batch),
        str(row.state_size),
        row.state_dtype,
        bytes_text(row.state_bytes),
        f"{row.prefill_tokens_per_second:,.0f}",
        f"{row.decode_tokens_per_second:,.0f}",
        f"{row.predicted_tokens_per_second:,.0f}",
        f"{row.speedup.median:.2f}{spread}",
        f"{row.predicted_speedup:.2f}",
        bytes_text(row.peak_memory_bytes),
    ]


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
