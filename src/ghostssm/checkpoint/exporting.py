"""Rewrite a checkpoint in another dialect, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ghostssm._version import __version__
from ghostssm.checkpoint import saving
from ghostssm.checkpoint.card import CARD_FILE, Base, distilled_card, model_card, write_card
from ghostssm.checkpoint.dialects import dialect_named
from ghostssm.checkpoint.left_out import LeftOut, left_out
from ghostssm.checkpoint.loading import Checkpoint, in_memory
from ghostssm.checkpoint.manifest import Manifest
from ghostssm.checkpoint.probe import overflow_in, probed
from ghostssm.checkpoint.side_files import SideFiles, carry_over, copy_file
from ghostssm.checkpoint.source import find_source
from ghostssm.checkpoint.streamed import open_blocks
from ghostssm.errors import InputError, PlanError
from ghostssm.files.outputs import PLAN_FILE, OutputFolder, storing
from ghostssm.files.reading import read_json_object
from ghostssm.models.families import family_of, mixers_of
from ghostssm.plan.distillation import Distillation, state_dtype_of
from ghostssm.plan.file import TENSORS_FILE
from ghostssm.plan.measurement import Measurement
from ghostssm.plan.plan import Plan
from ghostssm.units import dtype_name, text_name


def export_checkpoint(
    checkpoint: Checkpoint | PreTrainedModel,
    output: Path | str | OutputFolder,
    *,
    dialect: str = "transformers",
    untie: bool = False,
    with_tokenizer: bool = True,
    overwrite: bool = False,
    distilled: Distillation | None = None,
    measured: Measurement | None = None,
    request: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint's model as it is in memory, in any dialect, with what else its folder held.

    Tokenizer, generation config, licence and plan go along. Of a pruned checkpoint model card and ``ghostssm.json``
    are written anew, for the dialect and the state size that the weights now have; others keep their card.

    Args:
        checkpoint: the checkpoint, or its model alone.
        output: the folder to write, which appears whole or not at all.
        dialect: ``transformers`` or ``mamba_ssm``.
        untie: store a head that is tied to the embeddings as ``lm_head.weight`` of its own.
        with_tokenizer: False to write none.
        overwrite: replace an output folder that is not empty, if it holds a checkpoint.
        distilled: what the model went through since it was loaded; the folder then has a manifest, whether or not
            ghostssm pruned the model.
        measured: the loss before and after that; goes into the card and the manifest.
        request: what was asked for, in JSON values that name no place on this machine.

    Raises:
        InputError: the dialect has no class for the model, or can't store the head as asked; nothing was written.
        PlanError: the folder's ``plan.json`` is broken; nothing was written.
        OutputError: the folder must not or can't be written.
        StorageError: writing failed, for example on a full disk; nothing is left behind.
        NumericalError: as `ghostssm.save`, which see for PrecisionWarning too.
    """
    checkpoint = in_memory(checkpoint)
    if not dialect_named(dialect).holds_own_class:
        require_stock(checkpoint, f"The {dialect} dialect")
    saving.check_dialect(dialect, checkpoint.model.config.model_type, needs_own_class=False, untie=untie)
    folder = output if isinstance(output, OutputFolder) else OutputFolder(output, overwrite)
    with folder, storing(folder.path):
        files = SideFiles(folder.partial)  # first, and every fault is fatal: nothing is lost yet
        carry_over(checkpoint if with_tokenizer else replace(checkpoint, tokenizer=None), files)
        files.write("the plan", lambda place: _carry_plan(checkpoint.source.folder, place, distilled))
        with saving.untied_head(checkpoint.model, untie) as untied:
            manifest = _manifest(checkpoint, dialect, untied)
            if distilled is not None:
                manifest = _distilled(manifest, checkpoint, distilled, measured, request)
            files.write("the model card", lambda place: _write_card(checkpoint, place, dialect, manifest, distilled))
            trained_for = None if distilled is None else state_dtype_of([distilled])
            saving.write_model(checkpoint, folder.partial, dialect, trained_for)
        if manifest is not None:
            lost = (manifest.left_out or LeftOut()) | left_out(checkpoint.source, checkpoint.model, folder.partial)
            probe, overflow = probed(folder.partial)
            replace(manifest, left_out=lost, probe=probe, overflow=overflow).write(folder.partial)
        else:
            overflow_in(open_blocks(find_source(str(folder.partial))))
        folder.commit()
    return folder.path


