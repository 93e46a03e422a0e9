"""transformers model classes for what its own can't express: projected states and per-layer sizes.

Importing this package registers them, so that ``AutoModelForCausalLM.from_pretrained`` knows a saved folder; and
``save_pretrained`` puts the two files of code into the folder, so that it loads with ``trust_remote_code=True`` where
ghostssm is not installed.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from ghostssm.models.own_class import modeling_ghost
from ghostssm.models.own_class.configuration_ghost import GhostConfig
from ghostssm.models.own_class.modeling_ghost import GhostForCausalLM, GhostMixer, GhostModel

OWN_CLASSES: dict[str, type[GhostForCausalLM]] = {
    own.config_class.model_type.removeprefix("ghost_"): own
    for own in vars(modeling_ghost).values()
    if isinstance(own, type) and issubclass(own, GhostForCausalLM) and own is not GhostForCausalLM
}
"""The model type of a stock family to our class for it."""

for _own in OWN_CLASSES.values():
    _config = _own.config_class
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _own.headless, exist_ok=True)
    AutoModelForCausalLM.register(_config, _own, exist_ok=True)
    _config.register_for_auto_class("AutoConfig")
    _own.headless.register_for_auto_class("AutoModel")
    _own.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["OWN_CLASSES", "GhostConfig", "GhostForCausalLM", "GhostMixer", "GhostModel"]
