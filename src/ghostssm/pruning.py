"""Calibrate and decide: from a model and windows to a plan. The model is left as it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ghostssm.budget import allocate
from ghostssm.calibration import LayerStatistics, LayerWalk, gate_saliency, gather_statistics
from ghostssm.calibration.blocks import Blocks, blocks_of
from ghostssm.calibration.refit import MOST_TOKENS, RefitData, joined, refit
from ghostssm.calibration.repair import repair_output, repair_skip
from ghostssm.calibration.samples import OutputSamples, sample_outputs
from ghostssm.calibration.samples import joined as joined_samples
from ghostssm.calibration.scratch import Scratch
from ghostssm.data.windows import Windows
from ghostssm.errors import GhostError, InputError, ModelError, NumericalError
from ghostssm.evaluation import evaluate
from ghostssm.families import family_named, family_of, mixers_of
from ghostssm.journal import Journal
from ghostssm.methods import Evidence, method_named, method_names, stock_method_names
from ghostssm.methods.selection import Groups, select, select_together
from ghostssm.mixer import Mixer
from ghostssm.plan import Decision, Plan, Selection
from ghostssm.processes import Processes
from ghostssm.progress import Progress, silent
from ghostssm.recipe import Recipe
from ghostssm.surgery import pruned

DEFAULT_SEED = 42
_HELD_OUT_ONE_IN = 4
_MEASURED_SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)
"""Of a layer's state: where budgets per layer measure what a smaller one costs."""
DEFAULT_MULTIPLE = 8
"""State sizes per layer are multiples of this, so that rows of the state fill vector registers."""


class Calibration:
    """One model and its calibration windows, and the evidence that several plans can share.

    What does not depend on a plan is gathered once: gate gradients, and the statistics of the first mixer, whose inputs
    no decision changes. Deeper statistics are gathered anew for each plan, on the activations that the plan's own
    pruning leaves.

    Raises:
        ModelError: the model was projected before, or its layers have state sizes of their own.
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
            scratch: where what grows with the windows is to be; memory if not given.
            processes: that share the windows, which each of them is given in full; recipes must be streamable then.
        """
        self.processes = processes or Processes()
        self.blocks = blocks_of(model)
        self.model, self.windows, self.scratch = self.blocks.model, windows, scratch
        if any(mixer.projection is not None for mixer in mixers_of(self.model)) or _state_sizes(self.model) > 1:
            raise ModelError("The model's state was projected or cut per layer before; prune the original instead.")
        self._saliency: dict[str, Tensor] | None = None
        self._first_statistics: LayerStatistics | None = None
        self._first_samples: OutputSamples | None = None
        self._curves: dict[str, list[Tensor]] = {}

    def saliency(self, progress: Progress) -> dict[str, Tensor]:
        """Gate saliency of every mixer, (g, n) each."""
        if self._saliency is None:
            self._saliency = gate_saliency(self.model, self.windows.ids, progress)
        return self._saliency

    def plan(
        self,
        recipe: str | Recipe,
        state_size: int,
        groups: Groups = "equal",
        seed: int = DEFAULT_SEED,
        progress: Progress = silent,
        multiple: int = DEFAULT_MULTIPLE,
        journal: Journal | None = None,
    ) -> Plan:
        """Decide what becomes of every mixer's state.

        Args:
            recipe: a method's name, or what `Recipe` says.
            state_size: N', from 1 to the model's state size; per layer if the recipe says so, on average.
            groups: how the groups of a layer share it.
            seed: for methods that draw at random, and for what is sampled.
            multiple: of state sizes per layer.
            journal: keeps the decisions as they are made, and may know the first of them already; memory if not given.

        Raises:
            InputError: a state size out of range, no such recipe, or one whose result no class of this family can hold.
            NumericalError: activations that are not finite.
        """
        recipe = Recipe.parse(recipe) if isinstance(recipe, str) else recipe
        check_recipe(recipe, self.model.config.model_type)
        layout = family_of(self.model.config).layout(self.model.config)
        check_state_size(state_size, layout.state_size)
        run = _Run(self, recipe, groups, seed, progress, journal or Journal())
        sizes = [state_size] * len(mixers_of(self.model))
        if recipe.per_layer and recipe.how.scope == "layer":
            sizes = list(allocate(run.curves(), sum(sizes), min(multiple, state_size)))
        decisions, scores = run.decide(sizes)
        return Plan(
            method=str(recipe),
            model_type=self.model.config.model_type,
            n_groups=layout.n_groups,
            state_size=layout.state_size,
            selections={name: decision.selection for name, decision in decisions.items()},
            scores={name: score.double().cpu() for name, score in scores.items()},
            projections={name: d.projection for name, d in decisions.items() if d.projection is not None},
            changes={name: decision.changes for name, decision in decisions.items() if decision.changes},
            per_layer=recipe.per_layer,
            provenance={
                "requested_state_size": state_size,
                "groups": groups,
                "seed": seed,
                "multiple": multiple,
                "calibration": {
                    "text": self.windows.text_name,
                    "text_sha256": self.windows.text_fingerprint,
                    "tokens_sha256": self.windows.fingerprint,
                    "windows": len(self.windows),
                    "window_length": self.windows.length,
                    "seed": self.windows.seed,
                },
            },
        )


