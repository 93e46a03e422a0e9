"""MODEL as users name it: ``reference``, a local folder, or a hub id, turned into a folder of files."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from ghostssm.errors import ModelError

Dialect = Literal["transformers", "mamba_ssm"]
REFERENCE = "reference"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "README.md", "LICENSE*", "NOTICE*"]


@dataclass(frozen=True)
class Source:
    """A model's files, found but not yet read.

    Attributes:
        name: what the user called it.
        folder: where its files are.
        config: the parsed config.json.
        dialect: whose config.json it is.
        hub_id: its name on the hub, if it came from there.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    dialect: Dialect
    hub_id: str | None = None

    def fingerprint(self) -> str:
        """SHA-256 over the names and contents of the config and weight files, hexadecimal."""
        total = hashlib.sha256()
        for pattern in ("config.json", "*.safetensors", "*.bin"):
            for path in sorted(self.folder.glob(pattern)):
                content = hashlib.sha256()
                with path.open("rb") as file:
                    while block := file.read(1 << 20):
                        content.update(block)
                total.update(path.name.encode() + content.digest())
        return total.hexdigest()


def find_source(spec: str, weights: bool = True) -> Source:
    """Find a model's files; a hub id is downloaded into the hub's own cache.

    Args:
        spec: ``reference``, a folder, or a hub id.
        weights: without them only the small files of a hub model are fetched.

    Raises:
        ModelError: nothing there, the hub is out of reach, or config.json is missing or broken.
    """
    hub_id = None
    if spec == REFERENCE:
        folder = Path(str(resources.files("ghostssm") / "reference"))
    elif Path(spec).is_dir():
        folder = Path(spec)
    elif Path(spec).exists():
        raise ModelError(f"{spec} is a file; expected the folder that holds config.json and the weights.")
    elif _HUB_ID.fullmatch(spec):
        folder, hub_id = _download(spec, weights), spec
    else:
        raise ModelError(f"No model at {spec!r}; expected a local folder, a hub id such as org/name, or '{REFERENCE}'.")
    config = _read_config(folder)
    return Source(spec, folder, config, "mamba_ssm" if "ssm_cfg" in config else "transformers", hub_id)


def _download(hub_id: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=_SMALL_FILES + ["*.safetensors"] * weights))
        if weights and not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(hub_id, allow_patterns=[*_SMALL_FILES, "*.bin"]))
    except Exception as error:  # the hub client's faults share no base class
        raise ModelError(
            f"{hub_id} is no local folder and could not be fetched from the hub ({type(error).__name__}). "
            "Check the name, or bring config.json, the weights (*.safetensors or pytorch_model.bin) and tokenizer.json "
            "into a folder and name that."
        ) from error
    return folder


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder} holds no config.json; expected the folder of a checkpoint.") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} can't be read as JSON ({error}).") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds {type(config).__name__}; expected an object.")
    return config
