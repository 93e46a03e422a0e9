"""Calibrate and decide: from a model and windows to a plan. The model is left as it was."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ghostssm.calibration.blocks import Blocks, blocks_of
from ghostssm.calibration.gradients import gate_saliency
from ghostssm.calibration.open_block import MEASURED_TOKENS, OpenBlock
from ghostssm.calibration.processes import Processes
from ghostssm.calibration.scratch import Scratch
from ghostssm.calibration.walk import LayerWalk
from ghostssm.choices import DEFAULT_SEED, Groups
from ghostssm.errors import ModelError, NumericalError
from ghostssm.methods.base import Evidence, EvidenceSource
from ghostssm.methods.selection import Cut, select, select_together
from ghostssm.models.families import check_plain, family_of, layout_of, mixers_of
from ghostssm.models.layout import check_state_size
from ghostssm.models.mixer import Mixer
from ghostssm.plan.decision import Decision, Selection
from ghostssm.plan.plan import Plan
from ghostssm.plan.provenance import CalibrationText, Provenance
from ghostssm.plan.surgery import apply_plan, check_storable, with_changes_of
from ghostssm.progress import Progress, listening, on_screen, silent
from ghostssm.pruning.budget import allocate
from ghostssm.pruning.journal import Journal
from ghostssm.pruning.recipe import Recipe
from ghostssm.pruning.sources import Asked, Measured, Unpruned, Walked
from ghostssm.recovery.base import MixerStep, ModelStep
from ghostssm.text.windows import Windows
from ghostssm.units import text_name

T = TypeVar("T")

_MEASURED_SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)
"""Shares of a layer's state at which budgets per layer measure what a smaller state costs."""
_CURVE_TOKENS = 4096
"""Tokens that this is measured on. A budget compares layers, which takes fewer than to compare decisions."""
DEFAULT_MULTIPLE = 8
"""State sizes per layer are multiples of this, so that rows of the state fill vector registers."""


