"""Dialects: how config.json and tensors are called, by transformers and by others."""

from ghostssm.checkpoint.dialects.base import (
    Dialect,
    dialect_named,
    dialect_of,
    register,
    translated_keys,
)
from ghostssm.checkpoint.dialects.mamba_ssm import MambaSsm
from ghostssm.checkpoint.dialects.transformers import Transformers

register(Transformers())
register(MambaSsm())

__all__ = ["Dialect", "dialect_named", "dialect_of", "register", "translated_keys"]
