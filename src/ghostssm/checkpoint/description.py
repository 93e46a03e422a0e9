"""What a checkpoint is, from its config and file headers: no weights are loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedConfig

from ghostssm.checkpoint.dialects import dialect_named
from ghostssm.checkpoint.loading import checked_tensors, empty_model, model_config, stored_dtype
from ghostssm.checkpoint.manifest import Manifest
from ghostssm.checkpoint.naming import has_tied_head, settle_ties, with_values_of_their_own
from ghostssm.checkpoint.source import Source, find_source
from ghostssm.checkpoint.weights import stored_tensors
from ghostssm.engines.capacity import DEFAULT_CONTEXT, Footprint, footprint
from ghostssm.errors import ModelError
from ghostssm.files.tensors import StoredTensor
from ghostssm.models.families import Family, family_of, mixers_of
from ghostssm.models.layout import SSDLayout
from ghostssm.models.transformers_private import tied_weights
from ghostssm.ops.state_format import FLOAT32, StateFormat, Tiers
from ghostssm.plan.measurement import Measurement
from ghostssm.values import Value

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HEAD = "lm_head.weight"
_EMBEDDINGS = re.compile(r"(.*\.)?(embeddings|embed_tokens)\.weight")
_MIXER = re.compile(r"(.*\blayers\.(\d+)\..*)A_log")
_UNREAD = "mtp."
"""Prefix of the names of layers that predict further tokens; transformers' classes leave these in the files."""
_RECURRENT = frozenset({"linear_attention", "hybrid"})
"""What transformers calls a layer that has a mixer, alone or beside attention."""
_EXPERTS = re.compile(r".*(\.experts\.|\.block_sparse_moe\.(input|output)_linear\.).*")
"""Weights of experts that tokens are routed to."""
_NO_PARAMETERS = re.compile(r".*(inv_freq|e_score_correction_bias|mup_vector)")
"""Buffers, which files may hold."""


@dataclass(frozen=True)
class Pruning:
    """What a pruned checkpoint's manifest says of its making.

    Attributes:
        state_size: N, before. kept: N' of every mixer, front to back, padding not counted.
        measured: the loss before and after, if it was measured.
        state_dtype: that the state is to be kept in, as it was chosen or asked for; None if it was not.
    """

    method: str
    state_size: int
    kept: tuple[int, ...]
    measured: Measurement | None
    state_dtype: str | None = None


@dataclass(frozen=True, repr=False)
class Description(Value):
    """The sizes of a model, and the memory that one sequence needs while it is decoded.

    Attributes:
        name: what the caller called it.
        dialect: of its config.json.
        family: the family's model type.
        layout: of the widest mixer.
        state_sizes: of the recurrent state of every mixer, front to back.
        vocab_size: of the config.
        parameters: of the whole model, shared ones counted once.
        expert_parameters: of all experts that tokens are routed to.
        tied_head: whether the output head shares the embeddings' weight. Where the weights are not at hand, as of a
            model on the hub, this is what the config says.
        config: as transformers reads it.
        channel_biases: how many numbers biases have for each channel of B and of C: 0, 1 or 2.
        pruning: of a checkpoint that ghostssm pruned; None for others.
        tiers: of every mixer, how many channels each head is to keep in how many bits; empty if the model does not say.
    """

    name: str
    dialect: str
    family: str
    layout: SSDLayout
    state_sizes: tuple[int, ...]
    vocab_size: int
    parameters: int
    tied_head: bool
    config: PreTrainedConfig = field(repr=False, compare=False)
    expert_parameters: int = 0
    channel_biases: int = 0
    pruning: Pruning | None = None
    tiers: tuple[Tiers, ...] = ()

    @property
    def layers(self) -> int:
        """Mixers with a recurrent state."""
        return len(self.state_sizes)

    @property
    def active_parameters(self) -> int:
        """Parameters that one token meets: of the experts, those that it is routed to."""
        if not self.expert_parameters:
            return self.parameters
        experts: int = getattr(self.config, "n_routed_experts", None) or self.config.num_local_experts
        used: int = self.config.num_experts_per_tok
        return self.parameters - self.expert_parameters * (experts - used) // experts

    @property
    def is_stock(self) -> bool:
        """Whether the state is neither projected nor of a size of its own in every layer."""
        return set(self.state_sizes) == {self.layout.state_size}

    def state_bytes(self, state_size: int | None = None, form: StateFormat = FLOAT32) -> int:
        """Bytes of recurrent state per sequence, over all layers; of the model as it is, or cut to a state size.

        Args:
            state_size: N' to cut to; None for the model as it is.
            form: how the state is stored.

        Raises:
            InputError: in tiers, of which the model says nothing.
        """
        sizes = self.state_sizes if state_size is None else [state_size] * self.layers
        return form.model_bytes(self.layout.intermediate_size, sizes, self.tiers if state_size is None else ())

    def removed_parameters(self, state_size: int | None) -> int:
        """Parameters of in_proj and conv1d that a cut to ``state_size`` takes away."""
        if state_size is None:
            return 0
        channels = self.layout.conv_dim - self.layout.with_state_size(state_size).conv_dim
        return self.layers * channels * (self.layout.hidden_size + self.layout.conv_kernel + self.channel_biases)

    def footprint(
        self, state_size: int | None = None, context: int = DEFAULT_CONTEXT, form: StateFormat = FLOAT32
    ) -> Footprint:
        """Bytes while it is decoded, all but the state in bfloat16; of the model as it is, or at a state size.

        Args:
            state_size: N' to cut to; None for the model as it is.
            context: tokens that attention layers, if there are any, keep keys and values of.
            form: how the state is stored.
        """
        layout, sizes = self.layout, self.state_sizes
        if state_size is not None:
            layout, sizes = layout.with_state_size(state_size), (state_size,) * self.layers
        parameters = self.parameters - self.removed_parameters(state_size)
        return footprint(layout, sizes, parameters, self.config, context, form, self.tiers)


