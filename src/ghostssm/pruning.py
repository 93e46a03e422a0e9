"""Calibrate and decide: from a model and windows to a plan. The model is left as it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ghostssm.budget import allocate
from ghostssm.calibration import LayerWalk, gate_saliency, gather_statistics
from ghostssm.calibration.blocks import Blocks, blocks_of
from ghostssm.calibration.mending import mended
from ghostssm.calibration.samples import OutputSamples, sample_outputs
from ghostssm.calibration.samples import joined as joined_samples
from ghostssm.calibration.scratch import Scratch
from ghostssm.data.windows import Windows
from ghostssm.errors import GhostError, NumericalError
from ghostssm.families import check_plain, family_of, mixers_of
from ghostssm.feasibility import check_original, check_recipe, check_state_size
from ghostssm.journal import Journal
from ghostssm.methods import Evidence
from ghostssm.methods.selection import Groups, select, select_together
from ghostssm.mixer import Mixer
from ghostssm.plan import Decision, Plan, Selection
from ghostssm.processes import Processes
from ghostssm.progress import Progress, silent
from ghostssm.recipe import Recipe
from ghostssm.surgery import check_storable
from ghostssm.units import text_name

DEFAULT_SEED = 42
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
            scratch: where what grows with the windows is to be; memory if not given.
            processes: that share the windows, which each of them is given in full; recipes must be streamable then.
        """
        self.processes = processes or Processes()
        self.blocks = blocks_of(model)
        self.model, self.windows, self.scratch = self.blocks.model, windows, scratch
        check_plain(self.model)
        projected = any(mixer.projection is not None for mixer in mixers_of(self.model))
        check_original(not projected and _state_sizes(self.model) == 1)
        self._saliency: dict[str, Tensor] | None = None
        self._first_evidence: dict[tuple[str, int], Any] = {}
        self._curves: dict[tuple[str, Groups, int], list[Tensor]] = {}

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
                    "text": text_name(self.windows.text_name),
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
        key = (self.recipe.method, self.groups, self.seed)
        if key not in self.calibration._curves:
            walk = self._walk()
            curves: list[Tensor] = []
            for block, mixer in walk.blocks():
                errors = self._measured_errors(walk, block, mixer, len(curves)) if mixer is not None else None
                walk.advance(block, mixer)
                if errors is not None:
                    energy = torch.linalg.vector_norm(walk.hidden, dim=-1).square().mean()
                    curves.append(errors / energy.item())
                self.progress("budget", walk.index + 1, len(walk))
            self.calibration._curves[key] = curves
        return self.calibration._curves[key]

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
                decision = mended(
                    walk, block, smaller, decision, targets, self.recipe, self.seed, self.calibration.processes
                )
            check_storable(walk.stored_mixer(), decision)  # now, and not after hours, when the model is written
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
            evidence["statistics"] = self._gathered(
                index, lambda: gather_statistics(mixer, walk.streams(block, mixer), shared.processes)
            )
        if method.needs == "samples":
            evidence["samples"] = self._gathered(index, lambda: self._samples(walk, block, mixer, index))
            evidence["changes"] = partial(walk.changes, block, mixer)
        return Evidence(mixer.layout, mixer.in_proj.weight.detach(), self.seed + index, **evidence)

    def _samples(self, walk: LayerWalk, block: nn.Module, mixer: Mixer, index: int) -> OutputSamples:
        tokens = self.calibration.windows.ids.numel()
        streams = walk.streams(block, mixer)
        own = sample_outputs(mixer, streams, tokens, seed=self.seed + index, first=walk.first_window)
        return joined_samples(self.calibration.processes.gather([own]))

    def _gathered(self, index: int, gather: Callable[[], Any]) -> Any:
        """Evidence of mixer number ``index``; of the first, which sees what no plan changes, gathered once."""
        if index:
            return gather()
        known, key = self.calibration._first_evidence, (self.recipe.how.needs, self.seed)
        if key not in known:
            known[key] = gather()
        return known[key]


def _raise(error: GhostError) -> NoReturn:
    raise error


def _gram(hidden: Tensor) -> Tensor:
    rows = hidden.flatten(0, 1)
    return (rows.T @ rows).double()


def _state_sizes(model: PreTrainedModel) -> int:
    return len({mixer.layout.state_size for mixer in mixers_of(model)})
