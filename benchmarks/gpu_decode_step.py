"""How close does the fused decode step come to the bandwidth of the GPU's memory?

    python benchmarks/gpu_decode_step.py
    python benchmarks/gpu_decode_step.py --mamba-ssm FOLDER   # also the kernel in FOLDER/mamba_ssm/ops/triton
    python benchmarks/gpu_decode_step.py --sweep              # other tiles and numbers of warps, for the best choice
    TRITON_INTERPRET=1 python benchmarks/gpu_decode_step.py --dry-run

One token of one layer, from the convolution's input to the gated output; a CUDA graph runs it for as many layers as
make a gibibyte of state, so that none is in a cache when its turn comes, as in a model. The share is that of the
state's bytes, read once and written once, over the time and over the bandwidth of a large copy in the same run.
mamba_ssm's kernel has no convolution in it: it does less.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from gpu_common import (
    SHAPES,
    TINY,
    Shape,
    captured,
    copy_bandwidth,
    device_of,
    medians,
    parser,
    report,
    seconds_by_side,
)

from ghostssm.ops import gpu
from ghostssm.ops.decode import StepWeights, decode_step_, decode_step_reference
from ghostssm.ops.ssd import ssd_step

_BYTES = 1 << 30
_TILES, _WARPS = (1024, 2048, 4096, 8192), (1, 2, 4, 8)


@dataclass(frozen=True)
class Row:
    """One shape; seconds are medians. share: of the copy's bandwidth."""

    model: str
    batch: int
    state_size: int
    state_dtype: str
    side: str
    seconds: float
    share: float
    error: float


class Layer:
    """One layer's step: random inputs, a state that is drawn once, and the sides that work on it."""

    def __init__(self, shape: Shape, batch: int, n: int, state_dtype: torch.dtype, device: str):
        heads, p, dtype = shape.heads, shape.head_dim, torch.bfloat16
        self.inner, channels = heads * p, heads * p + 2 * n

        def draw(*sizes: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.randn(sizes, device=device, dtype=torch.float32).to(dtype)

        rows = draw(batch, self.inner + channels + heads)  # one product of in_proj, as in a model
        self.z, self.xBC, self.dt = rows.split([self.inner, channels, heads], dim=1)
        self.window, self.state = draw(batch, channels, 4), draw(batch, heads, p, n, dtype=state_dtype)
        self.weights = StepWeights(draw(channels, 4), draw(channels), draw(heads) - 4, draw(heads), draw(heads), 1)
        # What mamba_ssm's kernel is called with, as its Mamba2.step has it.
        self.x = self.xBC[:, : self.inner].unflatten(1, (heads, p)).contiguous()
        self.B = self.xBC[:, None, self.inner : self.inner + n].contiguous()
        self.C = self.xBC[:, None, self.inner + n :].contiguous()
        self.A = -torch.exp(self.weights.A_log.float())

    def ours(self) -> torch.Tensor:
        return decode_step_(self.window, self.state, self.xBC, self.dt, self.z, self.weights)

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
        weights = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in vars(self.weights).items()}
        given = (part[:1].double() for part in (self.window, self.state, self.xBC, self.dt, self.z))
        expected = decode_step_reference(*given, StepWeights(**weights))[0]
        return _relative(self.ours()[:1], expected)


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def mamba_ssm_kernel(folder: Path) -> Callable[..., torch.Tensor]:
    """``selective_state_update`` from mamba_ssm's sources, without the package's compiled parts."""
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
        package = ModuleType(name)
        package.__path__ = [str(folder.joinpath(*name.split(".")))]
        sys.modules[name] = package
    module = importlib.import_module("mamba_ssm.ops.triton.selective_state_update")
    kernel: Callable[..., torch.Tensor] = module.selective_state_update
    return kernel


@contextmanager
def cut(tile: int, warps: int) -> Iterator[None]:
    """Within the context, another tile and number of warps."""
    kernels: Any = gpu.step_kernels()
    before = kernels.TILE, kernels.WARPS
    kernels.TILE, kernels.WARPS = tile, warps
    try:
        yield
    finally:
        kernels.TILE, kernels.WARPS = before


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--models", nargs="+", choices=SHAPES, default=["1.3b", "2.7b"])
    options.add_argument("--batch", type=int, nargs="+", default=[128])
    options.add_argument("--state-size", type=int, nargs="+", default=[128, 96, 64, 32])
    options.add_argument("--state-dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    options.add_argument("--rounds", type=int, default=50)
    options.add_argument("--mamba-ssm", type=Path, help="a folder with mamba_ssm's sources")
    options.add_argument("--sweep", action="store_true")
    args = options.parse_args()
    device = device_of(args)
    shapes: dict[str, Shape] = {"tiny": TINY} if args.dry_run else {name: SHAPES[name] for name in args.models}
    if args.dry_run:
        args.batch, args.state_size, args.state_dtype, args.rounds = [2], [12], ["bfloat16"], 1
    kernel = mamba_ssm_kernel(args.mamba_ssm) if args.mamba_ssm else None
    bandwidth = copy_bandwidth(device, 1 << (20 if args.dry_run else 30))

    rows: list[Row] = []
    for (name, shape), batch, dtype, n in itertools.product(
        shapes.items(), args.batch, args.state_dtype, args.state_size
    ):
        layers = [Layer(shape, batch, n, getattr(torch, dtype), device)]
        state_bytes = layers[0].state.nbytes
        for _ in range(_BYTES // state_bytes if device == "cuda" else 0):
            layers.append(Layer(shape, batch, n, getattr(torch, dtype), device))
        rows += [
            Row(name, batch, n, dtype, side, seconds, 2 * state_bytes / seconds / bandwidth, error)
            for side, (seconds, error) in measure(layers, kernel, args, device).items()
        ]
        del layers

    report(args, device, rows, lambda: table(rows, bandwidth), copy_bandwidth=bandwidth)


def measure(
    layers: list[Layer], kernel: Callable[..., torch.Tensor] | None, args: argparse.Namespace, device: str
) -> dict[str, tuple[float, float]]:
    """Side to median seconds of a layer, and the relative error of y."""
    first = layers[0]

    def ours() -> None:
        for layer in layers:
            layer.ours()

    sides: dict[str, Callable[[], object]] = {"ours": captured(ours, device)}
    errors = {"ours": first.error_of_ours()}
    if args.sweep:
        for tile, warps in list(itertools.product(_TILES, _WARPS))[: 2 if args.dry_run else None]:
            side = f"tile {tile}, {warps} warps"
            with cut(tile, warps):
                sides[side], errors[side] = captured(ours, device), first.error_of_ours()
    if kernel is not None:

        def theirs() -> None:
            for layer in layers:
                layer.mamba_ssm(kernel)

        sides["mamba_ssm"], errors["mamba_ssm"] = captured(theirs, device), first.error_of_mamba_ssm(kernel)
    times = medians(seconds_by_side(sides, args.rounds, device))
    return {side: (times[side] / len(layers), errors[side]) for side in sides}


def table(rows: list[Row], bandwidth: float) -> None:
    print(f"copy: {bandwidth / 1e12:.3f} TB/s, read and written bytes both counted")
    print("model  batch    N  state     side                   microseconds  of the copy's bandwidth   error of y")
    for row in rows:
        print(
            f"{row.model:6}{row.batch:6}{row.state_size:5}  {row.state_dtype:10}{row.side:22}"
            f"{row.seconds * 1e6:13.1f}{row.share:25.1%}{row.error:13.1e}"
        )


if __name__ == "__main__":
    with torch.inference_mode():
        main()
