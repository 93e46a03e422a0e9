"""Closed-form repair: D and out_proj by least squares, so that a pruned mixer's output comes close to what it was."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ghostssm.calibration.open_block import PrunedBlock
from ghostssm.calibration.processes import Processes
from ghostssm.models.mixer import Mixer, Streams, mixer_output, normed_output
from ghostssm.ops.ssd import ssd
from ghostssm.ops.step import at_least_float32
from ghostssm.recovery.base import MixerStep, held_out, register_step

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Candidates for the ridge, in multiples of the features' mean energy."""
_SKIP_TOKENS = 1024
"""Tokens of the windows to which D is fitted, which has one number per head."""
_SKIP_POSITIONS = 8
"""Of every window at the least: at the first one the state holds a single token, which is like no other."""
_SLOPE_POSITIONS = 64
"""Whose slopes are computed at once, if no window has more: hidden_size x heads numbers for each."""
_SKIP_STEPS = 2
_SKIP_RIDGE = 1e-6
_SKIP_DIFFERENCE = 1e-2


@dataclass
class _Normal:
    """The normal equations of a linear fit of what is missing, E = target - out_proj(features), to the features X.

    Attributes:
        gram: (k, k), X^T X. cross: (d, k), E^T X. energy: sum of E^2. All float64.
    """

    gram: Tensor
    cross: Tensor
    energy: float

    @classmethod
    def empty(cls, like: Tensor) -> _Normal:
        d, k = like.shape
        zeros = torch.zeros(k + d, k, dtype=torch.float64, device=like.device)
        return cls(zeros[:k], zeros[k:], 0.0)

    def add(self, features: Tensor, missing: Tensor) -> None:
        features, missing = features.flatten(0, 1), missing.flatten(0, 1)
        self.gram += (features.T @ features).double()
        self.cross += (missing.T @ features).double()
        self.energy += missing.double().square().sum().item()

    def add_up(self, processes: Processes) -> None:
        """Add up the sums of all processes."""
        energy = torch.tensor([self.energy], dtype=torch.float64)
        processes.add(self.gram, self.cross, energy)
        self.energy = energy.item()

    def solve(self, ridge: float) -> Tensor:
        """(d, k): the change of the weight that minimises |E - X change^T|^2 + ridge |change|^2 (relative ridge)."""
        if not self.gram.any():  # no features, nothing to fit
            return torch.zeros_like(self.cross)
        penalty = ridge * self.gram.diagonal().mean() * torch.eye(len(self.gram), dtype=torch.float64).to(self.gram)
        change: Tensor = torch.linalg.solve(self.gram + penalty, self.cross.T).T
        return change

    def error(self, change: Tensor) -> float:
        """Sum of squares that is left under a change of the weight."""
        gain = 2 * (change * self.cross).sum() - (change @ self.gram * change).sum()
        return self.energy - gain.item()


