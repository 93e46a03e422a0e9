"""The decode step's kernels. Importing this needs triton; `ghostssm.ops.decode` is what to call.

Every kernel issues all its loads before it works on the first, so that they are on their way together, and before its
first store, which they might alias. Where it updates in place, a barrier stands between the two: a value that several
threads hold is loaded by each of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ghostssm.ops import gpu
from ghostssm.ops._triton_norm import silu, stride_of, with_dense_rows

if TYPE_CHECKING:
    from ghostssm.ops.decode import StepWeights

TILE = 4096
"""Numbers of the state that one program works on at a time; with four warps a thread holds 32 of them."""
LEAST_ROWS = 8
LEAST_COLUMNS = 16
"""With `LEAST_ROWS`, a tile has at least one number for each of a program's 128 threads."""
MOST_COLUMNS = 128
WARPS = 4
_MAP_COLUMNS = 32


@triton.jit
def _softplus(x):
    """max(x, 0) + log1p(e^-|x|); log1p(u) = 2 artanh(u / (2 + u)) as a series that ends below float32's precision."""
    u = tl.exp(-tl.abs(x))
    s = u / (2.0 + u)
    q = s * s
    series = 1.0 / 17
    for k in tl.static_range(8):
        series = series * q + 1.0 / (15 - 2 * k)
    return tl.maximum(x, 0.0) + 2.0 * s * series


@triton.jit
def _load_conv(x, window, weight, bias, channels, inside, WIDTH: tl.constexpr, TAPS: tl.constexpr):
    """What the convolution of some channels needs: new inputs, older ones and filters (channels, TAPS), and the bias.

    x, window, weight and bias point to the numbers of channel 0; a window and a filter have WIDTH numbers per channel.
    """
    new = tl.load(x + channels, mask=inside, other=0.0).to(window.dtype.element_ty)
    taps = tl.arange(0, TAPS)[None, :]
    cells = channels[:, None] * WIDTH + taps
    older = tl.load(window + cells + 1, mask=inside[:, None] & (taps < WIDTH - 1), other=0.0)
    filters = tl.load(weight + cells, mask=inside[:, None] & (taps < WIDTH), other=0.0)
    offset = 0.0
    if bias is not None:
        offset = tl.load(bias + channels, mask=inside, other=0.0).to(tl.float32)
    return new, older, filters, offset


@triton.jit
def _conv(new, older, filters, offset, WIDTH: tl.constexpr, TAPS: tl.constexpr):
    """SiLU of the convolution at the new inputs; and the shifted window, (channels, TAPS), to store."""
    shifted = tl.where(tl.arange(0, TAPS)[None, :] == WIDTH - 1, new[:, None], older)
    return silu(tl.sum(shifted.to(tl.float32) * filters.to(tl.float32), axis=1) + offset), shifted


@triton.jit
def _store_window(window, shifted, channels, inside, WIDTH: tl.constexpr, TAPS: tl.constexpr):
    taps = tl.arange(0, TAPS)[None, :]
    tl.store(window + channels[:, None] * WIDTH + taps, shifted, mask=inside[:, None] & (taps < WIDTH))


@triton.jit
def prepare_streams(
    xBC,
    row_stride,
    window,
    weight,
    bias,
    B_maps,
    C_maps,
    dt,
    dt_stride,
    dt_bias,
    A_log,
    out,
    steps,
    INNER: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
    LANES: tl.constexpr,
    HEAD_LANES: tl.constexpr,
    MAP_COLUMNS: tl.constexpr,
):
    """B or C of one group and one sequence: convolution, SiLU, projection; and step and decay of some of the heads.

    Program (2 * g, b), B of all groups first. xBC (b, INNER + 2 g n) and dt (b, HEADS) with row strides, window (b,
    channels, WIDTH) in place, weight (channels, WIDTH), bias (channels,) or None, maps (GROUPS, N, R) or None,
    dt_bias and A_log (HEADS,), out (b, 2, GROUPS, R) and steps (b, 2, HEADS) float32.
    """
    SHARE: tl.constexpr = (HEADS + 2 * GROUPS - 1) // (2 * GROUPS)
    part = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    group = part % GROUPS
    lanes = tl.arange(0, LANES)
    channels = INNER + part * N + lanes
    own_window = window + sequence * (INNER + 2 * GROUPS * N) * WIDTH
    new, older, filters, offset = _load_conv(
        xBC + sequence * row_stride, own_window, weight, bias, channels, lanes < N, WIDTH, TAPS
    )
    heads = part * SHARE + tl.arange(0, HEAD_LANES)
    own = (tl.arange(0, HEAD_LANES) < SHARE) & (heads < HEADS)
    step = tl.load(dt + sequence * dt_stride + heads, mask=own, other=0.0).to(tl.float32)
    step += tl.load(dt_bias + heads, mask=own, other=0.0).to(tl.float32)
    log_rate = tl.load(A_log + heads, mask=own, other=0.0).to(tl.float32)
    stream, shifted = _conv(new, older, filters, offset, WIDTH, TAPS)
    step = _softplus(step)
    tl.debug_barrier()
    tl.store(steps + sequence * 2 * HEADS + heads, step, mask=own)
    tl.store(steps + sequence * 2 * HEADS + HEADS + heads, tl.exp(-step * tl.exp(log_rate)), mask=own)
    _store_window(own_window, shifted, channels, lanes < N, WIDTH, TAPS)
    stream = tl.where(lanes < N, stream, 0.0)
    if B_maps is None:
        tl.store(out + (sequence * 2 * GROUPS + part) * N + lanes, stream, mask=lanes < N)
    else:
        for first in range(0, R, MAP_COLUMNS):
            columns = first + tl.arange(0, MAP_COLUMNS)
            cells = group * N * R + lanes[:, None] * R + columns[None, :]
            inside = (lanes[:, None] < N) & (columns[None, :] < R)
            if part < GROUPS:
                entries = tl.load(B_maps + cells, mask=inside, other=0.0).to(tl.float32)
            else:
                entries = tl.load(C_maps + cells, mask=inside, other=0.0).to(tl.float32)
            mapped = tl.sum(entries * stream[:, None], axis=0)
            # Parts count B's groups, then C's, and so do the rows of out.
            tl.store(out + (sequence * 2 * GROUPS + part) * R + columns, mapped, mask=columns < R)


