"""A prediction of the time and memory that a prune takes on this machine, from a config and one matrix product.

GHOST computes every block once and scans each mixer's state twice, whole and pruned. With one multiplication and
addition of a matrix product as the unit, which this machine is timed at,

    seconds = tokens x sum over layers of (products + scans + streams) / rate

where a scan takes so many units per number of the state, and convolution, norm and the like per number that flows
through. Memory holds the libraries, the weights, the hidden states, and what is computed of one block.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from ghostssm.calibration.open_block import KEPT_STREAM_BYTES
from ghostssm.checkpoint.description import Description

_ENERGY_UNITS, _SCAN_UNITS, _STREAM_UNITS = 4.5, 4.0, 120.0
"""Units per token: for a number of the state whose energy is measured, for one that is scanned, and for a number of the
streams. Fitted to `benchmarks/prediction.py`."""
_START_SECONDS = 10.0
"""Seconds to import the libraries, to read the text, and to write the files beside the weights."""
_DISK_RATE = 200e6
"""Bytes per second at which weights are read and written."""
_LIBRARIES = 580 << 20
"""Bytes of PyTorch, transformers and compiled loops."""
_BATCH_TOKENS = 2048
_HELD = 1.5
"""Bytes that the heap holds per byte of kept streams: what in_proj gave for them too, and holes between them."""
_WORKING_COPIES = 5
"""Copies of a batch's streams in memory while they are computed."""


@dataclass(frozen=True)
class Forecast:
    """What a prune with GHOST takes.

    Attributes:
        tokens: of calibration.
        seconds: on the wall.
        memory: bytes at the peak, of the process.
        streamed_memory: the same with ``--stream``.
    """

    tokens: int
    seconds: float
    memory: int
    streamed_memory: int


def forecast(described: Description, state_size: int, tokens: int, rate: float) -> Forecast:
    """Predict a prune of a model to a state size.

    Args:
        described: the unpruned model.
        tokens: of calibration.
        rate: of `product_rate`.
    """
    layout, layers = described.layout, described.layers
    inner, hidden = layout.intermediate_size, layout.hidden_size
    in_proj = hidden * (inner + layout.conv_dim + layout.num_heads)
    mixer = in_proj + inner * hidden
    embeddings = described.vocab_size * hidden * (1 if described.tied_head else 2)
    rest = max(0, described.active_parameters - embeddings - layers * mixer)
    flowing = 2 * inner + layout.conv_dim + layout.num_heads
    streams = 4 * tokens * flowing  # those that don't fit are computed twice
    again = max(0.0, 1 - KEPT_STREAM_BYTES / streams)
    units = layers * (mixer + again * in_proj + (1 + again) * _STREAM_UNITS * flowing) + rest
    units += layers * inner * (_ENERGY_UNITS * layout.state_size + _SCAN_UNITS * state_size)

    weights = described.parameters * getattr(described.config.dtype, "itemsize", 4)
    walked = 4 * tokens * hidden + _HELD * min(streams, KEPT_STREAM_BYTES)
    walked += 4 * _WORKING_COPIES * min(tokens, _BATCH_TOKENS) * flowing
    blocks = described.config.num_hidden_layers
    block = (described.parameters - embeddings) / blocks
    in_memory = max(2 * weights, weights + 4 * block + walked)  # while it is loaded the weights are there twice
    streamed = max(weights * embeddings / described.parameters, 12 * block + walked)
    seconds = _START_SECONDS + 2 * weights / _DISK_RATE + tokens * units / rate
    return Forecast(tokens, seconds, int(_LIBRARIES + in_memory), int(_LIBRARIES + streamed))


def product_rate() -> float:
    """Multiplications with an addition per second, in float32 products of this machine; measured in under 0.5 s."""
    rows, weight = torch.randn(256, 1024), torch.randn(2048, 1024)
    seconds = []
    with torch.inference_mode():
        for _ in range(8):
            begun = time.perf_counter()
            torch.nn.functional.linear(rows, weight)
            seconds.append(time.perf_counter() - begun)
    return rows.shape[0] * weight.numel() / statistics.median(seconds[1:])
