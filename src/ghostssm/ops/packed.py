"""Matrix products with weights kept in the processor's own layout.

oneDNN, which comes with torch on x86, multiplies a few rows with a large weight up to twice as fast if the weight was
rearranged beforehand. The copy costs the weight's memory again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ROWS_HINT = 64
"""The number of rows that the layout is chosen for; other numbers work too."""


@dataclass
class PackedLinear:
    """An ``nn.Linear``'s forward with a packed copy of its weight, which follows the weight when that changes.

    Without oneDNN, off the CPU, in other dtypes than float32 and where a gradient is wanted, it is the plain product.
    """

    linear: nn.Linear
    _packed: Tensor | None = field(default=None, repr=False)
    _source: tuple[Tensor | None, int] = field(default=(None, 0), repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which pack anew: oneDNN's layout can't be copied."""
        return {"linear": self.linear, "_packed": None, "_source": (None, 0)}

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self.linear.weight, self.linear.bias
        plain = weight.dtype != torch.float32 or x.dtype != torch.float32 or weight.device.type != "cpu"
        if plain or torch.is_grad_enabled() or not can_pack():
            return F.linear(x, weight, bias)
        version = -1 if weight.is_inference() else weight._version
        if self._packed is None or self._source[0] is not weight or self._source[1] != version:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS_HINT)
            self._source = (weight, version)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), self._packed, bias, "none", [], "")
        return product


def can_pack() -> bool:
    """Whether this torch has the operators."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
