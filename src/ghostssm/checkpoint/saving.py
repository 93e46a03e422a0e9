"""Write a pruned checkpoint: whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError

from ghostssm._version import __version__
from ghostssm.checkpoint import mamba_ssm
from ghostssm.checkpoint.loading import Checkpoint
from ghostssm.checkpoint.manifest import Probe, write_manifest
from ghostssm.checkpoint.quiet import quiet_transformers
from ghostssm.checkpoint.source import Dialect
from ghostssm.errors import InputError, OutputError, StorageError
from ghostssm.interrupts import uninterrupted
from ghostssm.plan import Plan


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
        absolute = self.path.absolute()
        self._new_parents = [parent for parent in absolute.parents if not parent.exists()]
        place = absolute.parents[len(self._new_parents)]
        if place.is_dir() and not os.access(place, os.W_OK | os.X_OK):
            raise OutputError(f"{self.path} can't be written: {place} is read-only; name another folder.")
        self.partial = absolute.with_name(f".{absolute.name}.partial-{os.getpid()}")
        self._old = self.partial.with_name(self.partial.name + ".old")

    def __enter__(self) -> OutputFolder:
        try:
            self.partial.mkdir(parents=True)
        except OSError as error:
            raise OutputError(f"{self.path} can't be written: {error.strerror or error}.") from error
        return self

    def commit(self) -> None:
        """Put the finished folder in its place; an old one goes only once the new one stands and is on the disk."""
        umask = os.umask(0)
        os.umask(umask)
        for file in self.partial.rglob("*"):
            if file.is_file():
                file.chmod(0o666 & ~umask)  # some writers leave files that only their owner can read
            _flush(file)
        with uninterrupted():
            if self.path.exists():
                self.path.rename(self._old)
            self.partial.rename(self.path)
        _flush(self.path.absolute().parent)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with uninterrupted():
            if self._old.exists() and not self.path.exists():
                self._old.rename(self.path)
            for folder in (self.partial, self._old):
                shutil.rmtree(folder, ignore_errors=True)
            for parent in self._new_parents:
                with suppress(OSError):  # not empty: the output is there
                    parent.rmdir()


def _flush(path: Path) -> None:
    """Have the disk hold what was written; also where a disk that is full says so late."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    (``plan.json``, ``plan.safetensors``) and ``ghostssm.json``, which says what produced it and what
    :func:`ghostssm.verify` checks.

    Raises:
        InputError: the dialect can't express the plan's result; nothing was written.
        OutputError: the folder must not or can't be written.
        StorageError: writing failed, for example on a full disk; nothing is left behind.
    """
    check_dialect(dialect, plan.needs_own_class)
    folder = output if isinstance(output, OutputFolder) else OutputFolder(output, overwrite)
    with folder:
        try:
            _write_model(checkpoint, folder.partial, dialect)
            if checkpoint.tokenizer is not None:
                checkpoint.tokenizer.save_pretrained(folder.partial)
            plan.save(folder.partial, changes=False)
            write_manifest(folder.partial, _facts(checkpoint, plan, dialect), Probe.of(checkpoint.model))
            folder.commit()
        except (OSError, SafetensorError, RuntimeError) as error:
            reason = _write_failure(error)
            if reason is None:
                raise
            raise StorageError(f"{folder.path} could not be written: {reason}. Nothing was kept.") from error
    return folder.path


def _write_failure(error: Exception) -> str | None:
    """What kept a file from being written; None if the error is of another kind."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, SafetensorError):
        return str(error)
    # torch.save has no class of its own for it, and has lost the reason.
    return "torch.save came to a halt; the disk may be full" if "inline_container" in str(error) else None


def check_dialect(dialect: Dialect, needs_own_class: bool) -> None:
    """Raise InputError unless a dialect has a model class for the result."""
    if needs_own_class and dialect != "transformers":
        raise InputError(
            f"The {dialect} dialect has no model class for projected states or a state size per layer; expected the "
            "transformers dialect, or a method and options that keep the stock class."
        )


def _write_model(checkpoint: Checkpoint, folder: Path, dialect: Dialect) -> None:
    model = checkpoint.model
    if dialect == "transformers":
        model.config.architectures = [type(model).__name__]
        with quiet_transformers():
            model.save_pretrained(folder)
        # With every value written out, so that engines whose defaults differ read the same model.
        model.config.to_json_file(folder / "config.json", use_diff=False)
        return
    if checkpoint.source.dialect == "mamba_ssm":
        config = checkpoint.source.config | {
            "ssm_cfg": checkpoint.source.config["ssm_cfg"] | {"d_state": model.config.state_size}
        }
    else:
        config = mamba_ssm.from_transformers_config(model.config)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    torch.save(mamba_ssm.from_transformers_tensors(model.state_dict()), folder / "pytorch_model.bin")


def _facts(checkpoint: Checkpoint, plan: Plan, dialect: Dialect) -> dict[str, Any]:
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
        "dtype": str(checkpoint.model.dtype).removeprefix("torch."),
        "device": str(checkpoint.model.device),
    }
