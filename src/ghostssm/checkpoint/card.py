"""The model card of a pruned checkpoint, README.md in the Hub's format."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedConfig

from ghostssm._version import __version__
from ghostssm.checkpoint.dialects import dialect_named
from ghostssm.checkpoint.loading import empty_model
from ghostssm.checkpoint.manifest import Manifest
from ghostssm.checkpoint.place import REFERENCE
from ghostssm.checkpoint.source import Source
from ghostssm.engines import advise
from ghostssm.models.families import family_of, layout_of, mixers_of
from ghostssm.ops.state_format import FLOAT32, TIERS
from ghostssm.plan.distillation import MOVED, Distillation
from ghostssm.plan.measurement import Measurement
from ghostssm.plan.plan import Plan
from ghostssm.units import sizes_text, text_name

CARD_FILE = "README.md"
_INHERITED = ("license", "license_name", "license_link", "language", "datasets")


@dataclass(frozen=True)
class Base:
    """What a card says of the model that was pruned.

    Attributes:
        name: for people to read: not where on somebody's disk it lay.
        hub_id: its name on the hub, if it came from there.
        inherited: entries of its metadata that hold for the pruned model too.
    """

    name: str
    hub_id: str | None
    inherited: Mapping[str, Any]

    @classmethod
    def of(cls, source: Source) -> Base:
        """Of the model that is to be pruned: licence and language are its own card's, or the licence its config's."""
        name = source.published_name
        return cls(_readable(source.name, name), source.hub_id, _inherited(source, _metadata(source)))

    @classmethod
    def of_pruned(cls, source: Source, manifest: Manifest) -> Base:
        """Of a checkpoint that ghostssm wrote: from its manifest, and its card, which inherited the rest."""
        metadata = _metadata(source)
        hub_id = metadata.get("base_model")
        hub_id = hub_id if isinstance(hub_id, str) else None
        named = manifest.base_model or hub_id or source.published_name
        return cls(_readable(named, hub_id or Path(named).name), hub_id, _inherited(source, metadata))


def _readable(spec: str, name: str) -> str:
    return "ghostssm's reference model" if spec == REFERENCE else name


def _metadata(source: Source) -> dict[str, Any]:
    """The metadata of a folder's card; empty if there is none that can be read."""
    path = source.folder / CARD_FILE
    try:
        content = path.read_text(encoding="utf-8") if path.is_file() else ""
        has_metadata = content.startswith("---")
        return dict(ModelCard(content, ignore_metadata_errors=True).data.to_dict()) if has_metadata else {}
    except Exception:  # a broken card, whose faults share no class, is no reason to fail
        return {}


def _inherited(source: Source, metadata: Mapping[str, Any]) -> dict[str, Any]:
    licence = source.config.get("license")
    entries = ({"license": licence} if isinstance(licence, str) else {}) | dict(metadata)
    return {key: entries[key] for key in _INHERITED if entries.get(key)}