def describe(spec: str) -> Description:
    """The sizes of a model, from its config and file headers.

    Raises what `ghostssm.load` raises, but looks at no weight.

    Args:
        spec: a hub id, a local folder in any dialect, or ``reference``.
    """
    source = find_source(spec, weights=False)
    config = model_config(source)
    facts = facts_from_files(source, config, family_of(config))
    if facts is None:
        return described(_built(source, config), spec, source)
    return _description(config, facts, spec, source)


def chosen_state_dtype(source: Source) -> str:
    """The dtype in which a model's state is to be kept, if its manifest says one; float32 otherwise."""
    try:
        return Manifest.read(source.folder).state_dtype or FLOAT32.name
    except ModelError:  # no manifest, or a broken one: reading it elsewhere tells
        return FLOAT32.name


def described(model: PreTrainedModel, name: str, source: Source) -> Description:
    """Describe a model in memory, with its weights or without."""
    return _description(model.config, _facts_of(model), name, source)


def _description(config: PreTrainedConfig, facts: Facts, name: str, source: Source) -> Description:
    family = family_of(config)
    return Description(
        name=name,
        dialect=source.dialect,
        family=family.model_type,
        layout=family.layout(config),
        vocab_size=config.vocab_size,
        config=config,
        pruning=_pruning(source.folder, len(facts.state_sizes)),
        tiers=_tiers(config),
        **vars(facts),
    )


def _tiers(config: PreTrainedConfig) -> tuple[Tiers, ...]:
    """Of every layer that has a mixer."""
    layers = getattr(config, "state_tiers", None) or []
    return tuple(tuple((wide, narrow) for wide, narrow in heads) for heads in layers if heads)


