"""transformers model classes for what ``Mamba2ForCausalLM`` can't express: projected states and per-layer sizes.

Importing this package registers their config, and importing `classes` in it the models, so that
``AutoModelForCausalLM.from_pretrained`` knows a saved folder. ``save_pretrained`` puts the two files of code into the
folder, so that it loads with ``trust_remote_code=True`` where ghostssm is not installed.
"""

from transformers import AutoConfig

from ghostssm.models.own_class.configuration_ghost_mamba2 import GhostMamba2Config

AutoConfig.register(GhostMamba2Config.model_type, GhostMamba2Config, exist_ok=True)
GhostMamba2Config.register_for_auto_class("AutoConfig")

__all__ = ["GhostMamba2Config"]
