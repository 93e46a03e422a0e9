"""The arithmetic of a Mamba-2 mixer: the recurrence over the state, and what stands before and after it.

What to call, each with a readable reference or definition beside its fast forms:

- `ssd`: the recurrence over a sequence, and its gradients; `chunks` has it as matrix products. Shape letters are here.
- `decode`: one token of a mixer from in_proj to out_proj, in place; `step` has its parts where it is not one kernel.
- `conv_norm`: the short convolution, and the norms.
- `state_format`: how a state is stored in fewer bits. `stored`: the recurrence over such a state; `straight_through`:
  its gradients; `rounding_costs`: what rounding costs.
- `energy`: energies per channel, for GHOST's scores. `reading`: states read in some directions, for the other methods.

Fast forms, which those choose:

- On a CPU loops that numba compiles, if `compiled` finds that they can take a call: `_kernels` (forwards),
  `_kernels_backward`, `_kernels_straight_through`; of states in fewer bits `_channel_kernels` (codes) and
  `_row_kernels` (half precision), whose vectors are in `_lanes` and `_lane_codes`.
- On a GPU Triton's kernels, if `gpu` finds so: `_triton_step` and `_triton_norm` (one token), `_triton_scan` (token by
  token, the state in registers), `_triton_chunks` (gradients and readings), `_triton_stored` (states in fewer bits;
  `_triton_rounding` has their codes).
- PyTorch's own operations elsewhere.
"""
