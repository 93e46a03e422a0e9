"""What stands beside a model's weights: tokenizer, generation config, licence, plan, model card and manifest.

Before the work a fault in any of them is told at once (`ghostssm.checkpoint.dry_run`). After the work, which may have
taken hours, it must not cost the weights: all else is written, and what is missing is told at the end.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from ghostssm.checkpoint.loading import Checkpoint
from ghostssm.checkpoint.streamed import StreamedCheckpoint
from ghostssm.checkpoint.tokenizer import carry_tokenizer
from ghostssm.errors import GhostError, IncompleteError, ModelError
from ghostssm.files.durable import adding
from ghostssm.files.reading import confined

_Made = TypeVar("_Made")
_LICENCE_FILES = ("LICENSE*", "NOTICE*")
_TOLD_AS_THEY_ARE = (GhostError, OSError, SafetensorError, MemoryError)


class SideFiles:
    """Writes one thing after the other into a folder, each whole or not at all.

    Attributes:
        missing: what could not be written, and why.
    """

    def __init__(self, folder: Path, *, fatal: type[Exception] | tuple[type[Exception], ...] = Exception):
        """
        Args:
            fatal: faults of these classes are raised. Others are noted in ``missing``, and the rest is written.
        """
        self.folder, self.missing = folder, dict[str, str]()
        self._fatal = fatal

    def write(self, what: str, write: Callable[[Path], None]) -> None:
        """Have ``what`` written into an empty folder, and move its files from there.

        Raises:
            ModelError, OSError, SafetensorError: a fault that is fatal.
        """

        def written() -> None:
            with adding(self.folder) as place:
                write(place)

        self.make(what, written)

    def make(self, what: str, make: Callable[[], _Made]) -> _Made | None:
        """What ``make`` gives; None where it failed. Raises as `write`."""
        try:
            return make()
        except Exception as error:  # transformers, tokenizers and the hub's client raise many classes
            if not isinstance(error, self._fatal):
                self.missing[what] = _reason(error)
                return None
            if isinstance(error, _TOLD_AS_THEY_ARE):
                raise
            raise ModelError(
                f"{what[0].upper()}{what[1:]} can't be written beside the weights ({_reason(error)}). Mend or replace "
                "the files of the base model that it is made from."
            ) from error

    def raise_missing(self, place: Path) -> None:
        """Raise IncompleteError if anything is missing of what became ``place``."""
        if self.missing:
            listed = "".join(f"\n  - {what}: {reason}" for what, reason in self.missing.items())
            raise IncompleteError(
                f"{place} is written and its weights are whole, but this is missing beside them:{listed}\n"
                "The run need not be repeated; bring what is missing from the base model.",
                place,
            )


def carry_over(checkpoint: Checkpoint | StreamedCheckpoint, files: SideFiles) -> None:
    """Write what belongs to a model beside its weights, as the base model has it."""
    source, tokenizer = checkpoint.source, checkpoint.tokenizer
    files.write("the generation config", lambda place: _write_generation_config(checkpoint, place))
    if tokenizer is not None:
        files.write("the tokenizer", lambda place: _write_tokenizer(checkpoint, tokenizer, place))
    files.write("the licence", lambda place: _copy(source.folder, _LICENCE_FILES, place))


def _write_generation_config(checkpoint: Checkpoint | StreamedCheckpoint, place: Path) -> None:
    """As the base model's files have it; of a model that came without files, its own."""
    _copy(checkpoint.source.folder, [GENERATION_CONFIG_NAME], place)
    own = checkpoint.model.generation_config
    if own is not None and not checkpoint.source.has_files:
        own.save_pretrained(place)


def copy_file(file: Path, place: Path) -> None:
    """Copy a file, bit by bit, into a folder; raises ModelError if it can't be read, or is a link out of its folder."""
    try:
        content = confined(file, ModelError).read_bytes()
    except OSError as error:
        raise ModelError(f"{file} can't be read: {error.strerror or error}.") from None
    (place / file.name).write_bytes(content)


def _copy(folder: Path, patterns: Sequence[str], place: Path) -> None:
    """Copy the files of a folder that are not in their place already."""
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            if not path.is_dir() and not (place / path.name).exists():
                copy_file(path, place)


def _write_tokenizer(
    checkpoint: Checkpoint | StreamedCheckpoint, tokenizer: PreTrainedTokenizerBase, place: Path
) -> None:
    config = place / "config.json"  # where transformers looks for a class, if the tokenizer names none
    config.write_text(checkpoint.model.config.to_json_string(), encoding="utf-8")
    carry_tokenizer(tokenizer, checkpoint.source, place)
    config.unlink()
    _forget_place(place / "tokenizer_config.json")


def _forget_place(file: Path) -> None:
    """Remove the place that a tokenizer was read from out of its config; transformers never reads that entry."""
    if not file.is_file():
        return
    config = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(config, dict) and config.pop("name_or_path", None) is not None:
        file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _reason(error: Exception) -> str:
    if isinstance(error, GhostError):
        return str(error)
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]
