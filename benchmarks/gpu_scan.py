"""One layer's scan in Triton's kernels and in PyTorch's chunks: a training step, and states read at some tokens.

Milliseconds, memory beyond the arguments, and errors against chunks in float64.

    python benchmarks/gpu_scan.py
    TRITON_INTERPRET=1 python benchmarks/gpu_scan.py --dry-run

A training step is the recurrence and the gradients of all its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from gpu_common import SHAPES, TINY, Shape, attempt, device_of, medians, parser, report, say, seconds_by_side
from torch import Tensor

from ghostssm.calibration.samples import DEFAULT_DIRECTIONS
from ghostssm.evaluation.speed import peak_bytes, reset_peak
from ghostssm.ops.reading import read_states, read_states_chunked
from ghostssm.ops.ssd import ChunkedScan, ssd

Forms = dict[str, Callable[..., tuple[Tensor, ...]]]


@dataclass(frozen=True)
class Row:
    model: str
    state_size: int
    work: str
    form: str
    milliseconds: float
    peak_bytes: int  # beyond the arguments
    error: float  # relative to the norm, the largest of all results


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--models", nargs="+", choices=SHAPES, default=["130m", "1.3b"])
    options.add_argument("--state-sizes", nargs="+", type=int, default=[128, 64, 32])
    options.add_argument("--batch", type=int, default=4)
    options.add_argument("--tokens", type=int, default=2048)
    options.add_argument("--stride", type=int, default=64, help="tokens from one that is sampled to the next")
    options.add_argument("--rounds", type=int, default=20)
    args = options.parse_args()
    device = device_of(args)
    shapes: dict[str, Shape] = {"tiny": TINY} if args.dry_run else {name: SHAPES[name] for name in args.models}
    if args.dry_run:
        args.state_sizes, args.batch, args.tokens, args.stride, args.rounds = [8], 1, 5, 2, 1

    rows: list[Row] = []
    failures: list[str] = []
    with torch.inference_mode(False), torch.enable_grad():
        for name, shape in shapes.items():
            for n in args.state_sizes:
                scan = streams(shape, n, args.batch, args.tokens, device)
                at = range(0, args.tokens, args.stride)
                u = torch.randn(args.batch, len(at), shape.heads, DEFAULT_DIRECTIONS + 1, shape.head_dim, device=device)
                training: Forms = {"kernels": step_of(ssd), "chunks": step_of(ChunkedScan.apply)}
                reading: Forms = {"kernels": reads_at(at, read_states), "chunks": reads_at(at, read_states_chunked)}
                for work, forms, given in (("training", training, scan), ("reading", reading, [*scan[:4], u])):
                    with attempt(f"{name}, N {n}, {work}", failures):
                        for row in measured(forms, given, args.rounds, device):
                            rows.append(Row(name, n, work, *row))
                            say(line(rows[-1]))
    report(args, device, rows, failures, lambda: table(rows), batch=args.batch, tokens=args.tokens, stride=args.stride)


def streams(shape: Shape, n: int, batch: int, tokens: int, device: str) -> list[Tensor]:
    """x, dt, A, B, C, D and an initial state, of the sizes that training has."""
    torch.manual_seed(0)
    heads, p = shape.heads, shape.head_dim
    x, B, C, state = (
        torch.randn(size, device=device)
        for size in ((batch, tokens, heads, p), *2 * [(batch, tokens, 1, n)], (batch, heads, p, n))
    )
    dt, A = torch.rand(batch, tokens, heads, device=device) * 0.1, -1 - 15 * torch.rand(heads, device=device)
    return [x, dt, A, B, C, torch.ones(heads, device=device), state]


def step_of(scan: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, ...]]:
    """The scan and the gradients of all its arguments, of the sums of squares of both results."""

    def step(*given: Tensor) -> tuple[Tensor, ...]:
        leaves = [part.detach().requires_grad_() for part in given]
        y, state = scan(*leaves)
        return torch.autograd.grad((y, state), leaves, (y.detach(), state.detach()))

    return step


def reads_at(at: range, read: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, ...]]:
    return lambda *given: read(*given, at)


def measured(forms: Forms, given: list[Tensor], rounds: int, device: str) -> Iterator[tuple[str, float, int, float]]:
    """Every form's name, milliseconds, memory and error."""
    exact = forms["chunks"](*(part.double() for part in given))
    errors, peaks = {}, {}
    for name, form in forms.items():
        reset_peak(given[0].device)
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        results = form(*given)
        peaks[name] = peak_bytes(given[0].device) - before
        errors[name] = max(float((a - b).norm() / b.norm()) for a, b in zip(results, exact, strict=True))
    sides = {name: partial(form, *given) for name, form in forms.items()}
    for name, seconds in medians(seconds_by_side(sides, rounds, device)).items():
        yield name, seconds * 1e3, peaks[name], errors[name]


def table(rows: list[Row]) -> None:
    print("model    N    work      form        ms        memory   error")
    for row in rows:
        print(line(row))


def line(row: Row) -> str:
    return (
        f"{row.model:6}{row.state_size:4}    {row.work:10}{row.form:8}{row.milliseconds:8.2f}"
        f"{row.peak_bytes / 1e9:11.2f} GB{row.error:10.1e}"
    )


if __name__ == "__main__":
    main()