class Calibration:
    """One model and its calibration windows, and the evidence that several plans can share.

    What does not depend on a plan is gathered once: gate gradients, and the evidence on the first mixer, whose inputs
    no decision changes. Deeper evidence is gathered anew for each plan, on the activations that the plan's own pruning
    leaves.

    Raises:
        ModelError: the model was projected before, its layers have state sizes of their own, or there are adapters or
            quantised layers in it.
    """

    def __init__(
        self,
        model: PreTrainedModel | Blocks,
        windows: Windows,
        scratch: Scratch | None = None,
        processes: Processes | None = None,
    ):
        """
        Args:
            model: in memory, or its blocks, wherever they come from.
            windows: to calibrate on.
            scratch: the room for what grows with the windows; memory if not given.
            processes: those that share the windows. Each is given all of them; recipes must be streamable then.
        """
        self.processes = processes or Processes()
        self.blocks = blocks_of(model)
        self.model, self.windows, self.scratch = self.blocks.model, windows, scratch
        check_plain(self.model)
        mixers = mixers_of(self.model)
        projected = any(mixer.projection is not None for mixer in mixers)
        check_original(not projected and len({mixer.layout.state_size for mixer in mixers}) == 1)
        self._saliency: dict[str, Tensor] | None = None
        self._first_evidence: dict[tuple[Any, ...], Any] = {}
        self._curves: dict[tuple[str, Groups, int], list[Tensor]] = {}

    def saliency(self, progress: Progress = silent) -> dict[str, Tensor]:
        """Gate saliency of every mixer, (g, n) each."""
        if self._saliency is None:
            self._saliency = gate_saliency(self.model, self.windows.ids, progress)
        return self._saliency

    def walk(self) -> LayerWalk:
        """A new walk over the model with this process's windows."""
        return LayerWalk(self.blocks, self.windows, self.scratch, self.processes)

    def plan(
        self,
        recipe: str | Recipe,
        state_size: int,
        groups: Groups = "equal",
        seed: int = DEFAULT_SEED,
        progress: Progress | None = on_screen,
        multiple: int = DEFAULT_MULTIPLE,
        journal: Journal | None = None,
        state_dtype: str | None = None,
    ) -> Plan:
        """Decide what becomes of every mixer's state.

        Args:
            recipe: a method's name, or what `Recipe` says.
            state_size: N', from 1 to the model's state size; per layer if the recipe says so, on average.
            groups: how the groups of a layer share the state: ``equal``, the same number of channels in each, or
                ``pooled``, where they compete.
            seed: for methods that draw at random, and for what is sampled.
            progress: told how far the work is; a terminal or notebook shows it if not given; None for nobody.
            multiple: of state sizes per layer.
            journal: records the decisions, and may hold the first of them already; in memory if not given.
            state_dtype: that the state is to be kept in, for steps that train with its rounding.

        Raises:
            InputError: a state size out of range, or no such recipe.
            NumericalError: activations that are not finite.
        """
        recipe = Recipe.parse(recipe) if isinstance(recipe, str) else recipe
        layout = layout_of(self.model.config)
        check_state_size(state_size, layout.state_size)
        with listening(progress) as tell:
            run = _Run(self, recipe, groups, seed, state_dtype, tell, journal or Journal())
            sizes = [state_size] * len(mixers_of(self.model))
            if recipe.per_layer and recipe.registered.scope == "layer":
                sizes = list(allocate(run.curves(), sum(sizes), min(multiple, state_size)))
            decided = run.decide(sizes)
            windows = self.windows
            plan = Plan(
                method=str(recipe),
                model_type=self.model.config.model_type,
                n_groups=layout.n_groups,
                state_size=layout.state_size,
                decisions={name: dataclasses.replace(d, changes={}) for name, (d, _) in decided.items()},
                changes={f"{name}.{part}": new for name, (d, _) in decided.items() for part, new in d.changes.items()},
                scores={name: score.double().cpu() for name, (_, score) in decided.items()},
                per_layer=recipe.per_layer,
                provenance=Provenance(
                    requested_state_size=state_size,
                    groups=groups,
                    seed=seed,
                    multiple=multiple,
                    calibration=CalibrationText(
                        text=text_name(windows.text_name),
                        text_sha256=windows.text_fingerprint,
                        tokens_sha256=windows.fingerprint,
                        windows=len(windows),
                        window_length=windows.length,
                        seed=windows.seed,
                    ),
                ),
            )
            return run.recovered(plan)


