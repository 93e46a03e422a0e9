"""What a checkpoint holds and the output does not: nothing is dropped without a word."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig

from ghostssm.checkpoint.carried import stored_names, unread_names
from ghostssm.checkpoint.dialects import Dialect, dialect_named, dialect_of, translated_keys
from ghostssm.checkpoint.loading import model_config
from ghostssm.checkpoint.naming import places_of_parameters
from ghostssm.checkpoint.source import Source
from ghostssm.models.families import family_of
from ghostssm.models.transformers_private import tied_weights, without_weights
from ghostssm.units import listed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LISTED = 3
# Names in older configs, to those that transformers gives the same values now.
_OLDER_KEYS = {
    "torch_dtype": "dtype",
    "rope_theta": "rope_parameters",
    "rope_scaling": "rope_parameters",
    "partial_rotary_factor": "rope_parameters",
    "hybrid_override_pattern": "layers_block_type",
    "mtp_hybrid_override_pattern": "mtp_layers_block_type",
    "attn_layer_indices": "layers_block_type",
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_expand": "expand",
    "mamba_dt_min": "time_step_min",
    "mamba_dt_max": "time_step_max",
    "mamba_dt_limit": "time_step_limit",
    "mamba_dt_init_floor": "time_step_floor",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_chunk_size": "chunk_size",
}
_IN_EVERY_FILE = frozenset({"model_type", "architectures", "dtype", "transformers_version"})
"""Every format has its own words for the class and the dtype, and the version is the writer's."""


@dataclass(frozen=True)
class LeftOut:
    """What went in and did not come out.

    Attributes:
        tensors: names in the source's weight files.
        config_keys: of its config.json; those within ``ssm_cfg``, for example, as ``ssm_cfg.NAME``.
        zeroed: keys that are 0 in what is written, since the layers that they count are not in it.
    """

    tensors: tuple[str, ...] = ()
    config_keys: tuple[str, ...] = ()
    zeroed: tuple[str, ...] = ()

    def __or__(self, other: LeftOut) -> LeftOut:
        """What either left out, for a checkpoint that went through both."""
        return LeftOut(
            *(tuple(dict.fromkeys(getattr(self, name) + getattr(other, name))) for name in self.as_json()),
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for a person, with the first few of many names."""
        places = {"weights": self.tensors, "config": self.config_keys}
        return (
            *(f"left out of the {place}: {listed(names, _LISTED)}" for place, names in places.items() if names),
            *(f"{key} is 0 in what is written, which has no such layers" for key in self.zeroed),
        )

    def as_json(self) -> dict[str, Any]:
        return {name: list(values) for name, values in asdict(self).items()}

    @classmethod
    def from_json(cls, value: Any) -> LeftOut:
        """From a manifest, which may be another version's; what is not understood is empty."""
        entries = value.items() if isinstance(value, dict) else ()
        known = cls().as_json()
        return cls(
            **{key: tuple(map(str, names)) for key, names in entries if key in known and isinstance(names, list)}
        )


def left_out(source: Source, model: PreTrainedModel, folder: Path) -> LeftOut:
    """What a source holds and a folder that was written from it does not; both are compared as files.

    A model that came without files has nothing that is not in memory.

    Args:
        model: as it was written.
    """
    if not source.has_files:
        return LeftOut()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    dialect = dialect_named(dialect_of(config, folder))
    counts = family_of(model.config).unread_layers_keys[:1]
    return LeftOut(
        tensors=_tensors_left_out(source, model, folder, dialect),
        config_keys=keys_left_out(source, model.config, (*_flat(config), *dialect.implied_keys)),
        zeroed=tuple(key for key in counts if source.config.get(key) and not config.get(key)),
    )


def keys_left_out(source: Source, config: PreTrainedConfig, written: Iterable[str]) -> tuple[str, ...]:
    """The keys of a source's config.json that are not among those that were written, under whatever name.

    Args:
        config: of the model, whose class knows other names for some keys.
    """

    translated = translated_keys()

    def meant(key: str) -> str:
        key = translated.get(key, key)
        return str(config.attribute_map.get(key, _OLDER_KEYS.get(key, key)))

    names = set(written)
    meanings = {meant(key) for key in names} | _IN_EVERY_FILE
    return tuple(key for key in _flat(source.config) if key not in names and meant(key) not in meanings)


def unread_tensors(source: Source, model: PreTrainedModel) -> tuple[str, ...]:
    """The tensors in a source's files that are not in a model's memory."""
    if not source.has_files:
        return ()
    return tuple(unread_names(model, stored_names(source.folder, dialect_named(source.dialect))))


def _tensors_left_out(source: Source, model: PreTrainedModel, folder: Path, dialect: Dialect) -> tuple[str, ...]:
    before, after = stored_names(source.folder, dialect_named(source.dialect)), stored_names(folder, dialect)
    config = model_config(source)  # of our own class's base, which knows older names in files that ours does not
    base = model if config.model_type == model.config.model_type else without_weights(config, model.dtype)
    written = places_of_parameters(model, after.values())
    ties = tied_weights(model).items()
    shared = {name for tie in ties for name, other in (tie, tie[::-1]) if other in written}
    lost = {
        name
        for place, names in places_of_parameters(base, before.values()).items()
        if place not in written and place not in shared
        for name in names
    }
    return tuple(name for name, ours in before.items() if ours in lost)


def _flat(config: Mapping[str, Any]) -> list[str]:
    """The keys of a config, with those in objects of which a dialect translates keys one by one."""
    objects = {key.partition(".")[0] for key in translated_keys() if "." in key}
    nested = [f"{key}.{inner}" for key in objects if isinstance(config.get(key), dict) for inner in config[key]]
    return [*(key for key in config if key not in objects), *nested]
