"""``ghostssm bench``: what a smaller state buys on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ghostssm.cli.console import print_json, print_table, print_text
from ghostssm.cli.parsing import AsJson, asks_for
from ghostssm.report.screen import carried_out
from ghostssm.units import bytes_text
from ghostssm.workflows.requests import BenchRequest

if TYPE_CHECKING:
    from ghostssm.evaluation.speed import Speedup
    from ghostssm.workflows.bench import BenchOutcome, BenchRow

_WORTH_IT = 1.1
"""Decoding has to be so many times as fast for a smaller state to be worth it."""


@asks_for(BenchRequest)
def bench(request: BenchRequest, as_json: AsJson = False) -> None:
    """Measure on this machine how fast a model reads a prompt (prefill) and writes (decode) at several state sizes.

    ghostssm bench state-spaces/mamba2-130m --batch 1 32 64 --state-size 64 32
    ghostssm bench PRUNED --state-dtype int8 tiers
    """
    from ghostssm.workflows import bench as use_case

    outcome = carried_out(use_case.bench, request)
    if as_json:
        print_json(outcome.as_json())
        return
    beside = "dense" if outcome.is_stock else "float32"
    headers = ["batch", "N'", "dtype", "state", "prefill tok/s", "decode tok/s", f"times {beside}"]
    headers += ["times predicted", "peak memory"]
    print_table(headers, [_cells(row, _is_dense(row, outcome)) for row in outcome.rows], text_columns=0)
    bandwidth = f"{outcome.machine.bandwidth / 1e9:.1f} GB/s"
    told = f"Dense: N' = {outcome.state_size} in float32." if outcome.is_stock else "The model is measured as it is."
    print_text(
        f"±, and in brackets: the range over {use_case.ROUNDS} rounds. {told} "
        f"Predicted: from {bandwidth} of this machine. Weights are in float32."
    )
    others: dict[tuple[int, str], dict[int, Speedup]] = {}
    for row in outcome.rows:
        if not _is_dense(row, outcome):
            others.setdefault((row.state_size, row.state_dtype), {})[row.batch] = row.speedup
    for (size, dtype), speedups in others.items():
        print_text(f"N' = {size}{'' if dtype == 'float32' else f' in {dtype}'}: {_verdict(speedups)}.")


def _is_dense(row: BenchRow, outcome: BenchOutcome) -> bool:
    return row.state_size == outcome.state_size and row.state_dtype == "float32"


def _cells(row: BenchRow, is_dense: bool) -> list[str]:
    speedup = row.speedup
    times = f"{speedup.median:.2f} ({speedup.low:.2f} to {speedup.high:.2f})"
    return [
        str(row.batch),
        str(row.state_size),
        row.state_dtype,
        bytes_text(row.state_bytes),
        row.prefill.text,
        row.decode.text,
        "" if is_dense else times,
        "" if is_dense else f"{row.predicted_speedup:.2f}",
        bytes_text(row.peak_memory_bytes),
    ]


def _verdict(speedups: Mapping[int, Speedup]) -> str:
    """At which batch sizes a state size pays; undecided where the rounds disagree."""
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