@triton.jit
def _load_columns(state, rows, FIRST: tl.constexpr, LANES: tl.constexpr, P, R: tl.constexpr, EXACT: tl.constexpr):
    """The columns from FIRST on of some rows of a head's state, (rows, LANES), as they are stored."""
    columns = FIRST + tl.arange(0, LANES)
    cells = state + rows[:, None] * R + columns[None, :]
    if EXACT:
        tile = tl.load(cells)
    else:
        tile = tl.load(cells, mask=(rows[:, None] < P) & (columns[None, :] < R), other=0.0)
    return tile


@triton.jit
def _load_stream(stream, FIRST: tl.constexpr, LANES: tl.constexpr, R: tl.constexpr):
    columns = FIRST + tl.arange(0, LANES)
    return tl.load(stream + columns, mask=columns < R, other=0.0)[None, :]


@triton.jit
def _store_columns(
    state, tile, rows, FIRST: tl.constexpr, LANES: tl.constexpr, P, R: tl.constexpr, EXACT: tl.constexpr
):
    columns = FIRST + tl.arange(0, LANES)
    cells = state + rows[:, None] * R + columns[None, :]
    if EXACT:
        tl.store(cells, tile.to(state.dtype.element_ty))
    else:
        tl.store(cells, tile.to(state.dtype.element_ty), mask=(rows[:, None] < P) & (columns[None, :] < R))


@triton.jit
def step_state(
    xBC,
    row_stride,
    z,
    z_stride,
    window,
    weight,
    bias,
    D,
    BC,
    steps,
    state,
    out,
    CHANNELS: tl.constexpr,
    HEADS: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,
    SPANS: tl.constexpr,
):
    """ROWS rows of one head's state, for one sequence. Program (h * blocks, b), the blocks of a head beside each other.

    xBC (b, CHANNELS) and z (b, h * p) or None with row strides; window (b, CHANNELS, WIDTH) in place; D (h,); BC
    (b, 2, GROUPS, R) and steps (b, 2, h), of which the second is the decay, from `prepare_streams`; state (b, h, p, R)
    in place; out (b, h * p) float32. SPANS cuts the state's columns: pairs of a first column and a power of two.
    """
    BLOCKS: tl.constexpr = (P + ROWS - 1) // ROWS
    EXACT_ROWS: tl.constexpr = P % ROWS == 0
    head = tl.program_id(0) // BLOCKS
    sequence = tl.program_id(1).to(tl.int64)
    rows = (tl.program_id(0) % BLOCKS) * ROWS + tl.arange(0, ROWS)
    inside = rows < P
    channels = head * P + rows

    # The convolution's loads come first: behind the state's, triton gives it a layout that takes shared memory.
    own_window = window + sequence * CHANNELS * WIDTH
    new, older, filters, offset = _load_conv(
        xBC + sequence * row_stride, own_window, weight, bias, channels, inside, WIDTH, TAPS
    )
    group = head // (HEADS // GROUPS)
    B = BC + (sequence * 2 * GROUPS + group) * R
    C = B + GROUPS * R
    own = state + (sequence * HEADS + head) * P * R
    before = ()
    for k in tl.static_range(len(SPANS)):
        exact = EXACT_ROWS and SPANS[k][0] + SPANS[k][1] <= R
        before = before + (_load_columns(own, rows, SPANS[k][0], SPANS[k][1], P, R, exact),)
    step = tl.load(steps + sequence * 2 * HEADS + head)
    decay = tl.load(steps + sequence * 2 * HEADS + HEADS + head)
    skip = tl.load(D + head).to(tl.float32)
    gate = skip
    if z is not None:
        gate = tl.load(z + sequence * z_stride + channels, mask=inside, other=0.0).to(tl.float32)
    written = ()
    read = ()
    for k in tl.static_range(len(SPANS)):
        written = written + (_load_stream(B, SPANS[k][0], SPANS[k][1], R),)
        read = read + (_load_stream(C, SPANS[k][0], SPANS[k][1], R),)

    x, shifted = _conv(new, older, filters, offset, WIDTH, TAPS)
    u = (x * step)[:, None]
    y = x * skip
    after = ()
    for k in tl.static_range(len(SPANS)):
        tile = before[k].to(tl.float32) * decay + u * written[k]
        y += tl.sum(tile * read[k], axis=1)
        after = after + (tile,)
    if z is not None:
        y *= silu(gate)

    tl.debug_barrier()
    for k in tl.static_range(len(SPANS)):
        _store_columns(
            own, after[k], rows, SPANS[k][0], SPANS[k][1], P, R, EXACT_ROWS and SPANS[k][0] + SPANS[k][1] <= R
        )
    _store_window(own_window, shifted, channels, inside, WIDTH, TAPS)
    tl.store(out + sequence * HEADS * P + channels, y, mask=inside)


