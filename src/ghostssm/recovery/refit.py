"""Local refit: the small tensors of one pruned mixer, by gradient descent on the output that the whole mixer had.

Only this mixer is differentiated. x and z stay as they are, so a step costs the recurrence and two small products, and
memory holds the activations of a few windows of one mixer. A state that is to be kept in int4 is rounded after every
token here too; gradients take the rounding for the identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ghostssm.calibration.open_block import PrunedBlock
from ghostssm.models.mixer import Mixer, multiplied_norm
from ghostssm.ops.conv_norm import causal_conv
from ghostssm.ops.ssd import ssd
from ghostssm.ops.state_format import StateStorage
from ghostssm.ops.step import at_least_float32, project_streams
from ghostssm.ops.straight_through import straight_through_scan
from ghostssm.recovery.base import MixerStep, held_out, register_step, training_dtype

DEFAULT_STEPS = 100
LEARNING_RATE = 0.03
"""Adam's, for a parameter whose root mean square is 1; it is in proportion for others."""
BETAS = 0.6, 0.95
"""Adam's: a memory of about 3 gradients and 20 squares, which suits a run of a hundred steps or fewer."""
MOST_TOKENS = 32768
"""Tokens of the calibration windows that are kept in memory for a mixer's refit."""
_CHECK_EVERY = 20
"""Steps between two measurements on the held-out windows."""
_CAUTION = 0.3
"""Factor on the learning rate after each measurement until one shows an improvement."""
_TOKENS_PER_STEP = 1024


@dataclass(frozen=True)
class RefitData:
    """Inputs of a mixer, and the outputs that it should give.

    Attributes:
        hidden: (b, l, hidden_size), the mixer's input. target: the same shape, its wanted output.
        x: (b, l, h, p). gate: (b, l, h * p), SiLU(z). dt: (b, l, h), before bias and softplus.
    """

    hidden: Tensor
    target: Tensor
    x: Tensor
    gate: Tensor
    dt: Tensor

    @classmethod
    @torch.inference_mode(False)
    def of(cls, mixer: Mixer, hidden: Tensor, target: Tensor) -> RefitData:
        """Compute what stays fixed while a mixer is refitted."""
        layout = mixer.layout
        channels = slice(0, layout.intermediate_size)
        with torch.no_grad():
            hidden = hidden.clone()  # gradients can't flow through what inference mode made
            z, xBC, dt = mixer.project_in(hidden)
            bias = None if mixer.conv1d.bias is None else mixer.conv1d.bias[channels]
            x = F.silu(causal_conv(xBC[..., channels], mixer.conv1d.weight.squeeze(1)[channels], bias))
        return cls(
            hidden,
            target.to(hidden, copy=True),
            x.unflatten(-1, (layout.num_heads, layout.head_dim)),
            F.silu(at_least_float32(z)),
            dt.clone(),
        )

    def __getitem__(self, rows: slice | Tensor) -> RefitData:
        return RefitData(*(getattr(self, field.name)[rows] for field in fields(self)))

    def __len__(self) -> int:
        return len(self.hidden)


def joined(parts: Sequence[RefitData]) -> RefitData:
    """The windows of all parts together."""
    return RefitData(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(RefitData)))


