"""How close does the fused decode step come to the bandwidth of the GPU's memory?

    python benchmarks/gpu_decode_step.py
    python benchmarks/gpu_decode_step.py --mamba-ssm FOLDER   # also the kernel in FOLDER/mamba_ssm/ops/triton
    python benchmarks/gpu_decode_step.py --sweep --models 1.3b --state-size 128 64   # other tiles and numbers of warps
    TRITON_INTERPRET=1 python benchmarks/gpu_decode_step.py --dry-run

One token of one layer, from the convolution's input to the gated output; a CUDA graph runs it for as many layers as
make a gibibyte of state, so that none is in a cache when its turn comes, as in a model. The share is that of the
state's bytes, read once and written once, over the time and over the bandwidth of a large copy that takes turns with
it. mamba_ssm's kernel has no convolution in it: it does less. It takes no scaled states.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from gpu_common import (
    SHAPES,
    TINY,
    Copy,
    Shape,
    attempt,
    captured,
    device_of,
    mamba_ssm_kernel,
    medians,
    parser,
    report,
    say,
    seconds_by_side,
)

from ghostssm.ops import gpu
from ghostssm.ops.decode import StepWeights, decode_step_, decode_step_reference
from ghostssm.ops.ssd import ssd_step
from ghostssm.ops.state_format import FORMATS, StateStorage, dequantise, quantise

_BYTES = 1 << 30
_ROUNDED = {32: 1e-5, 16: 5e-3, 8: 5e-2, 4: 0.3}
"""By bits, the most that rounding may change a state, relative."""
_CUTS = [
    (tile, warps)
    for tile, warps in itertools.product((1024, 2048, 4096, 8192), (1, 2, 4, 8))
    if 16 <= tile // (32 * warps) <= 64  # numbers per thread; more of them spill
]


@dataclass(frozen=True)
class Row:
    """One shape; seconds are medians. share: of the copy's bandwidth. error: of y, relative."""

    model: str
    batch: int
    state_size: int
    state_dtype: str
    side: str
    seconds: float
    copy_bandwidth: float
    share: float
    error: float


