"""Distillation: the pruned model learns the dense model's next-token distribution, end to end.

`loss` has the divergence, `batches` the text, `pair` the two models on any number of processes, `training` the steps,
`run_state` what a run is kept as on disk, `step` the recovery step that recipes name.
"""

from ghostssm.recovery.distill import step  # noqa: F401  (it registers itself)
