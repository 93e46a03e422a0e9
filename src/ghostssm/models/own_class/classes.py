"""The model classes, registered with transformers; apart, as they take seconds to import."""

from transformers import AutoModel, AutoModelForCausalLM

from ghostssm.models.own_class import GhostMamba2Config
from ghostssm.models.own_class.modeling_ghost_mamba2 import (
    GhostMamba2Block,
    GhostMamba2ForCausalLM,
    GhostMamba2Mixer,
    GhostMamba2Model,
    GhostMamba2PreTrainedModel,
)

AutoModel.register(GhostMamba2Config, GhostMamba2Model, exist_ok=True)
AutoModelForCausalLM.register(GhostMamba2Config, GhostMamba2ForCausalLM, exist_ok=True)
GhostMamba2Model.register_for_auto_class("AutoModel")
GhostMamba2ForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = [
    "GhostMamba2Block",
    "GhostMamba2ForCausalLM",
    "GhostMamba2Mixer",
    "GhostMamba2Model",
    "GhostMamba2PreTrainedModel",
]
