"""What is to be known of a family's architecture in llama.cpp."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

NO_LIMIT = 2**20
"""Context length of a model whose positions are not limited; llama.cpp wants some number."""

TensorMap = Callable[[Any, str, Tensor], Iterator[tuple[str, Tensor]]]


def _unchanged(config: Any, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield name, tensor


def _no_faults(config: Any) -> list[str]:
    return []


@dataclass(frozen=True)
class Architecture:
    """One family in GGUF.

    Attributes:
        name: of llama.cpp's architecture.
        write_keys: writes the keys beside those of the mixers into a ``gguf.GGUFWriter``.
        prefix: of transformers' tensor names, and what the ``gguf`` package's table of names has in its place.
        names: of a block's tensors that this table lacks, to names in GGUF.
        tensors: turns a config, a GGUF name and a tensor into the tensors to write, where they are not the same.
        faults: what in a config llama.cpp does not compute.
    """

    name: str
    write_keys: Callable[[Any, Any], None]
    prefix: tuple[str, str] = ("", "")
    names: Mapping[str, str] = field(default_factory=dict)
    tensors: TensorMap = _unchanged
    faults: Callable[[Any], list[str]] = _no_faults


def unless_tied(config: Any, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """All but a head that is the embeddings."""
    if name != "output.weight" or not config.tie_word_embeddings:
        yield name, tensor
