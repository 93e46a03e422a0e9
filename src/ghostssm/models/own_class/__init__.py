"""transformers model classes for what its own can't express: projected states and per-layer sizes.

Importing this package registers their configs, and importing `classes` in it the models, so that
``AutoModelForCausalLM.from_pretrained`` knows a saved folder. ``save_pretrained`` puts the two files of code into the
folder, so that it loads with ``trust_remote_code=True`` where ghostssm is not installed.
"""

from transformers import AutoConfig

from ghostssm.models.own_class import configuration_ghost
from ghostssm.models.own_class.configuration_ghost import GhostConfig

OWN_CONFIGS: dict[str, type[GhostConfig]] = {
    own.model_type.removeprefix("ghost_"): own
    for own in vars(configuration_ghost).values()
    if isinstance(own, type) and issubclass(own, GhostConfig) and own is not GhostConfig
}
"""The model type of a stock family to the config of our class for it."""

for _config in OWN_CONFIGS.values():
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    _config.register_for_auto_class("AutoConfig")

__all__ = ["OWN_CONFIGS", "GhostConfig"]
