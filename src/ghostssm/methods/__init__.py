"""Methods: each turns what is known of a mixer into one score per state channel. One file per method."""

from ghostssm.methods import (  # noqa: F401
    balanced,
    controllability,
    ghost,
    joint,
    magnitude,
    observability,
    product,
    random,
    rrqr,
    sparsegpt,
    taylor,
)
from ghostssm.methods.base import Evidence, Method, method_named, method_names, stock_method_names

__all__ = ["Evidence", "Method", "method_named", "method_names", "stock_method_names"]