def model_card(
    base: Base,
    config: PreTrainedConfig,
    plan: Plan,
    dialect: str,
    measured: Measurement | None,
    *,
    untied: bool,
) -> ModelCard:
    """The card of a checkpoint whose model a plan was applied to.

    Args:
        config: as it is stored: the state may be padded since, and the head be tied no more.
        untied: whether the base model ties the head that the config does not.
    """
    written = dialect_named(dialect)
    data = ModelCardData(
        **base.inherited,
        base_model=base.hub_id,
        # Of the relations that the Hub knows the one that fits: changed weights in full.
        base_model_relation="finetune" if base.hub_id else None,
        library_name=written.library,
        pipeline_tag="text-generation",
        tags=["mamba2", "state-space-model", "pruned", "ghostssm"],
    )
    own_class = family_of(config).is_own_class
    sections = [
        _summary(base, config, plan, untied),
        _origin(plan),
        _measured(measured, plan),
        f"## How to load\n\n{written.how_to_load(own_class)}",
        _engines(config, own_class, dialect),
        _licence(base.inherited),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def _summary(base: Base, config: PreTrainedConfig, plan: Plan, untied: bool) -> str:
    model = empty_model(config)
    stored = [mixer.state_size for mixer in mixers_of(model)]
    kept = list(plan.state_sizes)
    size = sizes_text(kept)
    padding = "" if stored == kept else f", padded to {sizes_text(stored)}"
    by_layer = "" if len(set(kept)) == 1 else f"| by layer | | {' '.join(map(str, kept))} |\n"
    width = layout_of(config).intermediate_size
    before, after = (4 * width * total for total in (plan.state_size * len(stored), sum(stored)))
    original = copy.deepcopy(config)
    family_of(config).set_state_size(original, plan.state_size)
    original.tie_word_embeddings = config.tie_word_embeddings or untied
    head = " The head, which the base model ties to the embeddings, is stored as a weight of its own." if untied else ""
    return (
        f"# {base.name} with a state size of {size}{padding}\n\n"
        f"This is {base.name}, whose recurrent state was cut from N = {plan.state_size} to N' = {size} by ghostssm. "
        f"{_consequences(plan, padding)}{head}\n\n"
        "| | before | after |\n|---|---:|---:|\n"
        f"| state size | {plan.state_size} | {size}{padding} |\n{by_layer}"
        f"| state per sequence, float32 | {before:,} bytes | {after:,} bytes |\n"
        f"| parameters | {empty_model(original).num_parameters():,} | {model.num_parameters():,} |"
    )


def _consequences(plan: Plan, padding: str) -> str:
    """What a cut means for memory and weights."""
    if padding:
        return (
            "Channels of zeros fill it up again, for engines that know few sizes: the logits are those of N', memory, "
            "work and number of parameters those of the padded state."
        )
    less = "Every sequence that is decoded keeps, reads and writes less state"
    if plan.is_projected:
        return (
            f"{less}. No weight became smaller: B and C are computed as wide as they were, and two matrices per layer, "
            "which are new, project them to the smaller state."
        )
    return (
        f"{less}. The rows of in_proj and conv1d that made the removed channels are gone; all other weights stay as "
        "wide as they were."
    )


def _origin(plan: Plan) -> str:
    lines = [f"- method: `{plan.method}`"]
    if plan.provenance is not None:
        seen = plan.provenance.calibration
        lines.append(
            f"- calibrated on {seen.windows} windows of {seen.window_length} tokens of {text_name(seen.text)}, "
            f"seed {seen.seed}"
        )
    lines += distillation_lines(plan.distillations)
    lines.append(
        f"- written with ghostssm {__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    lines.append("- `plan.json` says which channels each layer kept, `ghostssm.json` what produced it")
    return "## How it was made\n\n" + "\n".join(lines)


def distillation_lines(distillations: Sequence[Distillation]) -> list[str]:
    """Lines of a list that say what each training of the whole model was."""
    return [
        f"- distilled: {each.steps} steps, {each.tokens:,} tokens of {text_name(each.text)}, on the next-token "
        f"distributions of {each.teacher or 'the base model'}{each.rounded_text}; gradients through the whole model "
        f"moved {MOVED[each.trained]}. Excess loss on {each.held_out_windows} held-out windows of that text: "
        f"{each.curve[0].excess_text} before, {each.best.excess_text} after"
        for each in distillations
    ]


def distilled_card(own: str, base: Base, distilled: Distillation) -> str:
    """The card of a model that others pruned: its own, with what ghostssm did to it."""
    how = "\n".join(["## Distilled by ghostssm", "", *distillation_lines([distilled])])
    return f"{own.rstrip() or f'# {base.name}'}\n\n{how}\n"


def _kept_in(state_dtype: str) -> str:
    if state_dtype == TIERS.name:
        return (
            "**The state is meant to be kept in tiers**: of a head the first channels in 8 bits, the next in 4, the "
            "rest not at all; `state_tiers` in config.json says how many. `ghostssm.accelerate(model, "
            'state_dtype="tiers")` keeps it so. No engine does yet: they keep all channels, in more bytes.'
        )
    with_transformers = f' `ghostssm.accelerate(model, state_dtype="{state_dtype}")` keeps it so with transformers.'
    return (
        f"**The state is meant to be kept in {state_dtype}**; `ghostssm inspect PATH --state-dtype {state_dtype}` says "
        f"how engines are told.{with_transformers if state_dtype != FLOAT32.name else ''}"
    )


def _measured(measured: Measurement | None, plan: Plan) -> str:
    parts = ["## Measured loss"]
    searched = None if plan.provenance is None else plan.provenance.search
    choice = None if plan.provenance is None else plan.provenance.choice
    if searched is not None:
        parts.append(
            f"The fewest bytes of state that a search over sizes and dtypes found within an excess loss of "
            f"{searched.max_excess_loss:g} nats per token. Its excess loss: {searched.text}."
        )
    if choice is not None:
        parts.append(
            f"Chosen as what loses least within {choice.state_bytes:,} bytes of state per sequence: {choice.text}. "
            f"{_kept_in(choice.chosen.state_dtype)} All that were measured, in nats per token over the base model with "
            "a float32 state:"
        )
        parts.append(_table(choice.cells(), "rlrr"))
    elif plan.state_dtype is not None:
        parts.append(_kept_in(plan.state_dtype))
    if measured is not None:
        parts.append(
            f"{measured.windows} windows of {measured.window_length} tokens of {text_name(measured.text)}, in float32"
            f"{f', the state in {plan.state_dtype}' if plan.state_dtype not in (None, 'float32') else ''}; "
            "nats per token, with the standard error of the paired difference."
        )
        parts.append(
            "| | loss | excess over the base model |\n|---|---:|---:|\n"
            f"| base model | {measured.dense_loss:.4f} | |\n"
            f"| this model | {measured.pruned_loss:.4f} | {measured.excess_text} |"
        )
        if measured.compared:
            parts.append(f"Other recipes beside `{plan.method}`, on the same windows:")
            parts.append(_table(measured.cells(), "llrlrr"))
    if measured is None and searched is None and choice is None:
        parts.append("Not measured when it was written; `ghostssm evaluate --against` does.")
    return "\n\n".join(parts)


def _table(cells: tuple[list[str], list[list[str]]], alignments: str) -> str:
    """A table in Markdown; ``alignments`` has an l or r for every column."""
    headers, lines = cells
    rule = ["---:" if side == "r" else "---" for side in alignments]
    return "\n".join(f"| {' | '.join(row)} |" for row in (headers, rule, *lines))


def _engines(config: PreTrainedConfig, own_class: bool, dialect: str) -> str:
    family = family_of(config)
    advice = advise(
        family.layout(config),
        family.model_type,
        dialect=dialect,
        own_class=own_class,
        tied_head=config.tie_word_embeddings,
        config=config,
    )
    lines = []
    for level, words, when in (
        ("runs", "runs in", "after"),
        ("slow", "runs slowly in", "after"),
        ("no", "does not run in", "before"),
    ):
        engines: dict[str, list[str]] = {}
        for entry in advice:
            if entry.level == level:
                engines.setdefault(entry.export, []).append(entry.engine)
        for export, names in engines.items():
            remedy = f" {when} `ghostssm export PATH {export}`" if export else ""
            lines.append(f"- {words} {', '.join(names)}{remedy}")
    return "## Engines\n\nBy what their source accepts; `ghostssm inspect` says why.\n\n" + "\n".join(lines)


def _licence(inherited: Mapping[str, Any]) -> str:
    name = inherited.get("license_name") or inherited.get("license")
    if name is None:
        return "## Licence\n\nThe base model's files name no licence; whatever holds for it holds for this model."
    return f"## Licence\n\n{name}, as the base model's."


def write_card(card: ModelCard, folder: Path) -> None:
    (folder / CARD_FILE).write_text(str(card), encoding="utf-8")
