"""Write a pruned checkpoint: whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ghostssm._version import __version__
from ghostssm.checkpoint.card import Base, model_card, write_card
from ghostssm.checkpoint.carried import add_carried, carried_tensors
from ghostssm.checkpoint.dialects import dialect_named
from ghostssm.checkpoint.left_out import left_out
from ghostssm.checkpoint.loading import Checkpoint, check_writable, in_memory
from ghostssm.checkpoint.manifest import Manifest
from ghostssm.checkpoint.naming import has_tied_head
from ghostssm.checkpoint.probe import probed
from ghostssm.checkpoint.side_files import SideFiles, carry_over
from ghostssm.checkpoint.source import Source
from ghostssm.checkpoint.streamed import StreamedCheckpoint
from ghostssm.engines import config_keys
from ghostssm.errors import InputError, NumericalError
from ghostssm.files.outputs import OutputFolder, storing
from ghostssm.models.families import family_named, mixers_of
from ghostssm.models.transformers_private import tied_weights
from ghostssm.plan.measurement import Measurement
from ghostssm.plan.plan import Plan
from ghostssm.progress import stage
from ghostssm.units import dtype_name
from ghostssm.values import short

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def save(
    checkpoint: Checkpoint | PreTrainedModel,
    plan: Plan,
    output: Path | str | OutputFolder,
    *,
    dialect: str = "transformers",
    overwrite: bool = False,
    untie: bool = False,
    measured: Measurement | None = None,
    request: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint whose model a plan was applied to: ``ghostssm.save(model, plan, "smaller")``.

    The folder gets the weights and config in the chosen dialect, the tokenizer and generation config, the base model's
    licence files, the plan (``plan.json``, ``plan.tensors``), a model card
    (``README.md``), and ``ghostssm.json``, which says what produced it all and what `ghostssm.verify` checks.

    Args:
        checkpoint: the checkpoint, or its model alone, which has no tokenizer to be written; ``Checkpoint(model,
            tokenizer)`` has.
        plan: that was applied to the model.
        output: the folder to write, which appears whole or not at all.
        dialect: ``transformers`` or ``mamba_ssm``.
        overwrite: replace an output folder that is not empty, if it holds a checkpoint.
        untie: store a head that is tied to the embeddings as ``lm_head.weight`` of its own, for engines that know no
            tied heads.
        measured: the loss before and after; goes into the card and the manifest.
        request: what was asked for, in JSON values that name no place on this machine; goes into the manifest.

    Raises:
        InputError: the dialect can't express the plan's result, or the plan was not applied to the model; nothing was
            written.
        OutputError: the folder must not or can't be written.
        StorageError: writing the weights failed, for example on a full disk; nothing is left behind.
        NumericalError: NaN or Inf in a weight, or in what the model makes of a few tokens in float32; nothing is left
            behind. A model that is finite in float32 and not in the dtype of its weights is written, with a
            PrecisionWarning.
        IncompleteError: the folder is written, but without something that belongs beside the weights; says what.
    """
    checkpoint = in_memory(checkpoint)
    if not isinstance(plan, Plan):
        raise InputError(f"Found {short(plan)} in place of a plan; expected ghostssm.save(model, plan, folder).")
    check_dialect(dialect, plan.model_type, plan.needs_own_class, untie)
    _check_applied(checkpoint.model, plan)
    folder = output if isinstance(output, OutputFolder) else OutputFolder(output, overwrite)
    with stage(f"writing {folder.path}"), folder, storing(folder.path):
        files = SideFiles(folder.partial, fatal=NumericalError)
        with untied_head(checkpoint.model, untie) as untied:
            write_model(checkpoint, folder.partial, dialect, plan.state_dtype)
            fingerprint = checkpoint.source.fingerprint() if checkpoint.source.has_files else None
            write_beside_weights(files, checkpoint, plan, dialect, measured, fingerprint, untied, request=request)
        folder.commit()
    files.raise_missing(folder.path)
    return folder.path


