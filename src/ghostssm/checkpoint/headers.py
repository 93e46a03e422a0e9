"""What a model is made of, from the headers of its weight files; model classes take seconds to import."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from ghostssm.checkpoint.dialects import dialect_named
from ghostssm.checkpoint.source import Source
from ghostssm.checkpoint.weights import stored_tensors
from ghostssm.errors import ModelError
from ghostssm.files.tensors import StoredTensor
from ghostssm.models.families import Family
from ghostssm.models.layout import SSDLayout

_HEAD = "lm_head.weight"
_EMBEDDINGS = re.compile(r"(.*\.)?(embeddings|embed_tokens)\.weight")
_MIXER = re.compile(r"(.*\blayers\.(\d+)\..*)A_log")
_UNREAD = "mtp."
"""Begins the names of layers that predict further tokens, which transformers' classes leave in the files."""
_RECURRENT = frozenset({"linear_attention", "hybrid"})
"""What transformers calls a layer that has a mixer, alone or beside attention."""
_NO_PARAMETERS = re.compile(r".*(inv_freq|e_score_correction_bias|mup_vector)")
"""Buffers, which files may hold."""


@dataclass(frozen=True)
class Facts:
    """Some of a `ghostssm.Description`, with the names that it has there."""

    state_sizes: tuple[int, ...]
    parameters: int
    tied_head: bool
    channel_biases: int


def facts_from_files(source: Source, config: PreTrainedConfig, family: Family) -> Facts | None:
    """The facts of a model whose files are at hand, with mixers of the sizes that its config has.

    Returns:
        None where the files are not that plain; whoever builds the model then finds out, or finds the fault.
    """
    if family.shares_blocks:
        return None
    try:
        found = stored_tensors(source.folder)
    except ModelError:
        return None
    dialect = dialect_named(source.dialect)
    stored = {dialect.to_transformers_name(name): value for name, value in found.items()}
    mixers = {int(match[2]): match[1] for name in stored if (match := _MIXER.fullmatch(name))}
    names = [mixers[index] for index in sorted(mixers)]
    embeddings = [name for name in stored if _EMBEDDINGS.fullmatch(name)]
    has_all_mixers = bool(names) and sorted(mixers) == _recurrent_layers(config, family)
    has_unread = any(name.startswith(_UNREAD) for name in stored)
    has_head = _HEAD in stored or config.tie_word_embeddings
    if not has_all_mixers or has_unread or not has_head or len(embeddings) != 1:
        return None
    layouts = [family.layout(config)] * len(names)
    if family.is_own_class:
        sizes = [config.state_size_of(layer) for layer in sorted(mixers)]
        layouts = [layout.with_state_size(size) for layout, size in zip(layouts, sizes, strict=True)]
    if not all(_fits(stored, name, layout) for name, layout in zip(names, layouts, strict=True)):
        return None
    tied = config.tie_word_embeddings and _is_tied(stored, embeddings[0])
    counted = [name for name in stored if not _NO_PARAMETERS.fullmatch(name) and not (tied and name == _HEAD)]
    return Facts(
        state_sizes=tuple(
            config.recurrent_state_size_of(layer) if family.is_own_class else layout.state_size
            for layer, layout in zip(sorted(mixers), layouts, strict=True)
        ),
        parameters=sum(math.prod(stored[name].shape) for name in counted),
        tied_head=tied,
        channel_biases=sum(f"{names[0]}{part}.bias" in stored for part in ("in_proj", "conv1d")),
    )


def _recurrent_layers(config: PreTrainedConfig, family: Family) -> list[int]:
    """The layers that have a mixer, by what a config says."""
    if not family.is_hybrid:
        return list(range(config.num_hidden_layers))
    return [layer for layer, kind in enumerate(config.layer_types or ()) if kind in _RECURRENT]


def _fits(stored: Mapping[str, StoredTensor], mixer: str, layout: SSDLayout) -> bool:
    """Whether a stored mixer has the sizes of a layout."""
    expected = {
        "in_proj.weight": (layout.in_proj_rows, layout.hidden_size),
        "conv1d.weight": (layout.conv_dim, 1, layout.conv_kernel),
        "out_proj.weight": (layout.hidden_size, layout.intermediate_size),
    }
    shapes = {part: stored[f"{mixer}{part}"].shape for part in expected if f"{mixer}{part}" in stored}
    return shapes == expected


def _is_tied(stored: Mapping[str, StoredTensor], embeddings: str) -> bool:
    """Whether a head that the config ties is stored with the values of the embeddings, or not at all."""
    head = stored.get(_HEAD)
    return head is None or torch.equal(head.read(), stored[embeddings].read())
