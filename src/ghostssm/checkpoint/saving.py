"""Write a pruned checkpoint: whole or not at all."""

from __future__ import annotations

import json
import os
import platform
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from ghostssm._version import __version__
from ghostssm.checkpoint import mamba_ssm
from ghostssm.checkpoint.loading import Checkpoint
from ghostssm.checkpoint.quiet import quiet_transformers
from ghostssm.checkpoint.source import Dialect, Source
from ghostssm.checkpoint.streaming import StreamedCheckpoint
from ghostssm.errors import InputError, OutputError
from ghostssm.families import family_named
from ghostssm.plan import Plan

MANIFEST_FILE = "ghostssm.json"


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
            raise OutputError(f"{self.path} can't be written: {error.strerror or error}.") from error
        return self

    def commit(self) -> None:
        """Put the finished folder in its place; an old one goes only once the new one stands."""
        put_in_place(self.partial, self.path)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)


def put_in_place(finished: Path, path: Path) -> None:
    """Give a finished folder its name; an old one there goes only once the new one stands."""
    umask = os.umask(0)
    os.umask(umask)
    for file in finished.iterdir():
        file.chmod(0o666 & ~umask)  # some writers leave files that only their owner can read
    old = finished.with_name(finished.name + ".old")
    if path.exists():
        path.rename(old)
    finished.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def save(
    checkpoint: Checkpoint,
    plan: Plan,
    output: Path | str | OutputFolder,
    *,
    dialect: Dialect = "transformers",
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint whose model a plan was applied to.

    The folder gets the weights and config in the chosen dialect, the tokenizer and generation config, the plan
    (``plan.json``, ``plan.safetensors``) and ``ghostssm.json``, which says what produced it.

    Raises:
        InputError: the dialect can't express the plan's result; nothing was written.
        OutputError: the folder must not or can't be written; nothing is left behind.
    """
    check_dialect(dialect, plan.model_type, plan.needs_own_class)
    folder = output if isinstance(output, OutputFolder) else OutputFolder(output, overwrite)
    with folder:
        try:
            _write_model(checkpoint, folder.partial, dialect)
            write_beside_weights(folder.partial, checkpoint, plan, dialect, checkpoint.source.fingerprint())
            folder.commit()
        except OSError as error:
            raise OutputError(
                f"{folder.path} could not be written: {error.strerror or error}. Nothing was kept."
            ) from error
    return folder.path


def write_beside_weights(
    folder: Path, checkpoint: Checkpoint | StreamedCheckpoint, plan: Plan, dialect: Dialect, fingerprint: str
) -> None:
    """The tokenizer, the plan, and the manifest."""
    if checkpoint.tokenizer is not None:
        checkpoint.tokenizer.save_pretrained(folder)
    plan.save(folder, changes=False)
    manifest = json.dumps(_manifest(checkpoint.source, plan, dialect, fingerprint), indent=1) + "\n"
    (folder / MANIFEST_FILE).write_text(manifest, encoding="utf-8")


def write_config(model: PreTrainedModel, folder: Path) -> None:
    """The config with every value written out, so that engines whose defaults differ read the same model."""
    model.config.architectures = [type(model).__name__]
    model.config.to_json_file(folder / "config.json", use_diff=False)


def check_dialect(dialect: Dialect, model_type: str, needs_own_class: bool) -> None:
    """Raise InputError unless a dialect has a model class for the result."""
    if dialect != "transformers" and family_named(model_type).is_hybrid:
        raise InputError(f"The {dialect} dialect has no {model_type} models; expected the transformers dialect.")
    if needs_own_class and dialect != "transformers":
        raise InputError(
            f"The {dialect} dialect has no model class for projected states or a state size per layer; expected the "
            "transformers dialect, or a method and options that keep the stock class."
        )


def _write_model(checkpoint: Checkpoint, folder: Path, dialect: Dialect) -> None:
    model = checkpoint.model
    if dialect == "transformers":
        with quiet_transformers():
            model.save_pretrained(folder)
        write_config(model, folder)
        return
    if checkpoint.source.dialect == "mamba_ssm":
        config = checkpoint.source.config | {
            "ssm_cfg": checkpoint.source.config["ssm_cfg"] | {"d_state": model.config.state_size}
        }
    else:
        config = mamba_ssm.from_transformers_config(model.config)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    torch.save(mamba_ssm.from_transformers_tensors(model.state_dict()), folder / "pytorch_model.bin")


def _manifest(source: Source, plan: Plan, dialect: Dialect, fingerprint: str) -> dict[str, Any]:
    return {
        "ghostssm": __version__,
        "base_model": source.name,
        "base_model_sha256": fingerprint,
        "dialect": dialect,
        "method": plan.method,
        "state_size": {
            "before": plan.state_size,
            "after": list(plan.state_sizes) if plan.needs_own_class else plan.kept_state_size,
        },
        "options": dict(plan.provenance),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
