"""MODEL as users name it: ``reference``, a local folder, or a hub id, turned into a folder of files."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from reprlib import repr as short
from typing import Any

from transformers import PreTrainedConfig

from ghostssm.checkpoint.dialects import dialect_of
from ghostssm.checkpoint.place import REFERENCE, folder_of, is_hub_id
from ghostssm.checkpoint.weights import FORMATS, check_not_mistral, shard_places
from ghostssm.errors import ModelError
from ghostssm.files.reading import confined, read_json_object
from ghostssm.network import hub_answers
from ghostssm.progress import stage
from ghostssm.values import Value

_NOWHERE = Path(os.devnull)
_HUB_CACHE_ENTRY = "models--"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "README.md", "LICENSE*", "NOTICE*"]
_WEIGHTS = frozenset({".safetensors", ".bin"})
_READ_BY_LOADERS = _WEIGHTS | {".json", ".txt", ".model", ".jinja"}
_ADAPTER_CONFIG = "adapter_config.json"
_TEMPLATE_FOLDER = "additional_chat_templates"
_MOST_SMALL_BYTES = 256 << 20


@dataclass(frozen=True, repr=False)
class Source(Value):
    """A model's files, found but not yet read.

    Attributes:
        name: what the user called it.
        folder: where its files are; of a model in memory a place where there are none.
        config: the parsed config.json.
        dialect: the name of its config.json's.
        hub_id: its name on the hub, if it came from there.
        stamps: size and time of every weight file, as they were found.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    dialect: str
    hub_id: str | None = None
    stamps: Mapping[str, tuple[int, int]] = field(default_factory=dict, repr=False)

    @classmethod
    def in_memory(cls, config: PreTrainedConfig) -> Source:
        """Of a model in memory. Of its files only a name is known, if the config has one.

        What has that name now need not be what the model was made from.
        """
        name = getattr(config, "name_or_path", None) or config.model_type
        hub_id = name if is_hub_id(name) and not Path(name).exists() else None
        return cls(hub_id or Path(name).name, _NOWHERE, config.to_diff_dict(), "transformers", hub_id)

    @property
    def has_files(self) -> bool:
        return self.folder != _NOWHERE

    @property
    def published_name(self) -> str:
        """The name that others may read: its id on the hub or its folder's name, never its path on this machine."""
        if self.name == REFERENCE or self.hub_id or not self.has_files:
            return self.hub_id or self.name
        folder = Path(os.path.abspath(self.folder))
        if folder.parent.name == "snapshots" and folder.parents[1].name.startswith(_HUB_CACHE_ENTRY):
            return folder.parents[1].name.removeprefix(_HUB_CACHE_ENTRY).replace("--", "/", 1)
        return folder.name.encode("utf-8", "replace").decode()

    def fingerprint(self) -> str:
        """SHA-256 over the names and contents of the config and weight files, hexadecimal.

        Raises:
            ModelError: a weight file has changed since it was found.
        """
        now = _stamps(self.folder)
        for name, stamp in self.stamps.items():
            if now.get(name) != stamp:
                raise ModelError(
                    f"{self.folder / name} was changed or truncated meanwhile; bring it back and run again."
                )
        total = hashlib.sha256()
        for pattern in ("config.json", "*.safetensors", "*.bin"):
            for path in sorted(self.folder.glob(pattern)):
                confined(path, ModelError)
                with path.open("rb") as file:
                    total.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
        return total.hexdigest()


def find_source(spec: str, weights: bool = True) -> Source:
    """Find a model's files; a hub id is downloaded into the hub's own cache.

    Args:
        spec: ``reference``, a folder, or a hub id.
        weights: without them only the small files of a hub model are fetched.

    Raises:
        ModelError: nothing there, the hub is out of reach, or config.json is missing or broken.
    """
    folder, hub_id = folder_of(spec), None
    if folder is None:
        hub_id = spec
        with stage(f"fetching {spec} from the hub"):
            folder = _download(spec, weights)
    check_links(folder)
    config = _read_config(folder)
    return Source(spec, folder, config, dialect_of(config, folder), hub_id, _stamps(folder))


def _stamps(folder: Path) -> dict[str, tuple[int, int]]:
    states = {path.name: path.stat() for path in folder.iterdir() if path.suffix in _WEIGHTS and path.is_file()}
    return {name: (state.st_size, state.st_mtime_ns) for name, state in states.items()}


def check_links(folder: Path) -> None:
    """Check that whatever transformers may open in a folder lies in it.

    Raises:
        ModelError: a link that leaves the folder, a pipe or a device under a name that loaders read, or one of their
            small files with more than 256 MiB.
    """
    try:
        paths = [path for place in (folder, folder / _TEMPLATE_FOLDER) if place.is_dir() for path in place.iterdir()]
    except OSError as error:
        raise ModelError(f"{folder} can't be read: {error.strerror or error}.") from None
    if (folder / _TEMPLATE_FOLDER).is_symlink():
        raise ModelError(f"{folder / _TEMPLATE_FOLDER} is a link; expected a folder.")
    for path in paths:
        if path.suffix in _READ_BY_LOADERS and (path.is_symlink() or not path.is_dir()):
            size = confined(path, ModelError).stat().st_size
            if path.suffix not in _WEIGHTS and size > _MOST_SMALL_BYTES:
                raise ModelError(f"{path} has {size} bytes, more than any tokenizer or config needs.")


def _download(hub_id: str, weights: bool) -> Path:
    """A snapshot of a model in the hub's cache; of its weights, the files that are read and no second copy of them."""
    from huggingface_hub import snapshot_download

    local = not hub_answers()
    fetch = partial(snapshot_download, hub_id, local_files_only=local)
    try:
        folder = Path(fetch(allow_patterns=_SMALL_FILES))
        commit = folder.name if _COMMIT.fullmatch(folder.name) else None  # a repository may change meanwhile
        for stem, suffix in FORMATS if weights else ():
            whole, index = f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
            fetch(revision=commit, allow_patterns=[whole])
            if (folder / whole).exists():
                break
            if index.exists():
                shards = sorted(set(shard_places(index, suffix).values()))
                fetch(revision=commit, allow_patterns=shards)
                break
    except ModelError:
        raise
    except Exception as error:  # the hub client's faults share no base class
        why = "does not answer" if local else f"could not be read ({type(error).__name__})"
        raise ModelError(
            f"{hub_id} is no local folder, and the hub {why}. "
            "Check the name, or bring config.json, the weights (*.safetensors or pytorch_model.bin) and tokenizer.json "
            "into a folder and name that."
        ) from error
    return folder


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        return read_json_object(folder / "config.json", ModelError)
    except FileNotFoundError:
        if (folder / _ADAPTER_CONFIG).exists():
            raise ModelError(_about_adapter(folder)) from None
        check_not_mistral(folder)
        raise ModelError(f"{folder} holds no config.json; expected the folder of a checkpoint.") from None


def _about_adapter(folder: Path) -> str:
    base = read_json_object(folder / _ADAPTER_CONFIG, ModelError).get("base_model_name_or_path")
    of = f" of {short(base)}" if isinstance(base, str) and base else ""
    return (
        f"{folder} holds an adapter{of} ({_ADAPTER_CONFIG}) and no config.json; expected a whole model. Merge it into "
        "the model that it was trained on, with peft: "
        "PeftModel.from_pretrained(model, FOLDER).merge_and_unload().save_pretrained(OUTPUT)."
    )