@dataclasses.dataclass
class _Run:
    """One plan in the making."""

    calibration: Calibration
    recipe: Recipe
    groups: Groups
    seed: int
    progress: Progress
    journal: Journal

    def decide(self, sizes: Sequence[int]) -> tuple[dict[str, Decision], dict[str, Tensor]]:
        """Decisions and scores of every mixer, for state sizes given per mixer."""
        known = self.calibration.processes.from_first(lambda: self._before_the_walk(sizes))
        if known and not (self.recipe.repair or self.recipe.refit):
            self._record_known(known)
        else:
            self._front_to_back(sizes, known)
        return self.journal.decisions, self.journal.scores

    def curves(self) -> list[Tensor]:
        """For each mixer of the unpruned model, (n + 1,): its output error by how many channels are left, as a share of
        the energy of the hidden states after it, which is what the next layers' norms divide by.

        Measured at a few sizes, with what the method would keep there, and interpolated between them.
        """
        name = self.recipe.method
        if name not in self.calibration._curves:
            walk = self._walk()
            curves: list[Tensor] = []
            for block, mixer in walk.blocks():
                errors = self._measured_errors(walk, block, mixer, len(curves)) if mixer is not None else None
                walk.advance(block, mixer)
                if errors is not None:
                    energy = torch.linalg.vector_norm(walk.hidden, dim=-1).square().mean()
                    curves.append(errors / energy.item())
                self.progress("budget", walk.index + 1, len(walk))
            self.calibration._curves[name] = curves
        return self.calibration._curves[name]

    def _measured_errors(self, walk: LayerWalk, block: nn.Module, mixer: Mixer, index: int) -> Tensor:
        """Mean squared change of a mixer's output with 0, 1, ..., n channels left, (n + 1,)."""
        n = mixer.layout.state_size
        evidence = dataclasses.replace(self._evidence(walk, block, mixer, index), rough=True)
        score = self._finite_score(evidence, mixer)
        sizes = sorted({max(1, round(share * n)) for share in _MEASURED_SHARES} - {n})
        nothing = Decision(Selection(((),) * mixer.layout.n_groups))
        decisions = [nothing, *(self._choice(evidence, score, size) for size in sizes)]
        errors = [*walk.changes(block, mixer, decisions), 0.0]
        return torch.from_numpy(np.interp(range(n + 1), [0, *sizes, n], errors))

    def _walk(self) -> LayerWalk:
        shared = self.calibration
        first, own = shared.processes.share(shared.windows)
        return LayerWalk(shared.blocks, own, shared.scratch, first)

    def _mixers(self) -> Iterator[tuple[nn.Module, Mixer | None]]:
        """Every block with its weights as they are stored, and its mixer, front to back."""
        blocks = self.calibration.blocks
        config = blocks.model.config
        for index in range(len(blocks.modules)):
            with blocks.opened(index) as block:
                yield block, family_of(config).mixer(block, index)

    def _before_the_walk(self, sizes: Sequence[int]) -> dict[str, tuple[Decision, Tensor]]:
        """What methods that look at the unpruned model decide for all mixers at once; nothing for the others."""
        method = self.recipe.how
        if method.needs not in ("weights", "gradients"):
            return {}
        saliency = self.calibration.saliency(self.progress) if method.needs == "gradients" else {}
        scores: dict[str, Tensor] = {}
        for _, mixer in self._mixers():
            if mixer is not None:
                weight = mixer.in_proj.weight.detach()
                evidence = Evidence(mixer.layout, weight, self.seed + len(scores), None, saliency.get(mixer.name))
                scores[mixer.name] = method.score(evidence)
        if method.scope == "model":
            kept = select_together(list(scores.values()), sizes[0])
        else:
            kept = [select(score, size, self.groups) for score, size in zip(scores.values(), sizes, strict=True)]
        return {
            name: (Decision(selection), score) for (name, score), selection in zip(scores.items(), kept, strict=True)
        }

    def _record_known(self, known: dict[str, tuple[Decision, Tensor]]) -> None:
        """Where nothing is mended, no activations are wanted."""
        for index, (block, mixer) in enumerate(self._mixers()):
            if index >= self.journal.done:
                self.journal.record(block, *((mixer.name, *known[mixer.name]) if mixer else ()))

    def _front_to_back(self, sizes: Sequence[int], known: dict[str, tuple[Decision, Tensor]]) -> None:
        """Each mixer on the activations that the pruned mixers before it leave; as published for GHOST."""
        journal = self.journal
        if journal.done == len(self.calibration.blocks.modules):
            return
        walk = self._walk()
        journal.restore(walk.hidden)
        for block, mixer in walk.blocks(journal.done):
            self.progress("layers", walk.index, len(walk))
            assert walk.original is not None
            if mixer is None:
                walk.advance(block)
                journal.record(walk.original, hidden=walk.hidden)
                continue
            index = len(journal.decisions)
            decision, score = known.get(mixer.name) or self._decision(walk, block, mixer, index, sizes[index])
            targets = walk.outputs(block, mixer) if self.recipe.repair or self.recipe.refit else []
            smaller = walk.apply(block, mixer, decision)
            if targets:
                decision = self._mended(walk, block, smaller, decision, targets)
            walk.advance(block, smaller, decision)
            journal.record(walk.original, mixer.name, decision, score, walk.hidden)
        self.progress("layers", len(walk), len(walk))

    def _decision(
        self, walk: LayerWalk, block: nn.Module, mixer: Mixer, index: int, size: int
    ) -> tuple[Decision, Tensor]:
        """Process 0 decides; the others measure for it what it considers, until it says what it has decided."""
        processes = self.calibration.processes
        evidence = self._evidence(walk, block, mixer, index)

        def measured(decisions: Sequence[Decision]) -> list[float]:
            processes.broadcast(decisions)
            return walk.changes(block, mixer, decisions, processes)

        def decided() -> tuple[Decision, Tensor]:
            score = self._finite_score(evidence, mixer)
            return self._choice(dataclasses.replace(evidence, changes=measured), score, size), score

        if processes.rank:
            while (considered := processes.broadcast()) is not None:
                walk.changes(block, mixer, considered, processes)
            return processes.from_first(decided)
        try:
            decision = decided()
        except GhostError as error:
            processes.broadcast()
            return processes.from_first(partial(_raise, error))
        processes.broadcast()
        return processes.from_first(lambda: decision)

    def _choice(self, evidence: Evidence, score: Tensor, size: int) -> Decision:
        decide = self.recipe.how.decide
        return Decision(select(score, size, self.groups)) if decide is None else decide(evidence, size, self.groups)

    def _finite_score(self, evidence: Evidence, mixer: Mixer) -> Tensor:
        score = self.recipe.how.score(evidence)
        if not torch.isfinite(score).all():
            raise NumericalError(
                f"NaN or Inf in what {mixer.name} adds to its output. The checkpoint is broken or overflows; "
                "evaluate the unpruned model on the same text first."
            )
        return score

    def _evidence(self, walk: LayerWalk, block: nn.Module, mixer: Mixer, index: int) -> Evidence:
        """What the method wants to know of mixer number ``index``."""
        method, shared = self.recipe.how, self.calibration
        evidence: dict[str, Any] = {}
        if method.needs == "gradients":
            evidence["saliency"] = shared.saliency(self.progress)[mixer.name]
        if method.needs == "inputs":
            evidence["input_gram"] = sum(_gram(hidden) for hidden in walk.inputs(block, mixer))
            shared.processes.add(evidence["input_gram"])
        if method.needs == "statistics":
            if index or shared._first_statistics is None:
                evidence["statistics"] = gather_statistics(mixer, walk.streams(block, mixer), shared.processes)
            else:
                evidence["statistics"] = shared._first_statistics
            if not index:
                shared._first_statistics = evidence["statistics"]
        if method.needs == "samples":
            if index or shared._first_samples is None:
                tokens = shared.windows.ids.numel()
                streams = walk.streams(block, mixer)
                own = sample_outputs(mixer, streams, tokens, seed=self.seed + index, first=walk.first_window)
                evidence["samples"] = joined_samples(shared.processes.gather([own]))
            else:
                evidence["samples"] = shared._first_samples
            if not index:
                shared._first_samples = evidence["samples"]
            evidence["changes"] = partial(walk.changes, block, mixer)
        return Evidence(mixer.layout, mixer.in_proj.weight.detach(), self.seed + index, **evidence)

    def _mended(
        self, walk: LayerWalk, block: nn.Module, mixer: Mixer, decision: Decision, targets: list[Tensor]
    ) -> Decision:
        """The decision with the parameters that refit and repair arrive at; they are in the block already."""
        before = {name: value.detach().clone() for name, value in mixer.module.named_parameters()}
        processes = self.calibration.processes
        if self.recipe.refit:
            self._refit(walk, block, mixer, targets)
            walk.forget_streams()
        if self.recipe.repair:
            repair_skip(mixer, walk.pruned_streams(block, mixer, decision), targets, processes)
            streams = walk.pruned_streams(block, mixer, decision)
            repair_output(mixer, streams, targets, processes, walk.first_window)
        changed = {
            name: value.detach().clone()
            for name, value in mixer.module.named_parameters()
            if not torch.equal(value, before[name])
        }
        return dataclasses.replace(decision, projection=mixer.projection, changes={**decision.changes, **changed})

    def _refit(self, walk: LayerWalk, block: nn.Module, mixer: Mixer, targets: list[Tensor]) -> None:
        """Refit a mixer to the first windows of all processes; process 0 does, and tells what came out."""
        processes = self.calibration.processes
        data, tokens = [], walk.first_window * self.calibration.windows.length
        for hidden, target in zip(walk.inputs(block, mixer), targets, strict=True):
            if tokens >= MOST_TOKENS:
                break
            data.append(RefitData.of(mixer, hidden, target))
            tokens += hidden.shape[0] * hidden.shape[1]
        data = processes.gather(data)

        def refitted() -> dict[str, Tensor]:
            refit(mixer, joined(data), self.recipe.refit, self.seed)
            return {name: value.detach() for name, value in mixer.module.named_parameters()}

        found = processes.from_first(refitted)
        if processes.rank:
            with torch.no_grad():
                for name, value in mixer.module.named_parameters():
                    value.copy_(found[name])


