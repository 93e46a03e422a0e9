"""Checkpoints in and out: where a model comes from, what its files say, and how a pruned one is written."""

from ghostssm.checkpoint.description import Description, describe
from ghostssm.checkpoint.loading import Checkpoint, load
from ghostssm.checkpoint.saving import save
from ghostssm.checkpoint.source import Source, find_source
from ghostssm.checkpoint.verification import Check, Verification, verify
from ghostssm.files.outputs import OutputFolder

__all__ = [
    "Check",
    "Checkpoint",
    "Description",
    "OutputFolder",
    "Source",
    "Verification",
    "describe",
    "find_source",
    "load",
    "save",
    "verify",
]