class Layer:
    """One layer's step: random inputs, a state that is drawn once, and the sides that work on it."""

    def __init__(self, shape: Shape, batch: int, n: int, storage: StateStorage, device: str):
        heads, p, dtype = shape.heads, shape.head_dim, torch.bfloat16
        self.inner, channels = heads * p, heads * p + 2 * n

        def draw(*sizes: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.randn(sizes, device=device, dtype=torch.float32).to(dtype)

        rows = draw(batch, self.inner + channels + heads)  # one product of in_proj, as in a model
        self.z, self.xBC, self.dt = rows.split([self.inner, channels, heads], dim=1)
        self.window, self.storage, self.n = draw(batch, channels, 4), storage, n
        self.state = quantise(draw(batch, heads, p, n, dtype=torch.float32), storage)
        self.weights = StepWeights(draw(channels, 4), draw(channels), draw(heads) - 4, draw(heads), draw(heads), 1, p)
        # What mamba_ssm's kernel is called with, as its Mamba2.step has it.
        self.x = self.xBC[:, : self.inner].unflatten(1, (heads, p)).contiguous()
        self.B = self.xBC[:, None, self.inner : self.inner + n].contiguous()
        self.C = self.xBC[:, None, self.inner + n :].contiguous()
        self.A = -torch.exp(self.weights.A_log.float())

    def ours(self) -> torch.Tensor:
        return decode_step_(self.window, self.state, self.xBC, self.dt, self.z, self.weights, self.storage)

    def numbers(self, some: slice) -> torch.Tensor:
        """The state of some sequences, float64."""
        return dequantise(self.state[some], self.storage.format, self.weights.head_dim, self.n).double()

    def mamba_ssm(self, kernel: Callable[..., torch.Tensor]) -> torch.Tensor:
        heads, p, n = self.state.shape[1:]
        return kernel(
            self.state,
            self.x,
            self.dt[:, :, None].expand(-1, -1, p),
            self.A[:, None, None].expand(-1, p, n),
            self.B,
            self.C,
            self.weights.D[:, None].expand(-1, p),
            z=self.z.unflatten(1, (heads, p)),
            dt_bias=self.weights.dt_bias[:, None].expand(-1, p),
            dt_softplus=True,
        )

    def error_of_mamba_ssm(self, kernel: Callable[..., torch.Tensor]) -> float:
        """Of y, relative, against float64 on the first sequence: so that what is timed is known to be called right."""
        state = self.state[:1].double()
        step = F.softplus(self.dt[:1].double() + self.weights.dt_bias.double())
        parts = (self.x[:1].double(), step, self.A.double(), self.B[:1].double(), self.C[:1].double())
        y, _ = ssd_step(state, *parts, self.weights.D.double())
        y = y * F.silu(self.z[:1].double()).view_as(y)
        return _relative(self.mamba_ssm(kernel)[:1], y)

    def error_of_ours(self) -> float:
        """Of y, relative, against float64 on some sequences; the kernels must also repeat themselves bit by bit."""
        weights = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in vars(self.weights).items()}
        some = slice(None, None, max(1, len(self.state) // 4))
        window, *streams = (part[some].double() for part in (self.window, self.xBC, self.dt, self.z))
        expected, window, state = decode_step_reference(window, self.numbers(some), *streams, StepWeights(**weights))
        before = self.window.clone(), self.state.clone()
        y = self.ours()
        after = self.window.clone(), self.state.clone()
        self.window.copy_(before[0])
        self.state.copy_(before[1])
        again = self.ours()
        assert torch.equal(y, again)
        assert torch.equal(self.window, after[0])
        assert torch.equal(self.state, after[1])
        assert torch.equal(self.window[some].double(), window)
        assert _relative(self.numbers(some), state) < _ROUNDED[self.storage.format.bits]
        return _relative(y[some], expected)


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


@contextmanager
def cut(tile: int, warps: int) -> Iterator[None]:
    """Within the context, another tile and number of warps."""
    step, stored = gpu.kernels("step"), gpu.kernels("stored")
    names = [(step, "TILE", "WARPS"), (stored, "TILE", "WARPS"), (stored, "CODES_TILE", "CODES_WARPS")]
    with ExitStack() as stack:
        for kernels, numbers, threads in names:
            stack.enter_context(mock.patch.multiple(kernels, **{numbers: tile, threads: warps}))
        yield


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--models", nargs="+", choices=SHAPES, default=["1.3b", "2.7b"])
    options.add_argument("--batch", type=int, nargs="+", default=[128])
    options.add_argument("--state-size", type=int, nargs="+", default=[128, 96, 64, 32])
    options.add_argument("--state-dtype", nargs="+", choices=FORMATS, default=list(FORMATS))
    options.add_argument("--state-rounding", choices=["nearest", "stochastic"], default="nearest")
    options.add_argument("--rounds", type=int, default=50)
    options.add_argument("--mamba-ssm", type=Path, help="a folder with mamba_ssm's sources")
    options.add_argument("--sweep", action="store_true")
    args = options.parse_args()
    device = device_of(args)
    shapes: dict[str, Shape] = {"tiny": TINY} if args.dry_run else {name: SHAPES[name] for name in args.models}
    if args.dry_run:
        args.batch, args.state_size, args.state_dtype, args.rounds = [2], [12], ["bfloat16", "int8"], 1
    kernel = mamba_ssm_kernel(args.mamba_ssm) if args.mamba_ssm else None
    copy = Copy(1 << (20 if args.dry_run else 30), device)

    rows: list[Row] = []
    failures: list[str] = []
    for (name, shape), batch, dtype, n in itertools.product(
        shapes.items(), args.batch, args.state_dtype, args.state_size
    ):
        part = f"{name}, batch {batch}, {dtype}, N {n}"
        with attempt(part, failures):
            storage = StateStorage.of(dtype, "nearest" if dtype == "float32" else args.state_rounding)
            layers = [Layer(shape, batch, n, storage, device)]
            state_bytes = layers[0].state.nbytes
            for _ in range(_BYTES // state_bytes if device == "cuda" else 0):
                layers.append(Layer(shape, batch, n, storage, device))
            sides, errors = checked(part, layers, kernel, args, device, failures)
            seconds = medians(seconds_by_side({"copy": copy} | sides, args.rounds, device))
            bandwidth = copy.bandwidth(seconds.pop("copy"))
            for side, taken in seconds.items():
                share = 2 * state_bytes / (taken / len(layers)) / bandwidth
                rows.append(Row(name, batch, n, dtype, side, taken / len(layers), bandwidth, share, errors[side]))
                say(line(rows[-1]))
        layers, sides = [], {}

    report(args, device, rows, failures, lambda: table(rows))


def checked(
    part: str,
    layers: list[Layer],
    kernel: Callable[..., torch.Tensor] | None,
    args: argparse.Namespace,
    device: str,
    failures: list[str],
) -> tuple[dict[str, Callable[[], object]], dict[str, float]]:
    """The sides whose results are right, each over all layers, and the relative errors of y; before any is timed."""
    first = layers[0]

    def ours() -> None:
        for layer in layers:
            layer.ours()

    sides: dict[str, Callable[[], object]] = {}
    errors: dict[str, float] = {}
    cuts = [(f"tile {tile}, {warps} warps", cut(tile, warps)) for tile, warps in _CUTS[: 1 if args.dry_run else None]]
    for side, context in [("ours", nullcontext()), *(cuts if args.sweep else [])]:
        with attempt(f"{part}, {side}", failures), context:
            errors[side] = first.error_of_ours()
            sides[side] = captured(ours, device)
    if kernel is not None and not first.storage.format.scaled:

        def theirs() -> None:
            for layer in layers:
                layer.mamba_ssm(kernel)

        with attempt(f"{part}, mamba_ssm", failures):
            errors["mamba_ssm"] = first.error_of_mamba_ssm(kernel)
            sides["mamba_ssm"] = captured(theirs, device)
    return sides, errors


def table(rows: list[Row]) -> None:
    print("The copy's bandwidth counts read and written bytes.")
    print("model  batch    N  state     side                   microseconds  copy, TB/s  share of it   error of y")
    for row in rows:
        print(line(row))


def line(row: Row) -> str:
    return (
        f"{row.model:6}{row.batch:6}{row.state_size:5}  {row.state_dtype:10}{row.side:22}"
        f"{row.seconds * 1e6:13.1f}{row.copy_bandwidth / 1e12:12.3f}{row.share:13.1%}{row.error:13.1e}"
    )


if __name__ == "__main__":
    with torch.inference_mode():
        main()
