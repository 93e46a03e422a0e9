"""The training of a student: Adam with warmup and cosine, judged on held-out windows, kept so that it can go on.

Which rate is too high depends on how near the student already is to its teacher: every step of Adam moves a parameter
by about the rate, and such noise costs a divergence that goes with its square. So the rate goes with the root of the
first divergence, unless it is given; and a training that diverges goes back to its best parameters, and on from there
at a lower rate.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ghostssm.calibration.processes import Processes
from ghostssm.choices import DEFAULT_SEED, DISTILL_RATE, DISTILL_STEPS, Trained, check_divisible
from ghostssm.errors import InputError
from ghostssm.ops.state_format import FLOAT32, FORMATS, StateStorage
from ghostssm.plan.distillation import Distillation, Point
from ghostssm.plan.measurement import Difference
from ghostssm.progress import Notify, Progress, silent, unheard
from ghostssm.recovery.distill.batches import Batches
from ghostssm.recovery.distill.pair import Lesson, Student, Teacher, choose_trained, placed_like, prepared, whole
from ghostssm.recovery.distill.run_state import RunState
from ghostssm.units import duration_text, text_name

_BETAS = (0.9, 0.95)
_MOST_NORM = 1.0
"""The largest norm of the gradient; a longer gradient is scaled down to it."""
_WARMUP_SHARE = 0.1
_CHECKS = 20
"""Looks at the held-out windows, evenly over the steps."""
_PATIENCE, _TREND = 15, 3
"""The training ends after so many looks without a gain, unless the divergence has fallen over the last few: a high rate
first makes it worse, and most is gained at the end of the schedule."""
ALL_STEPS = "all steps were taken"
_DIVERGED = 3.0
"""The training goes back when the divergence on the held-out windows is so many times the first one."""
_CAUTION = 0.3
"""Factor on the learning rate, each time."""
_MOST_SETBACKS = 3
"""After these it ends."""
_LEAST_DIVERGENCE, _MOST_DIVERGENCE = 1e-6, 1.0
"""The rate goes with the root of a divergence between these two; beyond, it is that of the nearer one."""


@dataclass(frozen=True)
class Settings:
    """How a student is trained.

    Attributes:
        steps: of Adam. batch: windows per step, over all processes and accumulated parts.
        learning_rate: the largest, after the warmup; None for one that suits the first divergence.
        trained: which parameters move.
        hidden_weight: of the relative squared error of the hidden states after every block, beside the divergence.
        accumulate: parts that a batch is computed in, one after the other; memory holds the activations of one.
        checkpointing: hold the inputs of blocks only, and compute their insides twice.
        bfloat16: compute in bfloat16; weights, gradients and Adam's moments stay float32.
        state_dtype: that the student's state is rounded to after every token, as it will be served; gradients take the
            rounding for the identity.
    """

    steps: int = DISTILL_STEPS
    batch: int = 8
    learning_rate: float | None = None
    trained: Trained = "mixers"
    hidden_weight: float = 0.0
    accumulate: int = 1
    checkpointing: bool = False
    bfloat16: bool = False
    seed: int = DEFAULT_SEED
    state_dtype: str = FLOAT32.name

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected 1 or more.")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise InputError(f"The learning rate is {self.learning_rate}; expected a number above 0.")
        if not 0 <= self.hidden_weight < math.inf:
            raise InputError(f"The hidden weight is {self.hidden_weight}; expected 0 or more.")
        if self.state_dtype not in FORMATS:
            raise InputError(f"The state dtype is {self.state_dtype}; expected one of {', '.join(FORMATS)}.")

    def share_at(self, step: int) -> float:
        """Of the largest rate, what a step has, the first being 1: up in a line, down along half a cosine."""
        warmup = max(1, round(_WARMUP_SHARE * self.steps))
        if step <= warmup:
            return step / warmup
        return (1 + math.cos(math.pi * (step - warmup) / (self.steps - warmup + 1))) / 2


@dataclass
class Listener:
    """Who hears of a training.

    Attributes:
        progress, notify: as everywhere. log: gets numbers by name, and the step.
    """

    progress: Progress = silent
    notify: Notify = unheard
    log: Callable[[dict[str, float], int], None] = field(default=lambda numbers, step: None)


class Training:
    """A student in training.

    Attributes:
        step: that was taken last. curve: what the held-out windows said. ended: why there are no more steps, if so.
        setbacks: why it went back to its best parameters, each time.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        batches: Batches,
        settings: Settings,
        parameters: Mapping[str, nn.Parameter],
        processes: Processes,
    ):
        """
        Args:
            parameters: those that move, by full name.
        """
        self.student, self.teacher, self.batches, self.settings = student, teacher, batches, settings
        self.parameters, self.processes = parameters, processes
        self.optimizer = torch.optim.Adam(parameters.values(), betas=_BETAS)
        self.step, self.curve, self.ended, self.setbacks = 0, list[Point](), "", list[str]()
        self.best = self._copy()
        self._lessons: list[tuple[Tensor, Lesson]] = []

    @property
    def tokens(self) -> int:
        """Trained on so far."""
        return self.step * self.settings.batch * self.batches.held_out.shape[1]

    @property
    def kept(self) -> Point:
        """The look that was best so far, whose parameters are kept."""
        return min(self.curve, key=lambda point: point.divergence if math.isfinite(point.divergence) else math.inf)

    @property
    def learning_rate(self) -> float:
        """The largest one, before any setback; the first look decides it, if it was not given."""
        if self.settings.learning_rate is not None:
            return self.settings.learning_rate
        first = self.curve[0].divergence
        return DISTILL_RATE * math.sqrt(max(min(first, _MOST_DIVERGENCE), _LEAST_DIVERGENCE))

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, the first being 1, after the setbacks so far."""
        return self.learning_rate * self.settings.share_at(step) * _CAUTION ** len(self.setbacks)

    def take_step(self) -> float:
        """One step of Adam on the next batch; gives its loss. Where that is not finite, the training goes back."""
        settings, processes = self.settings, self.processes
        self.optimizer.param_groups[0]["lr"] = self.rate_at(self.step + 1)
        total = torch.zeros((), dtype=torch.float64)
        for part in self.batches.take().tensor_split(settings.accumulate):
            own = part[processes.rank :: processes.size].to(self.student.model.device)
            loss = self.student(own, self.teacher(own)) / settings.accumulate
            loss.backward()
            total += loss.detach().double().cpu() / processes.size
        processes.add(total)
        norm = whole(nn.utils.clip_grad_norm_(self.parameters.values(), _MOST_NORM))
        value = total.item() if norm.isfinite() else math.nan
        if math.isfinite(value):
            self.optimizer.step()
            self.step += 1
        else:
            self._go_back(f"the loss of step {self.step + 1} was not finite")
        self.optimizer.zero_grad()
        return value

    def look(self) -> Point:
        """Measure on the held-out windows; the parameters are kept if they do best so far."""
        losses = self._held_out_losses()
        excess = losses[1] - losses[2]
        error = excess.std().item() / math.sqrt(len(excess)) if len(excess) > 1 else math.nan
        point = Point(self.step, self.tokens, losses[0].mean().item(), Difference(excess.mean().item(), error))
        self.curve.append(point)
        if self.kept is point:
            self.best = self._copy()
        first, earlier = self.curve[0], self.curve[:-_PATIENCE]
        if not math.isfinite(first.divergence):
            self.ended = f"the divergence before the first step is {first.divergence}"
        elif self.step == self.settings.steps:
            self.ended = ALL_STEPS
        elif not point.divergence <= _DIVERGED * first.divergence:
            told = f"it diverged, from {first.divergence:.4g} to {point.divergence:.4g} on the held-out windows"
            self._go_back(f"{told}, by step {self.step}")
        elif earlier and not self._gains(earlier[-1]):
            self.ended = f"no gain on the held-out windows since step {earlier[-1].step}"
        return point

    def _gains(self, earlier: Point) -> bool:
        """Whether a look since an earlier one was better than that one, or the divergence is falling now.

        The best look of all is no measure: a high rate leaves it first, and comes back to it late.
        """
        latest = self.curve[-1].divergence
        better = any(point.divergence < earlier.divergence for point in self.curve[-_PATIENCE:])
        return better or latest < self.curve[-1 - _TREND].divergence

    @torch.no_grad()
    def _go_back(self, reason: str) -> None:
        """To the best parameters, and on from there at a lower rate; or end, where that has not helped."""
        if len(self.setbacks) == _MOST_SETBACKS:
            self.ended = reason
            return
        self.setbacks.append(reason)
        for name, value in self.parameters.items():
            value.copy_(self.best[name])
        self.optimizer.state.clear()

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All that decides how the training goes on: JSON values, and whole tensors. Every process calls it."""
        tensors = dict[str, Tensor]()
        for name, value in self.parameters.items():
            parts = {"now": value, "best": self.best[name], **self.optimizer.state.get(value, {})}
            tensors |= {f"{part}:{name}": whole(tensor) for part, tensor in parts.items()}
        curve = [asdict(point) for point in self.curve]
        so_far = {"step": self.step, "curve": curve, "ended": self.ended, "setbacks": self.setbacks}
        return so_far | {"batches": self.batches.state()}, tensors

    @torch.no_grad()
    def restore(self, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Go on from a `state`."""
        self.step, self.ended, self.setbacks = facts["step"], facts["ended"], facts["setbacks"]
        self.curve = [Point(**point | {"excess": Difference(**point["excess"])}) for point in facts["curve"]]
        self.batches.restore(facts["batches"])
        for name, value in self.parameters.items():
            value.copy_(placed_like(value, tensors[f"now:{name}"]))
            self.best[name] = placed_like(value, tensors[f"best:{name}"])
            if f"step:{name}" in tensors:
                moments = {part: placed_like(value, tensors[f"{part}:{name}"]) for part in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[value] = {"step": tensors[f"step:{name}"], **moments}

    def _copy(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.parameters.items()}

    @torch.no_grad()
    def _held_out_losses(self) -> Tensor:
        """Divergence, the student's and the teacher's loss: (3, held-out windows), float64, nats per token."""
        processes, count = self.processes, len(self.batches.held_out)
        if not self._lessons:
            # Shares of equal size, so that all processes make the same calls: some windows are computed twice.
            shared = torch.arange(-(-count // processes.size) * processes.size) % count
            own = self.batches.held_out[shared[processes.rank :: processes.size]].to(self.student.model.device)
            per_part = max(1, self.settings.batch // (self.settings.accumulate * processes.size))
            # Without the hidden states of blocks, which take the memory of many batches.
            self._lessons = [(ids, Lesson(self.teacher(ids).readout)) for ids in own.split(per_part)]
        losses = [self.student(ids, lesson, by_window=True).cpu() for ids, lesson in self._lessons]
        shares = processes.gather([torch.cat(losses, dim=1)])
        return torch.stack(shares, dim=-1).flatten(1)[:, :count]


@dataclass(frozen=True)
class Distilled:
    """What became of a student.

    Attributes:
        changes: new values of its parameters by full name, float32, on the CPU. record: how they came about.
    """

    changes: Mapping[str, Tensor]
    record: Distillation


@torch.inference_mode(False)
@torch.enable_grad()
def distill(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Batches,
    settings: Settings,
    *,
    teacher_name: str | None = None,
    processes: Processes | None = None,
    listener: Listener | None = None,
    keeper: RunState | None = None,
) -> Distilled:
    """Train a pruned model on the next-token distributions of the dense one.

    The parameters that do best on the held-out windows are given back, which may be those that it came with; so they
    never do worse there.

    Args:
        student: in float32; it is used up: what it holds afterwards is of no use.
        teacher: stays as it is.
        keeper: holds the state of a training that is to go on, and is given states to hold.

    Raises:
        InputError: a batch that can't be divided among the processes, or numbers out of range.
    """
    processes, listener = processes or Processes(), listener or Listener()
    check_divisible(settings.batch, settings.accumulate, processes.size)
    own, dense = Student(student, settings.hidden_weight), Teacher(teacher, student.device, settings.hidden_weight > 0)
    choose_trained(student, settings.trained)
    storage = StateStorage.of(settings.state_dtype)
    with prepared(own, dense, processes, settings.checkpointing, settings.bfloat16, storage):
        parameters = {name: value for name, value in student.named_parameters() if value.requires_grad}
        training = Training(own, dense, batches, settings, parameters, processes)
        if keeper is not None and (state := keeper.read()) is not None:
            training.restore(*state)
        _run(training, listener, keeper)
        changes = {name: whole(value) for name, value in training.best.items()}
    record = Distillation(
        teacher=teacher_name,
        text=text_name(batches.source.name),
        text_sha256=batches.source.text_sha256,
        tokens_sha256=batches.tokens_sha256,
        steps=training.step,
        tokens=training.tokens,
        kept_step=training.kept.step,
        seed=settings.seed,
        learning_rate=training.learning_rate,
        trained=settings.trained,
        state_dtype=settings.state_dtype,
        hidden_weight=settings.hidden_weight,
        held_out_windows=len(batches.held_out),
        curve=tuple(training.curve),
        ended=training.ended,
        setbacks=tuple(training.setbacks),
        overlap=batches.overlap.share,
    )
    return Distilled(changes, record)


def _run(training: Training, listener: Listener, keeper: RunState | None) -> None:
    steps, between = training.settings.steps, max(1, training.settings.steps // _CHECKS)
    begun, first = time.monotonic(), training.step
    listener.progress("distillation", training.step, steps)
    if not training.curve:
        _tell(training, training.look(), listener, math.nan, 0.0)
        if training.settings.learning_rate is None and not training.ended:
            divergence = training.curve[0].divergence
            listener.notify(f"learning rate {training.learning_rate:.2g}, for a divergence of {divergence:.3g}")
    while not training.ended:
        setbacks, before = len(training.setbacks), training.step
        loss = training.take_step()
        listener.progress("distillation", training.step, steps)
        if training.step > before and (training.step % between == 0 or training.step == steps):
            speed = (time.monotonic() - begun) / (training.step - first)
            _tell(training, training.look(), listener, loss, speed)
        if len(training.setbacks) > setbacks:
            rate = training.rate_at(training.step + 1)
            listener.notify(f"{training.setbacks[-1]}; goes on from step {training.kept.step} at a rate of {rate:.2g}")
        if keeper is not None and training.processes.from_first(keeper.is_due):
            keeper.write(*training.state())
    if training.ended != ALL_STEPS:
        listener.notify(f"stopped after {training.step} of {steps} steps: {training.ended}")


def _tell(training: Training, point: Point, listener: Listener, loss: float, seconds_per_step: float) -> None:
    """Say how the training goes."""
    numbers = {"held_out_divergence": point.divergence, "held_out_excess_loss": point.excess.mean}
    told = f"excess loss {point.excess_text} on held-out windows"
    if point.step:
        settings = training.settings
        speed = settings.batch * training.batches.held_out.shape[1] / seconds_per_step
        left = duration_text((settings.steps - point.step) * seconds_per_step)
        numbers |= {"loss": loss, "learning_rate": training.rate_at(point.step), "tokens_per_second": speed}
        told = f"loss {loss:.4f}, {told}, {speed:,.0f} tokens/s, {left} left"
    listener.log(numbers, point.step)
    listener.notify(f"step {point.step}/{training.settings.steps}: {told}")