def _built(source: Source, config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config, without memory; takes seconds."""
    model = empty_model(config)
    return empty_model(model.config) if _settled_by_files(source, model) else model


def _facts_of(model: PreTrainedModel) -> Facts:
    mixers = mixers_of(model)
    return Facts(
        state_sizes=tuple(mixer.state_size for mixer in mixers),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        expert_parameters=sum(
            parameter.numel() for name, parameter in model.named_parameters() if _EXPERTS.fullmatch(name)
        ),
        tied_head=has_tied_head(model),
        channel_biases=sum(part.bias is not None for part in (mixers[0].in_proj, mixers[0].conv1d)),
    )


def _settled_by_files(source: Source, model: PreTrainedModel) -> bool:
    """Whether the weight files hold other values for a head that the config ties; the config is then corrected."""
    ties = tied_weights(model)
    if not ties:
        return False
    try:
        stored = checked_tensors(source, model.config)
    except ModelError:  # no weights at hand, or broken ones: loading them tells
        return False
    for name in with_values_of_their_own(model, stored, stored_dtype(stored)):
        ties.pop(name)
    settle_ties(model)
    return not ties


def _pruning(folder: Path, layers: int) -> Pruning | None:
    """What a folder's manifest says of its pruning; None if it says nothing, or there is none."""
    try:
        manifest = Manifest.read(folder)
    except ModelError:
        return None
    before, after = manifest.state_size_before, manifest.state_size_after
    if manifest.method is None or before is None or after is None:
        return None
    kept = (after,) * layers if isinstance(after, int) else after
    return (
        Pruning(manifest.method, before, kept, manifest.measured, manifest.state_dtype) if len(kept) == layers else None
    )


@dataclass(frozen=True)
class Facts:
    """Some fields of a `ghostssm.Description`, under the same names."""

    state_sizes: tuple[int, ...]
    parameters: int
    expert_parameters: int
    tied_head: bool
    channel_biases: int


def facts_from_files(source: Source, config: PreTrainedConfig, family: Family) -> Facts | None:
    """The facts of a model whose files are at hand, with mixers of the sizes that its config has.

    Returns:
        None where weights are not at hand, as of a model on the hub, or names and sizes are not those of the config.
        Building the model then gives the facts, or loading it shows the fault.
    """
    try:
        tensors = stored_tensors(source.folder)
    except ModelError:
        return None
    dialect = dialect_named(source.dialect)
    stored = {dialect.to_transformers_name(name): value for name, value in tensors.items()}
    stored = {name: value for name, value in stored.items() if not name.startswith(_UNREAD)}
    mixers = {int(match[2]): match[1] for name in stored if (match := _MIXER.fullmatch(name))}
    names = [mixers[index] for index in sorted(mixers)]
    embeddings = [name for name in stored if _EMBEDDINGS.fullmatch(name)]
    has_all_mixers = bool(names) and sorted(mixers) == _recurrent_layers(config, family)
    has_head = _HEAD in stored or config.tie_word_embeddings
    if not has_all_mixers or not has_head or len(embeddings) != 1:
        return None
    layouts = [family.layout(config)] * len(names)
    if family.is_own_class:
        sizes = [config.state_size_of(layer) for layer in sorted(mixers)]
        layouts = [layout.with_state_size(size) for layout, size in zip(layouts, sizes, strict=True)]
    if not all(_fits(stored, name, layout) for name, layout in zip(names, layouts, strict=True)):
        return None
    # transformers has one switch for all weights that are shared.
    shared = {_HEAD: embeddings[0], **family.shared_parts(config)} if config.tie_word_embeddings else {}
    own = _with_values_of_their_own(stored, shared)
    return Facts(
        state_sizes=tuple(
            config.recurrent_state_size_of(layer) if family.is_own_class else layout.state_size
            for layer, layout in zip(sorted(mixers), layouts, strict=True)
        ),
        parameters=sum(math.prod(stored[name].shape) for name in own if not _NO_PARAMETERS.fullmatch(name)),
        expert_parameters=sum(math.prod(stored[name].shape) for name in own if _EXPERTS.fullmatch(name)),
        tied_head=config.tie_word_embeddings and _HEAD not in own,
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


def _with_values_of_their_own(stored: Mapping[str, StoredTensor], shared: Mapping[str, str]) -> list[str]:
    """Names of stored tensors, without those that repeat the weight that they share; only repeated ones are read.

    Args:
        shared: from what a name has in it to what the name of the shared weight has in its place.
    """

    def weight_of(name: str) -> str:
        part = next((part for part in shared if part in name), name)
        return name.replace(part, shared.get(part, part))

    first: dict[str, StoredTensor] = {}
    own = []
    for name in sorted(stored, key=lambda name: weight_of(name) != name):
        other = first.setdefault(weight_of(name), stored[name])
        if other is stored[name] or not torch.equal(other.read(), stored[name].read()):
            own.append(name)
    return own
