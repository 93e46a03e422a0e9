"""Where z, x, B, C and dt lie in a Mamba-2 mixer's tensors. All index arithmetic of the project lives here.

``in_proj`` rows are ordered z, x, B, C, dt; ``conv1d`` channels are x, B, C. Within x, head h takes ``head_dim`` rows;
within B and C, group g takes ``state_size`` rows; head h belongs to group ``h // heads_per_group``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ghostssm.errors import InputError, LayoutError


@dataclass(frozen=True)
class SSDLayout:
    """The sizes of one Mamba-2 mixer, and the places they imply.

    Attributes:
        hidden_size: width of the residual stream.
        num_heads: h.
        head_dim: p, numbers per head.
        n_groups: g, groups of heads that share B and C.
        state_size: n, channels of the state per group.
        conv_kernel: taps of the convolution before the recurrence.

    Raises:
        LayoutError: a size is not a positive integer, or the heads don't divide into the groups.
    """

    hidden_size: int
    num_heads: int
    head_dim: int
    n_groups: int
    state_size: int
    conv_kernel: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise LayoutError(f"{name} is {value!r}; expected a positive integer.")
        if self.num_heads % self.n_groups:
            raise LayoutError(
                f"num_heads is {self.num_heads}, which n_groups = {self.n_groups} does not divide; "
                "every group of a Mamba-2 mixer serves the same number of heads."
            )

    @property
    def heads_per_group(self) -> int:
        return self.num_heads // self.n_groups

    @property
    def intermediate_size(self) -> int:
        """Width of x, y and z: heads x head_dim."""
        return self.num_heads * self.head_dim

    @property
    def group_width(self) -> int:
        """Width of B and of C: groups x state size."""
        return self.n_groups * self.state_size

    @property
    def conv_dim(self) -> int:
        """Channels of conv1d: x, B and C."""
        return self.intermediate_size + 2 * self.group_width

    @property
    def in_proj_rows(self) -> int:
        return sum(self.in_proj_sizes)

    @property
    def in_proj_sizes(self) -> tuple[int, int, int, int, int]:
        """Rows of in_proj that make z, x, B, C and dt."""
        return self.intermediate_size, self.intermediate_size, self.group_width, self.group_width, self.num_heads

    @property
    def state_numbers(self) -> int:
        """Numbers in the recurrent state of one layer and one sequence: heads x head_dim x state size."""
        return self.intermediate_size * self.state_size

    @property
    def conv_state_numbers(self) -> int:
        """Numbers in the convolution's window of one layer and one sequence."""
        return self.conv_dim * self.conv_kernel

    def with_state_size(self, state_size: int) -> SSDLayout:
        return replace(self, state_size=state_size)

    def split_in_proj(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cut (..., in_proj_rows) into z, the conv1d input xBC, and dt."""
        z, xBC, dt = projected.split([self.intermediate_size, self.conv_dim, self.num_heads], dim=-1)
        return z, xBC, dt

    def split_conv(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cut (b, l, conv_dim) into x (b, l, h, p), B and C (b, l, g, n)."""
        x, B, C = xBC.split([self.intermediate_size, self.group_width, self.group_width], dim=-1)
        return (
            x.unflatten(-1, (self.num_heads, self.head_dim)),
            B.unflatten(-1, (self.n_groups, self.state_size)),
            C.unflatten(-1, (self.n_groups, self.state_size)),
        )

    @property
    def in_proj_B(self) -> slice:
        """Rows of in_proj that make B, group after group."""
        start = 2 * self.intermediate_size
        return slice(start, start + self.group_width)

    @property
    def in_proj_C(self) -> slice:
        """Rows of in_proj that make C, group after group."""
        start = 2 * self.intermediate_size + self.group_width
        return slice(start, start + self.group_width)

    @property
    def conv_B(self) -> slice:
        """Channels of conv1d that carry B."""
        return slice(self.intermediate_size, self.intermediate_size + self.group_width)

    @property
    def conv_C(self) -> slice:
        """Channels of conv1d that carry C."""
        start = self.intermediate_size + self.group_width
        return slice(start, start + self.group_width)

    def in_proj_index(self, kept: Sequence[Sequence[int]]) -> Tensor:
        """Rows of in_proj that remain when group g keeps the state channels ``kept[g]``, in new order.

        Channels that pad a group to the common size are -1; so is their row here.
        """
        z_and_x = torch.arange(2 * self.intermediate_size)
        dt = torch.arange(self.in_proj_rows - self.num_heads, self.in_proj_rows)
        return torch.cat([z_and_x, self._rows(kept, self.in_proj_B.start), self._rows(kept, self.in_proj_C.start), dt])

    def conv_index(self, kept: Sequence[Sequence[int]]) -> Tensor:
        """Channels of conv1d that remain, as `in_proj_index` has the rows."""
        x = torch.arange(self.intermediate_size)
        return torch.cat([x, self._rows(kept, self.conv_B.start), self._rows(kept, self.conv_C.start)])

    def _rows(self, kept: Sequence[Sequence[int]], start: int) -> Tensor:
        rows = [
            -1 if channel < 0 else start + group * self.state_size + channel
            for group, channels in enumerate(kept)
            for channel in channels
        ]
        return torch.tensor(rows, dtype=torch.long)


def check_state_size(state_size: int, limit: int) -> None:
    """Raise InputError unless ``state_size`` is a state size that a model with N = ``limit`` can be cut to."""
    if isinstance(state_size, bool) or not isinstance(state_size, int) or not 1 <= state_size <= limit:
        raise InputError(f"The state size is {state_size!r}; expected an integer from 1 to the model's N = {limit}.")