def _raise(error: GhostError) -> NoReturn:
    raise error


def smallest_plan(
    model: PreTrainedModel,
    windows: Windows,
    recipe: str | Recipe,
    max_excess_loss: float,
    *,
    multiple: int = DEFAULT_MULTIPLE,
    state_sizes: Sequence[int] | None = None,
    groups: Groups = "equal",
    seed: int = DEFAULT_SEED,
    progress: Progress = silent,
) -> Plan:
    """The plan of the smallest state whose excess loss on held-out windows stays within a bound, found by bisection.

    Every fourth window is held out; the others calibrate.

    Args:
        max_excess_loss: over the dense model's loss, nats per token. multiple: of the sizes that are tried.
        state_sizes: the sizes to try instead, ascending.

    Raises:
        InputError: as `Calibration.plan`; fewer than four windows, or no size below the model's own stays within
            the bound.
    """
    recipe = Recipe.parse(recipe) if isinstance(recipe, str) else recipe
    check_recipe(recipe, model.config.model_type)
    apart = torch.arange(len(windows)) % _HELD_OUT_ONE_IN == 1
    if len(windows) < _HELD_OUT_ONE_IN:
        raise InputError(
            f"There are {len(windows)} calibration windows; a bound on the loss needs at least 4: --windows 4."
        )
    calibration, held_out = Calibration(model, windows.part(~apart)), windows.part(apart)
    dense = evaluate(model, held_out)
    limit = family_of(model.config).layout(model.config).state_size
    sizes = range(multiple, limit, multiple) if state_sizes is None else state_sizes
    low, high, best = -1, len(sizes), None  # places in sizes: low is too small or -1, high is large enough
    while high - low > 1:
        middle = (low + high) // 2
        plan = calibration.plan(recipe, sizes[middle], groups, seed, progress, multiple)
        with pruned(model, plan) as smaller:
            excess = evaluate(smaller, held_out).excess_over(dense).mean
        if excess <= max_excess_loss:
            high, best = middle, plan
        else:
            low = middle
    if best is None:
        among = f"in multiples of {multiple}" if state_sizes is None else f"among {', '.join(map(str, sizes))}"
        raise InputError(
            f"No state size below {limit} {among} keeps the excess loss within {max_excess_loss:g} "
            "nats per token; allow more, or try another method."
        )
    searched = {"max_excess_loss": max_excess_loss, "held_out_windows": len(held_out)}
    return dataclasses.replace(best, provenance={**best.provenance, **searched})


