"""Imported by the server that tests' processes are forked from: what only the first run in a process does, done once.

No compiled loop runs here: OpenMP's threads do not survive a fork. What they are loaded with does.
"""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path

import ghostssm
import ghostssm.workflows.distill
from ghostssm.ops import compiled
from tests.conftest import random_windows, tiny_model

if compiled.HAS_KERNELS:
    from numba.core.registry import cpu_target

    import ghostssm.ops._kernels
    import ghostssm.ops._kernels_backward

    cpu_target.typing_context.refresh()
    cpu_target.target_context.refresh()

with tempfile.TemporaryDirectory() as _folder:
    _model, _output = Path(_folder) / "model", Path(_folder) / "out"
    tiny_model().save_pretrained(_model)
    _loops, compiled.kernels = compiled.kernels, None
    _windows = random_windows(2, 40)
    ghostssm.prune_streamed(
        ghostssm.stream(str(_model), head=False), _windows, "output+refit2+repair", 5, _output, held_out=_windows
    )
    compiled.kernels = _loops

gc.freeze()  # a collection in a process would copy every page of what it shares
