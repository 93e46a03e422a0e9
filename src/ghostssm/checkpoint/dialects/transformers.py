"""The transformers dialect: config.json and tensor names as transformers' own classes write them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig

from ghostssm.checkpoint.dialects.base import Dialect
from ghostssm.checkpoint.dialects.mamba_ssm import CONFIG_KEYS
from ghostssm.errors import ModelError
from ghostssm.models.families import family_named, family_of
from ghostssm.models.families.published import published_form
from ghostssm.models.transformers_private import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_OTHER_MAMBAS = {
    "mamba": "Mamba-1",
    "falcon_mamba": "Mamba-1 (FalconMamba)",
    "jamba": "Mamba-1 (Jamba)",
    "zamba": "Mamba-1 (Zamba)",
    "mamba3": "Mamba-3",
}


class Transformers(Dialect):
    """Everything that ghostssm writes can be written in it; a config that is in no other dialect is in this one."""

    name = library = "transformers"
    holds_hybrids = holds_own_class = ties_heads = has_shards = keeps_unread = True

    def recognises(self, config: Mapping[str, Any], folder: Path) -> bool:
        return True

    def to_transformers(self, config: dict[str, Any], where: str) -> dict[str, Any]:
        model_type = config.get("model_type")
        if not isinstance(model_type, str):
            raise ModelError(
                f"{where} has neither a model_type nor an ssm_cfg; expected the config of a "
                "Mamba-2 model in the transformers or the mamba_ssm dialect."
            )
        if model_type in _OTHER_MAMBAS:
            raise ModelError(f"{where} is of a {_OTHER_MAMBAS[model_type]} model; ghostssm prunes Mamba-2 layers only.")
        if "ssm_cfg" not in config:
            return config
        # What a conversion left of mamba_ssm's config, whose sizes nothing would keep true.
        config_class = type(AutoConfig.for_model(family_named(model_type).model_type))
        left = CONFIG_KEYS - {field.name for field in dataclasses.fields(config_class)}
        return {key: value for key, value in config.items() if key not in left}

    def from_transformers(
        self, model: PreTrainedModel, base: Mapping[str, Any] | None, carried: bool
    ) -> dict[str, Any]:
        """Every value is written out, so that engines whose defaults differ read the same model.

        Layers that transformers' class does not load are counted only where they are carried over.
        """
        model.config.architectures = [type(model).__name__]
        family = family_of(model.config)
        config = published_form(model.config, json.loads(model.config.to_json_string(use_diff=False)), family.own_keys)
        if family.unread_layers_keys:
            count, *others = family.unread_layers_keys
            config |= {key: getattr(model.config, key) for key in others} if carried else {count: 0}
        return config

    def write_weights(self, model: PreTrainedModel, folder: Path) -> None:
        with quiet_transformers(), _without_generation_config(model):
            model.save_pretrained(folder)

    def how_to_load(self, own_class: bool) -> str:
        trust = ", trust_remote_code=True" if own_class else ""
        return (
            "```python\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("PATH"{trust})\n'
            f'tokenizer = AutoTokenizer.from_pretrained("PATH"{trust})\n```\n\n'
            "PATH is this folder or the name of its repository."
            " transformers 5 is needed, ghostssm is not." + (" The model class comes with it." if own_class else "")
        )


@contextmanager
def _without_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Within the context transformers saves none: it refuses some that are published, and changes others."""
    model.can_generate = lambda: False
    try:
        yield
    finally:
        del model.can_generate
