"""The model card of a pruned checkpoint, README.md in the Hub's format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData

from ghostssm._version import __version__
from ghostssm.checkpoint.loading import Checkpoint, empty_model
from ghostssm.checkpoint.source import REFERENCE, Dialect, Source
from ghostssm.checkpoint.streaming import StreamedCheckpoint
from ghostssm.engines import ENGINES, advise
from ghostssm.evaluation.measurement import Measurement, Searched
from ghostssm.families import family_of
from ghostssm.plan import Plan
from ghostssm.units import text_name

CARD_FILE = "README.md"
_INHERITED = ("license", "license_name", "license_link", "language", "datasets")
_LIBRARIES: dict[Dialect, str] = {"transformers": "transformers", "mamba_ssm": "mamba-ssm"}


def model_card(
    checkpoint: Checkpoint | StreamedCheckpoint,
    plan: Plan,
    dialect: Dialect,
    measured: Measurement | None,
    *,
    tied_head: bool,
) -> ModelCard:
    """The card of a checkpoint whose model a plan was applied to.

    Its metadata has the base model where that came from the hub, and takes licence and language from the base model's
    own card, or the licence from its config.

    Args:
        tied_head: whether the head is stored with the embeddings only.
    """
    inherited = _inherited(checkpoint.source)
    data = ModelCardData(
        **inherited,
        base_model=checkpoint.source.hub_id,
        # Of the relations that the Hub knows the one that fits: changed weights in full.
        base_model_relation="finetune" if checkpoint.source.hub_id else None,
        library_name=_LIBRARIES[dialect],
        pipeline_tag="text-generation",
        tags=["mamba2", "state-space-model", "pruned", "ghostssm"],
    )
    sections = [
        _summary(checkpoint, plan),
        _origin(plan),
        _measured(measured, Searched.of(plan.provenance)),
        _loading(plan, dialect),
        _engines(checkpoint, plan, dialect, tied_head),
        _licence(inherited),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def _inherited(source: Source) -> dict[str, Any]:
    """What of the base model's metadata holds for the pruned model too."""
    found: dict[str, Any] = {}
    path = source.folder / CARD_FILE
    try:
        content = path.read_text(encoding="utf-8") if path.is_file() else ""
        if content.startswith("---"):
            found = ModelCard(content, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # a broken card of the base model, whose faults share no class, is no reason to fail
        found = {}
    if "license" not in found and isinstance(source.config.get("license"), str):
        found["license"] = source.config["license"]
    return {key: found[key] for key in _INHERITED if found.get(key)}


def _base_name(source: Source) -> str:
    """The base model for people to read: not where on somebody's disk it lay."""
    if source.name == REFERENCE:
        return "ghostssm's reference model"
    return source.hub_id or source.folder.absolute().name


def _summary(checkpoint: Checkpoint | StreamedCheckpoint, plan: Plan) -> str:
    layout = family_of(checkpoint.model.config).layout(checkpoint.model.config)
    base = _base_name(checkpoint.source)
    sizes = plan.state_sizes if plan.needs_own_class else (plan.kept_state_size,) * len(plan.selections)
    size = f"{sizes[0]}" if len(set(sizes)) == 1 else f"{min(sizes)} to {max(sizes)}"
    by_layer = "" if len(set(sizes)) == 1 else f"| by layer | | {' '.join(map(str, sizes))} |\n"
    before, after = (4 * layout.intermediate_size * total for total in (plan.state_size * len(sizes), sum(sizes)))
    return (
        f"# {base} with a state size of {size}\n\n"
        f"This is {base}, whose recurrent state was cut from N = {plan.state_size} to N' = {size} by ghostssm. Every "
        "sequence that is decoded keeps, reads and writes less state; weights outside the state stay as wide as they "
        "were.\n\n"
        "| | before | after |\n|---|---:|---:|\n"
        f"| state size | {plan.state_size} | {size} |\n{by_layer}"
        f"| state per sequence, float32 | {before:,} bytes | {after:,} bytes |\n"
        f"| parameters | | {empty_model(checkpoint.model.config).num_parameters():,} |"
    )


def _origin(plan: Plan) -> str:
    lines = [f"- method: `{plan.method}`"]
    calibration = plan.provenance.get("calibration")
    if isinstance(calibration, dict):
        lines.append(
            f"- calibrated on {calibration.get('windows')} windows of {calibration.get('window_length')} tokens of "
            f"{text_name(str(calibration.get('text')))}, seed {calibration.get('seed')}"
        )
    lines.append(
        f"- made with ghostssm {__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    lines.append("- `plan.json` says which channels each layer kept, `ghostssm.json` what produced it")
    return "## How it was made\n\n" + "\n".join(lines)


def _measured(measured: Measurement | None, searched: Searched | None) -> str:
    parts = ["## Measured loss"]
    if searched is not None:
        parts.append(
            f"The smallest state that a search found within an excess loss of {searched.max_excess_loss:g} nats per "
            f"token. Its excess loss: {searched.text}."
        )
    if measured is not None:
        parts.append(
            f"{measured.windows} windows of {measured.window_length} tokens of {text_name(measured.text)}, in float32; "
            "nats per token, with the standard error of the paired difference."
        )
        parts.append(
            "| | loss | excess over the base model |\n|---|---:|---:|\n"
            f"| base model | {measured.dense_loss:.4f} | |\n"
            f"| this model | {measured.pruned_loss:.4f} | {measured.excess_text} |"
        )
    if len(parts) == 1:
        parts.append("Not measured when it was written; `ghostssm evaluate --against` does.")
    return "\n\n".join(parts)


def _loading(plan: Plan, dialect: Dialect) -> str:
    if dialect == "mamba_ssm":
        return (
            "## How to load\n\n```python\n"
            "from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel\n\n"
            'model = MambaLMHeadModel.from_pretrained("PATH")\n```'
        )
    trust = ", trust_remote_code=True" if plan.needs_own_class else ""
    return (
        "## How to load\n\n```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("PATH"{trust})\n'
        f'tokenizer = AutoTokenizer.from_pretrained("PATH"{trust})\n```\n\n'
        "PATH is this folder or the name of its repository."
        + (" The model class comes with it." if plan.needs_own_class else " ghostssm is not needed.")
    )


def _engines(checkpoint: Checkpoint | StreamedCheckpoint, plan: Plan, dialect: Dialect, tied_head: bool) -> str:
    config = checkpoint.model.config
    family = family_of(config)
    advice = advise(
        family.layout(config),
        family.model_type,
        engines=[engine.name for engine in ENGINES if engine.dialect == dialect],
        own_class=plan.needs_own_class,
        tied_head=tied_head,
    )
    lines = []
    for level, words in (("runs", "runs in"), ("slow", "runs slowly in"), ("no", "does not run in")):
        names = [entry.engine for entry in advice if entry.level == level]
        if names:
            lines.append(f"- {words} {', '.join(names)}")
    return "## Engines\n\nBy what their source accepts; `ghostssm inspect` says why.\n\n" + "\n".join(lines)


def _licence(inherited: dict[str, Any]) -> str:
    name = inherited.get("license_name") or inherited.get("license")
    if name is None:
        return "## Licence\n\nThe base model's files name no licence; whatever holds for it holds for this model."
    return f"## Licence\n\n{name}, as the base model's."


def write_card(card: ModelCard, folder: Path) -> None:
    (folder / CARD_FILE).write_text(str(card), encoding="utf-8")
