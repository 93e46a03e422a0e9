"""Recovery: steps that give a pruned model back what it lost. One file per step; they register themselves."""

from ghostssm.recovery import distill, refit, repair  # noqa: F401
from ghostssm.recovery.base import MixerStep, ModelStep, Step, step_names

__all__ = ["MixerStep", "ModelStep", "Step", "step_names"]