def write_beside_weights(
    files: SideFiles,
    checkpoint: Checkpoint | StreamedCheckpoint,
    plan: Plan,
    dialect: str,
    measured: Measurement | None,
    fingerprint: str | None,
    untied: bool,
    *,
    request: Mapping[str, Any] | None = None,
    dry_run: bool = False,
) -> None:
    """Write tokenizer and the like, the plan, the card and, last, the manifest.

    Args:
        fingerprint: of the base model's files, if it has any. untied: whether the config's head is tied no more.
        request: as `save`.
        dry_run: there are no weights in the folder; what needs them is left out.

    Raises:
        NumericalError: what the model in the folder makes of the probe's tokens is not finite.
    """
    source, model = checkpoint.source, checkpoint.model
    carry_over(checkpoint, files)
    files.write("the plan", lambda place: plan.save(place, changes=False))
    files.write(
        "the model card",
        lambda place: write_card(
            model_card(Base.of(source), model.config, plan, dialect, measured, untied=untied), place
        ),
    )
    probe, overflow, lost = None, None, None
    if not dry_run:
        probe, overflow = files.make("the probe", lambda: probed(files.folder)) or (None, None)
        lost = files.make("the list of what is left out", lambda: left_out(source, model, files.folder))
    manifest = Manifest(
        ghostssm=__version__,
        base_model=source.published_name,
        base_model_sha256=fingerprint,
        dialect=dialect,
        untied_head=untied,
        method=plan.method,
        state_size_before=plan.state_size,
        state_size_after=plan.state_sizes[0] if len(set(plan.state_sizes)) == 1 else plan.state_sizes,
        options=plan.provenance,
        request=request,
        dtype=dtype_name(model.dtype),
        device=str(model.device),
        distillations=plan.distillations,
        measured=measured,
        left_out=lost,
        missing=tuple(files.missing),
        overflow=overflow,
        probe=probe,
    )
    files.write("the manifest", lambda place: manifest.write(files.folder, place))


def write_config(
    model: PreTrainedModel,
    folder: Path,
    source: Source | None = None,
    dialect: str = "transformers",
    state_dtype: str | None = None,
) -> None:
    """Write config.json in a dialect.

    Args:
        source: of the model; None if nothing of its files is carried over.
        state_dtype: to tell to engines that read it there.
    """
    base = source.config if source is not None and source.dialect == dialect else None
    carried = source is not None and bool(carried_tensors(model, source))
    config = dialect_named(dialect).from_transformers(model, base, carried)
    config.pop("_name_or_path", None)  # where the base model lay on this disk
    if state_dtype is not None:
        config |= config_keys(model.config.model_type, state_dtype)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_dialect(dialect: str, model_type: str, needs_own_class: bool, untie: bool = False) -> None:
    """Raise InputError unless the dialect exists, has a class for the result, and can untie the head if asked to."""
    written = dialect_named(dialect)
    if not written.holds_hybrids and family_named(model_type).is_hybrid:
        raise InputError(f"The {dialect} dialect has no {model_type} models; expected the transformers dialect.")
    if untie and not written.ties_heads:
        raise InputError(
            f"--untie is for the transformers dialect; the {dialect} dialect always stores lm_head.weight."
        )
    if needs_own_class and not written.holds_own_class:
        raise InputError(
            f"The {dialect} dialect has no model class for projected states or a state size per layer; expected the "
            "transformers dialect, or a method and options that keep the stock class."
        )


def _check_applied(model: PreTrainedModel, plan: Plan) -> None:
    """Raise InputError unless a model has the state sizes that a plan leaves."""
    sizes, planned = [mixer.state_size for mixer in mixers_of(model)], list(plan.state_sizes)
    if sizes != planned:
        raise InputError(
            f"The model's state sizes are {sizes}, the plan leaves {planned}; expected the model that "
            "ghostssm.apply_plan returns, which is a new one where the stock class can't express the plan."
        )


def write_model(checkpoint: Checkpoint, folder: Path, dialect: str, state_dtype: str | None = None) -> None:
    """Write config and weights in a dialect; ``state_dtype`` as `write_config` has it.

    Raises:
        NumericalError: NaN or Inf in a weight; nothing was written.
    """
    model, written = checkpoint.model, dialect_named(dialect)
    check_writable(model.state_dict())
    written.write_weights(model, folder)
    if written.keeps_unread:
        add_carried(model, checkpoint.source, folder)
    write_config(model, folder, checkpoint.source, dialect, state_dtype)


@contextmanager
def untied_head(model: PreTrainedModel, wanted: bool) -> Iterator[bool]:
    """Within the context a tied head has a weight of its own, with the embeddings' values; gives whether it has.

    Raises:
        InputError: the model shares other weights as well.
    """
    config, head = model.config, model.get_output_embeddings()
    if not wanted or not has_tied_head(model):
        yield False
        return
    tied = tied_weights(model)
    if len(tied) != 1:
        raise InputError(
            f"--untie is for models that share nothing but the head's weight; this one shares {', '.join(tied)}."
        )
    shared = head.weight
    head.weight = torch.nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
    config.tie_word_embeddings = False
    try:
        yield True
    finally:
        head.weight = shared
        config.tie_word_embeddings = True
