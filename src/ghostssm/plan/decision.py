"""What is decided for one mixer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ghostssm.models.layout import SSDLayout
from ghostssm.models.mixer import Projection
from ghostssm.ops.state_format import Tiers
from ghostssm.values import Value


@dataclass(frozen=True, repr=False)
class Selection(Value):
    """The state channels that each group of one mixer keeps.

    Attributes:
        kept: the channels of each group, in ascending order.
    """

    kept: tuple[tuple[int, ...], ...]

    @classmethod
    def whole(cls, layout: SSDLayout) -> Selection:
        """Every channel of a mixer."""
        return cls((tuple(range(layout.state_size)),) * layout.n_groups)

    @property
    def width(self) -> int:
        """The largest count over the groups: the state size that this mixer needs.

        At least 1: a mixer that keeps nothing has one channel of zeros, since no model class knows a state of size 0.
        """
        return max(1, *(len(channels) for channels in self.kept))

    def padded(self, width: int) -> tuple[tuple[int, ...], ...]:
        """``kept`` with every group filled up to ``width`` by -1, which stands for a channel of zeros."""
        return tuple(channels + (-1,) * (width - len(channels)) for channels in self.kept)


@dataclass(frozen=True, repr=False, eq=False)
class Decision(Value):
    """All that is decided for one mixer.

    Attributes:
        selection: the channels that stay.
        projection: of these channels onto a smaller state, if any.
        changes: new values of the mixer module's parameters, by name, in their shapes after the selection. In a plan
            they are among the plan's changes instead.
        tiers: of a projected state, how many channels each head keeps in how many bits, if it is to be kept in tiers.
    """

    selection: Selection
    projection: Projection | None = None
    changes: Mapping[str, Tensor] = field(default_factory=dict)
    tiers: Tiers | None = None

    @property
    def width(self) -> int:
        """The state size that this mixer needs."""
        return self.selection.width if self.projection is None else self.projection.B.shape[-1]
