"""Name, licence and origin of a checkpoint, as far as its files tell them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load

from ghostssm.checkpoint.manifest import Manifest
from ghostssm.checkpoint.source import Source, is_hub_id
from ghostssm.errors import ModelError
from ghostssm.units import sizes_text


def write_metadata(writer: Any, source: Source) -> None:
    """Write the ``general`` keys into a ``gguf.GGUFWriter``.

    They come from the model card (README.md) and ``ghostssm.json``; both may be missing.
    """
    card = _card(source.folder / "README.md")
    try:
        manifest = Manifest.read(source.folder)
    except ModelError:
        manifest = Manifest()
    writer.add_name(Path(source.name).resolve().name if Path(source.name).is_dir() else source.name.rpartition("/")[2])
    if isinstance(card.get("license"), str) and card["license"]:
        writer.add_license(card["license"])
    before, after = manifest.state_size_before, manifest.state_size_after
    if manifest.method is not None and before is not None and after is not None:
        kept = sizes_text((after,) if isinstance(after, int) else after)
        writer.add_description(
            f"Recurrent state pruned from {before} to {kept} channels by ghostssm ({manifest.method})"
        )
    base = manifest.base_model or card.get("base_model")
    base = base[0] if isinstance(base, list) and base else base
    if base:
        _write_base_model(writer, str(base))


def _write_base_model(writer: Any, base: str) -> None:
    name = base if is_hub_id(base) else Path(base).name  # a folder's name, not where it lay on someone's disk
    organization, _, last = name.rpartition("/")
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, last)
    if organization:
        writer.add_base_model_organization(0, organization)
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{name}")


def _card(path: Path) -> dict[str, Any]:
    try:
        return metadata_load(path) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
