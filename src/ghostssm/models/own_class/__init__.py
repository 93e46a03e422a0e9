"""transformers model classes for what ``Mamba2ForCausalLM`` can't express: projected states and per-layer sizes.

Importing this package registers them, so that ``AutoModelForCausalLM.from_pretrained`` knows a saved folder; and
``save_pretrained`` puts the two files of code into the folder, so that it loads with ``trust_remote_code=True`` where
ghostssm is not installed.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from ghostssm.models.own_class.configuration_ghost_mamba2 import GhostMamba2Config
from ghostssm.models.own_class.modeling_ghost_mamba2 import (
    GhostMamba2Block,
    GhostMamba2ForCausalLM,
    GhostMamba2Mixer,
    GhostMamba2Model,
    GhostMamba2PreTrainedModel,
)

AutoConfig.register(GhostMamba2Config.model_type, GhostMamba2Config, exist_ok=True)
AutoModel.register(GhostMamba2Config, GhostMamba2Model, exist_ok=True)
AutoModelForCausalLM.register(GhostMamba2Config, GhostMamba2ForCausalLM, exist_ok=True)
GhostMamba2Config.register_for_auto_class("AutoConfig")
GhostMamba2Model.register_for_auto_class("AutoModel")
GhostMamba2ForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = [
    "GhostMamba2Block",
    "GhostMamba2Config",
    "GhostMamba2ForCausalLM",
    "GhostMamba2Mixer",
    "GhostMamba2Model",
    "GhostMamba2PreTrainedModel",
]