@torch.inference_mode(False)
def refit(mixer: Mixer, data: RefitData, steps: int, seed: int = 0, state_dtype: str | None = None) -> float:
    """Refit a mixer's B and C rows, their convolution, dt_bias, A_log, D, norm and projection, in place.

    Every eighth window is held out. The values that do best on these are kept, which may be those before the first
    step. One window alone changes nothing.

    Args:
        state_dtype: that the state is to be kept in.

    Returns:
        held-out error after over held-out error before, at most 1.
    """
    apart = held_out(len(data))
    windows, judge = data[~apart], data[apart]
    if not len(judge):
        return 1.0
    trial = _Trial(mixer, StateStorage.of(training_dtype(state_dtype)))
    scales = [max(leaf.detach().square().mean().sqrt().item(), 1e-3) for leaf in trial.leaves.values()]
    optimizer = torch.optim.Adam([{"params": [leaf]} for leaf in trial.leaves.values()], betas=BETAS, fused=True)
    generator = torch.Generator().manual_seed(seed)
    count = max(1, _TOKENS_PER_STEP // data.hidden.shape[1])
    energy = data.target.square().mean()
    first = best = trial.error(judge)
    kept, caution = trial.state(), 1.0
    for step in range(1, steps + 1):
        for group, scale in zip(optimizer.param_groups, scales, strict=True):
            group["lr"] = LEARNING_RATE * caution * scale * (1 - (step - 1) / steps)
        chosen = torch.randint(len(windows), (count,), generator=generator)
        batch = windows[chosen if count > 1 else slice(int(chosen), int(chosen) + 1)]  # one window needs no copy
        with torch.enable_grad():
            loss = F.mse_loss(trial.output(batch), batch.target) / energy
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % _CHECK_EVERY == 0 or step == steps:
            error = trial.error(judge)
            if error < best:
                best, kept = error, trial.state()
            elif best == first:  # too bold for a mixer that is nearly right: start again, in smaller steps
                trial.load(kept)
                optimizer.state.clear()
                caution *= _CAUTION
    trial.write(kept)
    return best / first if first > 0 else 1.0


class _Trial:
    """The refitted tensors as leaves, and the mixer's output under them."""

    def __init__(self, mixer: Mixer, storage: StateStorage):
        self.mixer, self.storage = mixer, storage
        layout = mixer.layout
        rows = slice(layout.in_proj_B.start, layout.in_proj_C.stop)
        channels = slice(layout.conv_B.start, layout.conv_C.stop)
        whole = slice(None)
        places: dict[str, tuple[Tensor | None, slice]] = {
            "in_proj": (mixer.in_proj.weight, rows),
            "in_proj_bias": (mixer.in_proj.bias, rows),
            "taps": (mixer.conv1d.weight, channels),
            "taps_bias": (mixer.conv1d.bias, channels),
            "dt_bias": (mixer.dt_bias, whole),
            "A_log": (mixer.A_log, whole),
            "D": (mixer.D, whole),
            "norm": (mixer.norm.weight if mixer.norm else None, whole),
            "project_B": (mixer.projection.B if mixer.projection else None, whole),
            "project_C": (mixer.projection.C if mixer.projection else None, whole),
        }
        self._places = {name: (tensor, part) for name, (tensor, part) in places.items() if tensor is not None}
        self.leaves = {
            name: tensor.detach()[part].clone().requires_grad_() for name, (tensor, part) in self._places.items()
        }

    def state(self) -> dict[str, Tensor]:
        return {name: leaf.detach().clone() for name, leaf in self.leaves.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Put tensors into the leaves."""
        with torch.no_grad():
            for name, leaf in self.leaves.items():
                leaf.copy_(state[name])

    def write(self, state: dict[str, Tensor]) -> None:
        """Put tensors into the mixer."""
        with torch.no_grad():
            for name, (tensor, part) in self._places.items():
                tensor[part] = state[name]

    def error(self, data: RefitData) -> float:
        """Sum of squares over all windows."""
        with torch.no_grad():
            windows = (data[index : index + 1] for index in range(len(data)))
            return sum((self.output(window) - window.target).square().sum().item() for window in windows)

    def output(self, data: RefitData) -> Tensor:
        mixer, layout, leaf = self.mixer, self.mixer.layout, self.leaves
        both = F.linear(mixer.scaled_input(data.hidden), leaf["in_proj"], leaf.get("in_proj_bias"))
        if mixer.row_multipliers is not None:
            both = both * mixer.row_multipliers[layout.in_proj_B.start : layout.in_proj_C.stop].to(both)
        both = F.silu(causal_conv(both, leaf["taps"].squeeze(1), leaf.get("taps_bias")))
        B, C = both.unflatten(-1, (2, layout.n_groups, layout.state_size)).unbind(2)
        if mixer.projection is not None:
            B, C = project_streams(B, leaf["project_B"]), project_streams(C, leaf["project_C"])
        dt = F.softplus(at_least_float32(data.dt + leaf["dt_bias"])).clamp(*mixer.dt_limit)
        streams = (data.x, dt, -torch.exp(leaf["A_log"]), B, C, leaf["D"])
        y = straight_through_scan(self.storage, *streams) if self.storage.rounds else ssd(*streams)[0]
        norm = None if mixer.norm is None else replace(mixer.norm, weight=leaf["norm"])
        normed = multiplied_norm(norm, y, data.gate, layout.n_groups)
        bias = None if mixer.out_proj.bias is None else mixer.out_proj.bias.detach()
        return F.linear(normed, mixer.out_proj.weight.detach(), bias)


def _refit(block: PrunedBlock, amount: int, seed: int) -> None:
    """Process 0 refits on the first windows of all processes; the others take over its parameters."""
    mixer, walk = block.present_mixer, block.walk
    data, tokens = [], walk.first_window * walk.hidden.shape[1]
    for hidden, target in zip(block.inputs(), block.dense_outputs, strict=True):
        if tokens >= MOST_TOKENS:
            break
        data.append(RefitData.of(mixer, hidden, target))
        tokens += hidden.shape[0] * hidden.shape[1]
    data = walk.processes.gather(data)
    tensors: list[Tensor] = [*mixer.module.parameters()]
    if mixer.projection is not None:  # the block is of a stock class, whose parameters have no maps
        tensors += [mixer.projection.B, mixer.projection.C]

    def refitted() -> list[Tensor]:
        refit(mixer, joined(data), amount, seed, block.state_dtype)
        return [tensor.detach() for tensor in tensors]

    found = walk.processes.from_first(refitted)
    if walk.processes.rank:
        with torch.no_grad():
            for tensor, value in zip(tensors, found, strict=True):
                tensor.copy_(value)


register_step(
    MixerStep("refit", "gradient descent on the small tensors, N steps per layer", _refit, DEFAULT_STEPS, rounds=True)
)
