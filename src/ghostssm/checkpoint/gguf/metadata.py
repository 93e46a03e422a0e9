"""Name, licence and origin of a checkpoint, as far as its files tell them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load

from ghostssm.checkpoint.manifest import Manifest
from ghostssm.checkpoint.source import Source, is_hub_id
from ghostssm.errors import ModelError
from ghostssm.units import sizes_text


@dataclass(frozen=True)
class Metadata:
    """Attributes:
    name: of the model. license: its SPDX name, from the model card. base_model: hub id or name of the model that was
        pruned. description: what was done to it.
    """

    name: str
    license: str | None = None
    base_model: str | None = None
    description: str | None = None

    def write(self, writer: Any) -> None:
        """Write the ``general`` keys into a ``gguf.GGUFWriter``."""
        writer.add_name(self.name)
        if self.license:
            writer.add_license(self.license)
        if self.description:
            writer.add_description(self.description)
        if self.base_model:
            organization, _, name = self.base_model.rpartition("/")
            writer.add_base_model_count(1)
            writer.add_base_model_name(0, name)
            if organization:
                writer.add_base_model_organization(0, organization)
                writer.add_base_model_repo_url(0, f"https://huggingface.co/{self.base_model}")


def metadata_of(source: Source) -> Metadata:
    """What a checkpoint's model card (README.md) and ``ghostssm.json`` say; both may be missing."""
    card = _card(source.folder / "README.md")
    try:
        manifest = Manifest.read(source.folder)
    except ModelError:
        manifest = Manifest()
    base = manifest.base_model or card.get("base_model")
    if isinstance(base, list):
        base = base[0] if base else None
    if base and not is_hub_id(str(base)):
        base = Path(str(base)).name  # a folder's name, not where it lay on someone's disk
    description = None
    before, after = manifest.state_size_before, manifest.state_size_after
    if manifest.method is not None and before is not None and after is not None:
        kept = sizes_text((after,) if isinstance(after, int) else after)
        description = f"Recurrent state pruned from {before} to {kept} channels by ghostssm ({manifest.method})"
    license = card.get("license")
    return Metadata(
        name=Path(source.name).resolve().name if Path(source.name).is_dir() else source.name.rpartition("/")[2],
        license=license if isinstance(license, str) else None,
        base_model=str(base) if base else None,
        description=description,
    )


def _card(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] | None = metadata_load(path)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found or {}
