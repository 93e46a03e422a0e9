"""What must be set before anything imports PyTorch, for the tests and for the processes that they start.

One thread each: pytest runs a worker per core, and threads of OpenMP that spin while they wait take the cores from
those that work. Without a GPU, Triton's kernels run in its interpreter.
"""

import os

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "RAYON_NUM_THREADS": "1"}

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
