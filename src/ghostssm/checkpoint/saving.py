"""Write a pruned checkpoint: whole or not at all."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from ghostssm._version import __version__
from ghostssm.checkpoint import mamba_ssm
from ghostssm.checkpoint.card import model_card, write_card
from ghostssm.checkpoint.loading import Checkpoint
from ghostssm.checkpoint.quiet import quiet_transformers
from ghostssm.checkpoint.source import Dialect
from ghostssm.errors import InputError, OutputError
from ghostssm.evaluation.measurement import Measurement
from ghostssm.families import family_named, family_of
from ghostssm.plan import Plan

MANIFEST_FILE = "ghostssm.json"
_LICENCE_FILES = ("LICENSE*", "NOTICE*")
# Older forms of what transformers writes into tokenizer.json and tokenizer_config.json; other converters read them.
_TOKENIZER_FILES = (
    *("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json"),
)


class OutputFolder:
    """A folder that appears whole or not at all.

    Opened before the work, so that a folder that may not be written is refused at once:

        with OutputFolder(path) as folder:
            ...                 # write into folder.partial
            folder.commit()
    """

    def __init__(self, path: Path | str, overwrite: bool = False):
        """
        Raises:
            OutputError: the path is a file, a folder with something in it (unless ``overwrite``), or not writable.
        """
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{self.path} is a file; expected a folder to write.")
        if self.path.is_dir() and any(self.path.iterdir()) and not overwrite:
            raise OutputError(f"{self.path} exists and is not empty; name another folder, or pass --overwrite.")
        self.partial = self.path.absolute().with_name(f".{self.path.absolute().name}.partial-{os.getpid()}")

    def __enter__(self) -> OutputFolder:
        try:
            self.partial.mkdir(parents=True)
        except OSError as error:
            raise OutputError(
                f"{self.path} can't be written: {error.strerror or error}. Name another --output."
            ) from error
        return self

    def commit(self) -> None:
        """Put the finished folder in its place; an old one goes only once the new one stands."""
        umask = os.umask(0)
        os.umask(umask)
        for file in self.partial.iterdir():
            file.chmod(0o666 & ~umask)  # some writers leave files that only their owner can read
        old = self.partial.with_name(self.partial.name + ".old")
        if self.path.exists():
            self.path.rename(old)
        self.partial.rename(self.path)
        shutil.rmtree(old, ignore_errors=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)


def save(
    checkpoint: Checkpoint,
    plan: Plan,
    output: Path | str | OutputFolder,
    *,
    dialect: Dialect = "transformers",
    overwrite: bool = False,
    untie: bool = False,
    measured: Measurement | None = None,
) -> Path:
    """Write a checkpoint whose model a plan was applied to.

    The folder gets the weights and config in the chosen dialect, the tokenizer and generation config, the base model's
    licence files, the plan (``plan.json``, ``plan.tensors``), ``ghostssm.json``, which says what produced it, and a
    model card, ``README.md``.

    Args:
        untie: store a head that is tied to the embeddings as ``lm_head.weight`` of its own, for engines that know no
            tied heads. measured: goes into the card and the manifest.

    Raises:
        InputError: the dialect can't express the plan's result; nothing was written.
        OutputError: the folder must not or can't be written; nothing is left behind.
    """
    check_dialect(dialect, plan.model_type, plan.needs_own_class, untie)
    folder = output if isinstance(output, OutputFolder) else OutputFolder(output, overwrite)
    with folder:
        try:
            with _untied(checkpoint.model) if untie else nullcontext():
                write_model(checkpoint, folder.partial, dialect)
            carry_over(checkpoint, folder.partial)
            plan.save(folder.partial, changes=False)
            tied = checkpoint.model.config.tie_word_embeddings and not untie
            write_card(model_card(checkpoint, plan, dialect, measured, tied_head=tied), folder.partial)
            manifest = json.dumps(_manifest(checkpoint, plan, dialect, measured), indent=1) + "\n"
            (folder.partial / MANIFEST_FILE).write_text(manifest, encoding="utf-8")
            folder.commit()
        except OSError as error:
            raise OutputError(
                f"{folder.path} could not be written: {error.strerror or error}. Nothing was kept."
            ) from error
    return folder.path


def check_dialect(dialect: Dialect, model_type: str, needs_own_class: bool, untie: bool = False) -> None:
    """Raise InputError unless a dialect has a model class for the result, and a choice where the head is stored."""
    if dialect != "transformers" and family_named(model_type).is_hybrid:
        raise InputError(f"The {dialect} dialect has no {model_type} models; expected the transformers dialect.")
    if untie and dialect == "mamba_ssm":
        raise InputError("--untie is for the transformers dialect; the mamba_ssm dialect always stores lm_head.weight.")
    if needs_own_class and dialect != "transformers":
        raise InputError(
            f"The {dialect} dialect has no model class for projected states or a state size per layer; expected the "
            "transformers dialect, or a method and options that keep the stock class."
        )


def write_model(checkpoint: Checkpoint, folder: Path, dialect: Dialect) -> None:
    """Write config and weights in a dialect, and for transformers the generation config."""
    model = checkpoint.model
    if dialect == "transformers":
        model.config.architectures = [type(model).__name__]
        with quiet_transformers():
            model.save_pretrained(folder)
        # With every value written out, so that engines whose defaults differ read the same model.
        config = json.loads(model.config.to_json_string(use_diff=False))
        config.pop("_name_or_path", None)  # where the base model lay on this disk
        config |= family_of(model.config).serving_keys(model.config)
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return
    if checkpoint.source.dialect == "mamba_ssm":
        config = checkpoint.source.config | {
            "ssm_cfg": checkpoint.source.config["ssm_cfg"] | {"d_state": model.config.state_size}
        }
    else:
        config = mamba_ssm.from_transformers_config(model.config)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    torch.save(mamba_ssm.from_transformers_tensors(model.state_dict()), folder / "pytorch_model.bin")


@contextmanager
def _untied(model: PreTrainedModel) -> Iterator[None]:
    """Within the context the head has a weight of its own, with the embeddings' values."""
    config, head = model.config, model.get_output_embeddings()
    if not config.tie_word_embeddings:
        yield
        return
    tied = dict(model.all_tied_weights_keys)
    if len(tied) != 1 or head is None:
        raise InputError(
            f"--untie is for models that share nothing but the head's weight; this one shares {', '.join(tied)}."
        )
    shared = head.weight
    head.weight = torch.nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
    config.tie_word_embeddings = False
    try:
        yield
    finally:
        head.weight = shared
        config.tie_word_embeddings = True


def carry_over(checkpoint: Checkpoint, folder: Path) -> None:
    """Write what belongs to a model beside its weights, as the base model has it."""
    source, tokenizer = checkpoint.source, checkpoint.tokenizer
    names = [*_LICENCE_FILES]
    if (source.folder / GENERATION_CONFIG_NAME).exists():
        checkpoint.model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        if Path(tokenizer.name_or_path) == source.folder:
            names += _TOKENIZER_FILES
    for pattern in names:
        for path in source.folder.glob(pattern):
            if path.is_file() and not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)


def _manifest(checkpoint: Checkpoint, plan: Plan, dialect: Dialect, measured: Measurement | None) -> dict[str, Any]:
    return {
        "ghostssm": __version__,
        "base_model": checkpoint.source.name,
        "base_model_sha256": checkpoint.source.fingerprint(),
        "dialect": dialect,
        "method": plan.method,
        "state_size": {
            "before": plan.state_size,
            "after": list(plan.state_sizes) if plan.needs_own_class else plan.kept_state_size,
        },
        "options": dict(plan.provenance),
        **({} if measured is None else {"measured": measured.as_json()}),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