@torch.inference_mode(False)
def repair_skip(
    mixer: Mixer,
    batches: Iterable[Streams],
    targets: Sequence[Tensor],
    processes: Processes | None = None,
) -> float:
    """Fit D to the wanted outputs, in place, by Gauss-Newton steps: only the norm makes the output nonlinear in D.

    Every eighth window is held out; a step that does not lower the error there is not taken.

    Args, returns: as `repair_output`; every process fits to the positions that all of them sample.
    """
    processes = processes or Processes()
    D = mixer.D
    tokens = sum(processes.gather([sum(target.shape[0] * target.shape[1] for target in targets)]))
    stride = max(1, min(tokens // _SKIP_TOKENS, targets[0].shape[1] // _SKIP_POSITIONS))
    parts = []
    with torch.no_grad():
        for streams, target in zip(batches, targets, strict=True):
            y, _ = ssd(streams.x, streams.dt, mixer.A, streams.B, streams.C)
            sampled = [part[:, ::stride].clone() for part in (y, streams.x, streams.z)]
            parts.append([*sampled, target[:, ::stride].to(y)])  # targets may be in files, which only a CPU reads
        y, x, z, target = (torch.cat(part) for part in zip(*processes.gather(parts), strict=True))
        apart = held_out(len(y))
        if not apart.any():
            return 1.0

        def missing(skip: Tensor, rows: Tensor) -> Tensor:
            return target[rows] - mixer_output(mixer, y[rows] + skip[:, None] * x[rows], z[rows])

        skip = at_least_float32(D).clone()
        before = error = missing(skip, apart).double().square().sum().item()
        for _ in range(_SKIP_STEPS):
            gram = torch.zeros(len(skip), len(skip), dtype=torch.float64, device=skip.device)
            pull = gram[0].clone()
            # The slopes of all windows at once would fill the memory, and windows may be short, and many.
            for rows in torch.nonzero(~apart)[:, 0].split(max(1, _SLOPE_POSITIONS // y.shape[1])):
                slopes = _slopes(mixer, y[rows] + skip[:, None] * x[rows], x[rows], z[rows])
                gram += slopes.T @ slopes
                pull += slopes.T @ missing(skip, rows).flatten().double()
            scale = gram.diagonal().mean()
            if not scale > 0:  # nothing that D weighs reaches the output
                break
            ridge = _SKIP_RIDGE * scale * torch.eye(len(gram)).to(gram)
            trial = skip + torch.linalg.solve(gram + ridge, pull).to(skip)
            now = missing(trial, apart).double().square().sum().item()
            if not now < error:
                break
            skip, error = trial, now
        D.copy_(skip)
    return error / before if before else 1.0


def _slopes(mixer: Mixer, y: Tensor, x: Tensor, z: Tensor) -> Tensor:
    """(b * l * hidden_size, h), float64: the output's derivative with respect to each head's D, by central differences,
    whose step may be large since only the norm bends the output."""

    def along(head: int) -> Tensor:
        step = torch.zeros_like(x)
        step[:, :, head] = _SKIP_DIFFERENCE * x[:, :, head]
        return (mixer_output(mixer, y + step, z) - mixer_output(mixer, y - step, z)).flatten().double()

    return torch.stack([along(head) for head in range(x.shape[2])], dim=1) / (2 * _SKIP_DIFFERENCE)


@torch.inference_mode(False)
def repair_output(
    mixer: Mixer,
    batches: Iterable[Streams],
    targets: Sequence[Tensor],
    processes: Processes | None = None,
    first: int = 0,
) -> float:
    """Fit out_proj to the wanted outputs, in place; the weight is pulled towards what it was.

    The ridge is the one that does best on every eighth window, which the fit for that choice does not see. If none does
    better than the weight as it is, or there is one window only, nothing changes.

    Args:
        batches: of a pruned mixer. targets: (b, l, hidden_size) for each of them.
        processes: that share the windows; the fit is to those of all. first: the number of this one's first window.

    Returns:
        held-out error after over held-out error before, at most 1.
    """
    weight = mixer.out_proj.weight
    fit, judge = _Normal.empty(weight), _Normal.empty(weight)
    seen, others = first, processes or Processes()
    with torch.no_grad():
        for streams, target in zip(batches, targets, strict=True):
            features = normed_output(mixer, streams)
            missing = target.to(features) - torch.nn.functional.linear(
                features, at_least_float32(weight), mixer.out_proj.bias
            )
            apart = held_out(len(target), seen)
            seen += len(target)
            fit.add(features[~apart], missing[~apart])
            judge.add(features[apart], missing[apart])
        for side in (fit, judge):
            side.add_up(others)
        share, change = others.from_first(lambda: _best_change(fit, judge))
        if change is not None:
            weight += change.to(weight)
    return share


def _best_change(fit: _Normal, judge: _Normal) -> tuple[float, Tensor | None]:
    """The share of the held-out error that is left, and the change of the weight; None if none helps."""
    if judge.energy == 0 or fit.energy == 0:
        return 1.0, None
    error, ridge = min((judge.error(fit.solve(ridge)), ridge) for ridge in RIDGES)
    if error >= judge.energy:
        return 1.0, None
    both = _Normal(fit.gram + judge.gram, fit.cross + judge.cross, fit.energy + judge.energy)
    return error / judge.energy, both.solve(ridge)


def _repair(block: PrunedBlock, amount: int, seed: int) -> None:
    """Fit D first, then out_proj to what is still missing."""
    mixer, targets, walk = block.present_mixer, block.dense_outputs, block.walk
    repair_skip(mixer, block.streams(), targets, walk.processes)
    repair_output(mixer, block.streams(), targets, walk.processes, walk.first_window)


register_step(MixerStep("repair", "fit D and out_proj to the dense output, in closed form", _repair))