@dataclasses.dataclass
class _Run:
    """One plan in the making."""

    calibration: Calibration
    recipe: Recipe
    groups: Groups
    seed: int
    state_dtype: str | None
    progress: Progress
    journal: Journal

    def decide(self, sizes: Sequence[int]) -> dict[str, tuple[Decision, Tensor]]:
        """The decision on every mixer and the scores behind it, for state sizes given per mixer."""
        known: dict[str, tuple[Decision, Tensor]] = {}
        if self.recipe.registered.one_shot:
            known = self.calibration.processes.from_first(lambda: self._one_shot(sizes))
        if known and not self._mixer_steps():
            self._record_known(known)
        else:
            self._front_to_back(sizes, known)
        return self.journal.decisions()

    def recovered(self, plan: Plan) -> Plan:
        """The plan with what the recipe's steps of model scope change."""
        steps = [(step, step.registered) for step in self.recipe.steps]
        for step, registered in steps:
            if isinstance(registered, ModelStep):
                dense = self.calibration.model
                pruned = apply_plan(copy.deepcopy(dense), plan)
                before = {name: value.detach().clone() for name, value in pruned.named_parameters()}
                training = registered.recover(
                    pruned,
                    dense,
                    self.calibration.windows,
                    step.amount or 0,
                    self.seed,
                    self.state_dtype,
                    self.progress,
                )
                plan = with_changes_of(plan, pruned, before)
                if training is not None:
                    plan = dataclasses.replace(plan, distillations=(*plan.distillations, training))
        return plan

    def curves(self) -> list[Tensor]:
        """What a smaller state costs each mixer of the unpruned model: (n + 1,), by how many channels are left.

        The cost is the error of the mixer's output as a share of the energy of the hidden states after it, by which the
        next layers' norms divide.

        Measured at a few sizes, with what the method would keep there, and interpolated between them.
        """
        key = (self.recipe.method, self.groups, self.seed)
        if key not in self.calibration._curves:
            curves = [
                torch.tensor(curve, dtype=torch.float64) for curve in self._curves_by_block() if curve is not None
            ]
            self.calibration._curves[key] = curves
        return self.calibration._curves[key]

    def _curves_by_block(self) -> list[list[float] | None]:
        """The curve of each block's mixer; None for a block without one."""
        findings, processes = self.journal.curves, self.calibration.processes
        if len(findings.entries) == len(self.calibration.blocks.modules):
            return findings.entries
        walk = self.calibration.walk()
        findings.restore(walk.hidden)
        for block in walk.blocks(len(findings.entries)):
            index = sum(curve is not None for curve in findings.entries)
            errors = None if block.mixer is None else self._measured_errors(block, block.mixer, index)
            block.advance()
            squares = torch.linalg.vector_norm(walk.hidden, dim=-1).double().square().mean(-1)
            energies = processes.gather(squares.tolist())  # window by window: the same sum in any number of processes
            energy = sum(energies) / len(energies)
            findings.add(None if errors is None else [error / energy for error in errors], walk.hidden)
            self.progress("budget", block.index + 1, len(walk))
        return findings.entries

    def _measured_errors(self, block: OpenBlock, mixer: Mixer, index: int) -> list[float]:
        """Mean squared change of a mixer's output with 0, 1, ..., n channels left."""
        n = mixer.layout.state_size

        def measured(source: EvidenceSource) -> list[float]:
            source = Measured(source)
            evidence = dataclasses.replace(self._evidence(mixer, index, source), rough=True)
            score = self._finite_score(evidence, mixer)
            sizes = sorted({max(1, round(share * n)) for share in _MEASURED_SHARES} - {n})
            nothing = Decision(Selection(((),) * mixer.layout.n_groups))
            errors = [*source.changes([nothing, *(self._choice(evidence, score, size) for size in sizes)]), 0.0]
            curve: list[float] = np.interp(range(n + 1), [0, *sizes, n], errors).tolist()
            return curve

        return self._decided_once(block, index, measured, _CURVE_TOKENS)

    def _mixers(self) -> Iterator[tuple[nn.Module, Mixer | None]]:
        """Every block with its weights as they are stored, and its mixer, front to back."""
        blocks = self.calibration.blocks
        family = family_of(blocks.model.config)
        for index in range(len(blocks.modules)):
            with blocks.opened(index) as block:
                yield block, family.mixer(block, index)

    def _one_shot(self, sizes: Sequence[int]) -> dict[str, tuple[Decision, Tensor]]:
        """Decisions and scores on all mixers, by a method that looks at the unpruned model."""
        method, layout = self.recipe.registered, layout_of(self.calibration.model.config)
        decisions: dict[str, Decision] = {}
        # Room for all of them before the first block is read: small tensors between blocks, if kept, leave holes.
        scores = torch.empty(len(sizes), layout.n_groups, layout.state_size, dtype=torch.float64)
        for _, mixer in self._mixers():
            if mixer is not None:
                index = len(decisions)
                evidence = self._evidence(mixer, index, Unpruned(gradients=partial(self._saliency_of, mixer.name)))
                scores[index] = method.score(evidence)
                decisions[mixer.name] = self._choice(evidence, scores[index], sizes[index])
        if method.scope == "model":
            together = select_together(list(scores), sizes[0])
            decisions = {name: Decision(kept) for name, kept in zip(decisions, together, strict=True)}
        return {
            name: (decision, score.clone()) for (name, decision), score in zip(decisions.items(), scores, strict=True)
        }

    def _record_known(self, known: dict[str, tuple[Decision, Tensor]]) -> None:
        """Record decisions without a walk, since no activations are needed where nothing is to recover."""
        for index, (block, mixer) in enumerate(self._mixers()):
            if index >= self.journal.done:
                self.journal.record(block, *((mixer.name, *known[mixer.name]) if mixer else ()))

    def _front_to_back(self, sizes: Sequence[int], known: dict[str, tuple[Decision, Tensor]]) -> None:
        """Decide on each mixer by the activations that the pruned mixers before it leave; as published for GHOST."""
        journal, steps = self.journal, self._mixer_steps()
        if journal.done == len(self.calibration.blocks.modules):
            return
        walk = self.calibration.walk()
        journal.restore(walk.hidden)
        for block in walk.blocks(journal.done):
            self.progress("layers", block.index, len(walk))
            if block.mixer is None:
                block.advance()
                journal.record(block.original, hidden=walk.hidden)
                continue
            name, index = block.mixer.name, journal.decided
            decision, score = known.get(name) or self._decision(block, block.mixer, index, sizes[index])
            pruned = block.prune(decision, keep_outputs=bool(steps), state_dtype=self.state_dtype)
            for step, amount in steps:
                step.recover(pruned, amount, self.seed)
            decision = pruned.decision()
            check_storable(block.stored_mixer(), decision)  # now, and not after hours, when the model is written
            pruned.advance()
            journal.record(block.original, name, decision, score, walk.hidden)
        self.progress("layers", len(walk), len(walk))

    def _mixer_steps(self) -> list[tuple[MixerStep, int]]:
        steps = ((step.registered, step.amount or 0) for step in self.recipe.steps)
        return [(step, amount) for step, amount in steps if isinstance(step, MixerStep)]

    def _decision(self, block: OpenBlock, mixer: Mixer, index: int, size: int) -> tuple[Decision, Tensor]:
        """The decision on one mixer and the scores behind it, the same on all processes."""

        def decide(source: EvidenceSource) -> tuple[Decision, Tensor]:
            evidence = self._evidence(mixer, index, source)
            score = self._finite_score(evidence, mixer)
            return self._choice(evidence, score, size), score

        return self._decided_once(block, index, decide)

    def _decided_once(
        self, block: OpenBlock, index: int, decide: Callable[[EvidenceSource], T], tokens: int = MEASURED_TOKENS
    ) -> T:
        """A decision of process 0, which all processes take over; they work out the evidence on a block together.

        Args:
            tokens: on which the changes of decisions are measured.
        """
        calibration, name = self.calibration, block.present_mixer.name
        # No plan changes what reaches the first mixer, so its evidence is worked out once for all plans.
        known = {} if index else calibration._first_evidence
        source = Walked(block, known, lambda: calibration.saliency(silent)[name], self.seed + index, tokens)
        return self.calibration.processes.decide_once(
            lambda ask: decide(Asked(ask)), lambda what, *rest: getattr(source, what)(*rest)
        )

    def _evidence(self, mixer: Mixer, index: int, source: EvidenceSource) -> Evidence:
        return Evidence(mixer.layout, mixer.in_proj.weight.detach(), self.seed + index, source)

    def _choice(self, evidence: Evidence, score: Tensor, size: int) -> Decision:
        decide, cut = self.recipe.registered.decide, Cut(size, self.groups)
        return Decision(select(score, cut)) if decide is None else decide(evidence, cut)

    def _saliency_of(self, name: str) -> Tensor:
        return self.calibration.saliency(self.progress)[name]

    def _finite_score(self, evidence: Evidence, mixer: Mixer) -> Tensor:
        score = self.recipe.registered.score(evidence)
        if not torch.isfinite(score).all():
            raise NumericalError(
                f"NaN or Inf in what {mixer.name} adds to its output. The checkpoint is broken or overflows; "
                "evaluate the unpruned model on the same text first."
            )
        return score


def check_original(is_stock: bool) -> None:
    """Raise ModelError for a model whose state is projected, or of a size of its own in some layer."""
    if not is_stock:
        raise ModelError("The model's state was projected or cut per layer before; prune the original instead.")
