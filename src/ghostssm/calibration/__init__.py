"""From windows of text to what methods decide on: layer statistics and gate gradients."""

from ghostssm.calibration.gradients import gate_saliency
from ghostssm.calibration.statistics import LayerStatistics, gather_statistics
from ghostssm.calibration.walk import LayerWalk

__all__ = ["LayerStatistics", "LayerWalk", "gate_saliency", "gather_statistics"]