def require_stock(checkpoint: Checkpoint, who: str) -> None:
    """Raise InputError, saying what to do, if only our own class can express a model."""
    if not family_of(checkpoint.model.config).is_own_class:
        return
    mixers = mixers_of(checkpoint.model)
    if any(mixer.projection is not None for mixer in mixers):
        raise InputError(
            f"{who} has no place for projected states; the model runs in transformers only. "
            "For other engines prune with a method that keeps the stock class, such as output or ghost."
        )
    sizes = [mixer.state_size for mixer in mixers]
    raise InputError(
        f"{who} has no place for a state size per layer ({' '.join(map(str, sizes))}). "
        f"--pad-to {max(sizes)} (ghostssm.pad_state) pads every layer to the widest with zeros, at the same "
        "logits; or prune without --per-layer."
    )


def _carry_plan(folder: Path, place: Path, distilled: Distillation | None) -> None:
    """Copy a folder's plan, which holds in every dialect, and add a distillation to it."""
    for name in (PLAN_FILE, TENSORS_FILE):
        if (folder / name).is_file():
            copy_file(folder / name, place)
    if (place / PLAN_FILE).is_file():
        document = read_json_object(place / PLAN_FILE, PlanError)
        changed = _forget_place(document.get("provenance"))
        if distilled is not None:
            document["method"] = _with_distillation(document.get("method"), distilled)
            document["distillations"] = [*document.get("distillations", []), distilled.as_json()]
        if changed or distilled is not None:
            (place / PLAN_FILE).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _forget_place(provenance: Any) -> bool:
    """Replace the path of a text, which earlier releases wrote, by its name; returns whether there was one."""
    made = provenance.get("calibration") if isinstance(provenance, dict) else None
    text = made.get("text") if isinstance(made, dict) else None
    if not isinstance(text, str) or text == text_name(text):
        return False
    provenance["calibration"]["text"] = text_name(text)
    return True


def _manifest(checkpoint: Checkpoint, dialect: str, untied: bool) -> Manifest | None:
    """The manifest of a pruned checkpoint, brought up to date; others have none."""
    if not Manifest.is_in(checkpoint.source.folder):
        return None
    manifest = Manifest.read(checkpoint.source.folder).published()
    sizes = sorted({mixer.layout.state_size for mixer in mixers_of(checkpoint.model)})
    return replace(
        manifest,
        dialect=dialect,
        untied_head=untied or manifest.untied_head,
        stored_state_size=sizes[0] if len(sizes) == 1 else tuple(sizes),
        dtype=dtype_name(checkpoint.model.dtype),
    )


def _with_distillation(method: str | None, distilled: Distillation) -> str:
    """The recipe that a model has gone through."""
    return "+".join([*([method] if method else []), f"distill{distilled.steps}"])


def _distilled(
    manifest: Manifest | None,
    checkpoint: Checkpoint,
    distilled: Distillation,
    measured: Measurement | None,
    request: Mapping[str, Any] | None,
) -> Manifest:
    """A manifest with a distillation; a new one of a model that others pruned."""
    before = manifest or Manifest(
        ghostssm=__version__,
        base_model=checkpoint.source.published_name,
        base_model_sha256=checkpoint.source.fingerprint(),
        dialect=checkpoint.source.dialect,
        dtype=dtype_name(checkpoint.model.dtype),
    )
    return replace(
        before,
        method=_with_distillation(before.method, distilled),
        distillations=(*before.distillations, distilled),
        device=str(checkpoint.model.device),
        measured=measured,
        request=request,
    )


def _write_card(
    checkpoint: Checkpoint, folder: Path, dialect: str, manifest: Manifest | None, distilled: Distillation | None
) -> None:
    """A card of what is written where a plan and a manifest say what it is, else the model's own."""
    source = checkpoint.source
    if manifest is not None and (source.folder / PLAN_FILE).is_file():
        plan = Plan.read(source.folder, changes=False)
        plan = replace(plan, method=manifest.method or plan.method, distillations=manifest.distillations)
        base, config, untied = Base.of_pruned(source, manifest), checkpoint.model.config, manifest.untied_head
        write_card(model_card(base, config, plan, dialect, manifest.measured, untied=untied), folder)
    elif distilled is not None:
        own = (source.folder / CARD_FILE).read_text(encoding="utf-8") if (source.folder / CARD_FILE).is_file() else ""
        card = distilled_card(own, Base.of(source), distilled)
        (folder / CARD_FILE).write_text(card, encoding="utf-8")
    elif (source.folder / CARD_FILE).is_file():
        copy_file(source.folder / CARD_FILE, folder)
