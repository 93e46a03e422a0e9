"""Bytes by arithmetic against the cache that transformers fills."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from ghostssm.checkpoint.description import describe
from ghostssm.engines.capacity import Footprint, capacity_cells, footprint
from ghostssm.errors import InputError
from ghostssm.models.families import family_of, layout_of, mixers_of
from ghostssm.ops.state_format import INT4
from ghostssm.units import memory_bytes
from tests.conftest import tiny_model
from tests.families.tiny import CASES, tiny_hybrid

_CONTEXT = 7


def cached_tensors(value: Any, seen: set[int]) -> list[torch.Tensor]:
    """Every tensor within transformers' cache."""
    if isinstance(value, torch.Tensor):
        return [] if id(value) in seen or seen.add(id(value)) else [value]
    if isinstance(value, dict):
        return [found for each in value.values() for found in cached_tensors(each, seen)]
    if isinstance(value, list | tuple):
        return [found for each in value for found in cached_tensors(each, seen)]
    return cached_tensors(vars(value), seen) if "cache" in type(value).__module__ else []


@pytest.mark.parametrize("case", ["mamba2", *CASES])
def test_a_sequence_takes_what_transformers_keeps_of_it(case: str) -> None:
    model = tiny_model(n_groups=2) if case == "mamba2" else tiny_hybrid(case)
    ids = torch.zeros(1, _CONTEXT, dtype=torch.long)
    with torch.inference_mode():
        output = model(input_ids=ids, use_cache=True, return_dict=True)
    kept = cached_tensors(output[family_of(model.config).cache_argument], set())
    sizes = [mixer.state_size for mixer in mixers_of(model)]
    found = footprint(layout_of(model.config), sizes, 1000, model.config, _CONTEXT, number_bytes=4)
    numbers = sum(tensor.numel() for tensor in kept if tensor.dtype.is_floating_point)
    assert found.sequence == 4 * numbers
    assert found.weights == 4000


def test_memory_is_filled_and_not_more() -> None:
    sizes = Footprint(weights=1000, state=40, conv=4, mixers=2, taps=4, token=2, attention_layers=1, context=2)
    for memory in (0, 999, 1047, 1048, 123456):
        count = sizes.sequences(memory)
        assert count == 0 or sizes.weights + count * sizes.sequence <= memory
        assert sizes.weights + (count + 1) * sizes.sequence > memory
    assert capacity_cells({"8": sizes})[1] == [["8", "1000 B", "40 B", "4 B", "4 B"]]


def test_a_smaller_state_leaves_room_for_more() -> None:
    model = describe("reference")
    found = [model.footprint(size) for size in (None, 32, 8)]
    assert all(large.weights > small.weights and large.conv > small.conv for large, small in pairwise(found))
    assert found[1].state == 4 * found[2].state == model.state_bytes(32)
    assert model.footprint(32, form=INT4).state * 128 == found[1].state * (16 + 4)  # a row's numbers and its scale


def test_memory_as_people_write_it() -> None:
    assert memory_bytes("80GiB") == memory_bytes("80 gib") == 80 * 2**30
    assert memory_bytes("512 B") == 512
    assert memory_bytes("24GB") == 24 * 10**9
    assert memory_bytes("1.5 TiB") == 3 * 2**39
    for wrong in ("80", "GiB", "-1GiB", "0GiB", "nanGB", "80 GiBs"):
        with pytest.raises(InputError, match="80GiB"):
            memory_bytes(wrong)