def _gram(hidden: Tensor) -> Tensor:
    rows = hidden.flatten(0, 1)
    return (rows.T @ rows).double()


def _state_sizes(model: PreTrainedModel) -> int:
    return len({mixer.layout.state_size for mixer in mixers_of(model)})


def check_recipe(recipe: Recipe, model_type: str) -> None:
    """Raise InputError unless a family has a model class for what a recipe can result in."""
    if recipe.stock or not family_named(model_type).is_hybrid:
        return
    raise InputError(
        f"{recipe} gives a projected state or a state size per layer, for which {model_type} models have no class; "
        f"expected one of the methods {', '.join(methods_for(model_type))}, without +per-layer."
    )


def check_streamable(recipe: Recipe, model_type: str) -> None:
    """Raise InputError unless a recipe can be carried out with one block in memory at a time."""
    check_recipe(recipe, model_type)
    fault = None
    if recipe.how.needs == "gradients":
        fault = f"{recipe.method} needs gradients through the whole model"
    elif not recipe.stock:
        fault = f"{recipe} gives a projected state or a state size per layer, for which the whole model is converted"
    if fault:
        able = [name for name in stock_method_names() if method_named(name).needs != "gradients"]
        raise InputError(
            f"{fault}, so it can't be streamed. Leave out --stream, or take one of {', '.join(able)}, "
            "without +per-layer."
        )


def methods_for(model_type: str) -> tuple[str, ...]:
    """The methods for which a family has a model class."""
    return stock_method_names() if family_named(model_type).is_hybrid else method_names()


def check_state_size(state_size: int, limit: int) -> None:
    """Raise InputError unless ``state_size`` is a state size that a model with N = ``limit`` can be cut to."""
    if isinstance(state_size, bool) or not isinstance(state_size, int) or not 1 <= state_size <= limit:
        raise InputError(f"The state size is {state_size!r}; expected an integer from 1 to the model's N = {limit}.")