def decode_step_(
    window: Tensor, state: Tensor, xBC: Tensor, dt: Tensor, z: Tensor | None, weights: StepWeights
) -> Tensor:
    """`ghostssm.ops.decode.decode_step_`; window and state are contiguous."""
    heads, p, r = state.shape[1:]
    batch, channels, width = window.shape
    xBC, dt, taps = with_dense_rows(xBC), with_dense_rows(dt), weights.taps.contiguous()
    z = None if z is None else with_dense_rows(z)
    groups = weights.groups
    n = (channels - heads * p) // (2 * groups)
    maps = (weights.B_maps, weights.C_maps)
    streams = torch.empty(batch, 2, groups, r, dtype=torch.float32, device=state.device)
    steps = torch.empty(batch, 2, heads, dtype=torch.float32, device=state.device)
    out = torch.empty(batch, heads * p, dtype=torch.float32, device=state.device)
    shape = StepShape.of(p, r, TILE)
    with gpu.on_device_of(state):
        prepare_streams[(2 * groups, batch)](
            xBC,
            stride_of(xBC),
            window,
            taps,
            weights.bias,
            *(None if part is None else part.contiguous() for part in maps),
            dt,
            stride_of(dt),
            weights.dt_bias,
            weights.A_log,
            streams,
            steps,
            INNER=heads * p,
            HEADS=heads,
            GROUPS=groups,
            N=n,
            R=r,
            WIDTH=width,
            TAPS=triton.next_power_of_2(width),
            LANES=triton.next_power_of_2(n),
            HEAD_LANES=triton.next_power_of_2(-(-heads // (2 * groups))),
            MAP_COLUMNS=_MAP_COLUMNS,
            num_warps=WARPS,
        )
        step_state[(heads * -(-p // shape.rows), batch)](
            xBC,
            stride_of(xBC),
            z,
            stride_of(z),
            window,
            taps,
            weights.bias,
            weights.D,
            streams,
            steps,
            state,
            out,
            CHANNELS=channels,
            HEADS=heads,
            P=p,
            R=r,
            GROUPS=groups,
            WIDTH=width,
            TAPS=triton.next_power_of_2(width),
            ROWS=shape.rows,
            SPANS=shape.spans,
            num_warps=WARPS,
        )
    return out


@dataclass(frozen=True)
class StepShape:
    """How a head's state is cut: rows of it at a time, and its columns into powers of two, without padding.

    Attributes:
        rows: a power of two. spans: first column and width of every piece, left to right; the last one may reach over
            the end by less than 16 columns, which are neither read nor written.
    """

    rows: int
    spans: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, p: int, r: int, tile: int) -> StepShape:
        """For a state of p rows and r columns, about ``tile`` numbers at a time."""
        spans, first = [], 0
        while first < r:
            width = max(LEAST_COLUMNS, min(MOST_COLUMNS, 1 << ((r - first).bit_length() - 1)))
            spans.append((first, width))
            first += width
        exact = p & -p  # the largest power of two that divides p
        rows = exact if exact >= LEAST_ROWS else max(LEAST_ROWS, triton.next_power_of_2(p))
        most = max(LEAST_ROWS, 1 << (tile // first).bit_length() - 1)
        return cls(min(rows, most), tuple(spans))
