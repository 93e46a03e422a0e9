"""The model classes, registered with transformers; apart, as they take seconds to import."""

from transformers import AutoModel, AutoModelForCausalLM

from ghostssm.models.own_class import modeling_ghost
from ghostssm.models.own_class.modeling_ghost import GhostForCausalLM, GhostMixer, GhostModel

OWN_CLASSES: dict[str, type[GhostForCausalLM]] = {
    own.config_class.model_type.removeprefix("ghost_"): own
    for own in vars(modeling_ghost).values()
    if isinstance(own, type) and issubclass(own, GhostForCausalLM) and own is not GhostForCausalLM
}
"""The model type of a stock family to our class for it."""

for _own in OWN_CLASSES.values():
    AutoModel.register(_own.config_class, _own.headless, exist_ok=True)
    AutoModelForCausalLM.register(_own.config_class, _own, exist_ok=True)
    _own.headless.register_for_auto_class("AutoModel")
    _own.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["OWN_CLASSES", "GhostForCausalLM", "GhostMixer", "GhostModel"]
