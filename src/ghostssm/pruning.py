"""Calibrate and decide: from a model and windows to a plan. The model is left as it was."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from ghostssm.calibration import LayerStatistics, LayerWalk, gate_saliency, gather_statistics
from ghostssm.data.windows import Windows
from ghostssm.errors import InputError
from ghostssm.families import family_of, mixers_of
from ghostssm.methods import Evidence, Method, method_named
from ghostssm.methods.selection import Groups, select, select_together
from ghostssm.mixer import Mixer
from ghostssm.plan import Plan, Selection
from ghostssm.progress import Progress, silent

DEFAULT_SEED = 42


class Calibration:
    """One model and its calibration windows, and the evidence that several plans can share.

    What does not depend on a plan is gathered once: gate gradients, and the statistics of the first mixer, whose inputs
    no decision changes. Deeper statistics are gathered anew for each plan, on the activations that the plan's own
    pruning leaves.
    """

    def __init__(self, model: PreTrainedModel, windows: Windows):
        self.model, self.windows = model, windows
        self._saliency: dict[str, Tensor] | None = None
        self._first_statistics: LayerStatistics | None = None

    def saliency(self, progress: Progress) -> dict[str, Tensor]:
        """Gate saliency of every mixer, (g, n) each."""
        if self._saliency is None:
            self._saliency = gate_saliency(self.model, self.windows.ids, progress)
        return self._saliency

    def plan(
        self,
        method: str,
        state_size: int,
        groups: Groups = "equal",
        seed: int = DEFAULT_SEED,
        progress: Progress = silent,
    ) -> Plan:
        """Decide which state channels every mixer keeps.

        Args:
            method: a registered method's name.
            state_size: N', from 1 to the model's state size.
            groups: how the groups of a layer share it.
            seed: for methods that draw at random.

        Raises:
            InputError: a state size out of range, or no such method.
            NumericalError: activations that are not finite.
        """
        chosen = method_named(method)
        layout = family_of(self.model.config).layout(self.model.config)
        check_state_size(state_size, layout.state_size)
        if chosen.needs == "statistics":
            selections, scores = self._front_to_back(chosen, state_size, groups, progress)
        else:
            selections, scores = self._at_once(chosen, state_size, groups, seed, progress)
        return Plan(
            method=method,
            model_type=self.model.config.model_type,
            n_groups=layout.n_groups,
            state_size=layout.state_size,
            selections=selections,
            scores={name: score.double().cpu() for name, score in scores.items()},
            provenance={
                "requested_state_size": state_size,
                "groups": groups,
                "seed": seed,
                "calibration": {
                    "text": self.windows.text_name,
                    "text_sha256": self.windows.text_fingerprint,
                    "windows": len(self.windows),
                    "window_length": self.windows.length,
                    "seed": self.windows.seed,
                },
            },
        )

    def _at_once(
        self, method: Method, state_size: int, groups: Groups, seed: int, progress: Progress
    ) -> tuple[dict[str, Selection], dict[str, Tensor]]:
        """All mixers on the unpruned model."""
        mixers = mixers_of(self.model)
        saliency = self.saliency(progress) if method.needs == "gradients" else {}
        scores = {
            mixer.name: method.score(
                Evidence(mixer.layout, mixer.in_proj.weight.detach(), seed + index, None, saliency.get(mixer.name))
            )
            for index, mixer in enumerate(mixers)
        }
        if method.scope == "model":
            kept = select_together(list(scores.values()), state_size)
        else:
            kept = [select(score, state_size, groups) for score in scores.values()]
        return dict(zip(scores, kept, strict=True)), scores

    def _front_to_back(
        self, method: Method, state_size: int, groups: Groups, progress: Progress
    ) -> tuple[dict[str, Selection], dict[str, Tensor]]:
        """Each mixer on the activations that the pruned mixers before it leave; as published for GHOST."""
        walk = LayerWalk(self.model, self.windows)
        selections: dict[str, Selection] = {}
        scores: dict[str, Tensor] = {}
        for index, (block, mixer) in enumerate(walk.blocks()):
            progress("layers", index, len(walk))
            if mixer is None:
                walk.advance(block)
            else:
                statistics = self._statistics(walk, block, mixer, first=not selections)
                weight = mixer.in_proj.weight.detach()
                scores[mixer.name] = method.score(Evidence(mixer.layout, weight, 0, statistics))
                selection = select(scores[mixer.name], state_size, groups)
                selections[mixer.name] = selection
                walk.advance(block, mixer, selection)
        progress("layers", len(walk), len(walk))
        return selections, scores

    def _statistics(self, walk: LayerWalk, block: nn.Module, mixer: Mixer, first: bool) -> LayerStatistics:
        if first and self._first_statistics is not None:
            return self._first_statistics
        statistics = gather_statistics(mixer, walk.streams(block, mixer))
        if first:
            self._first_statistics = statistics
        return statistics


def check_state_size(state_size: int, limit: int) -> None:
    """Raise InputError unless ``state_size`` is a state size that a model with N = ``limit`` can be cut to."""
    if isinstance(state_size, bool) or not isinstance(state_size, int) or not 1 <= state_size <= limit:
        raise InputError(f"The state size is {state_size!r}; expected an integer from 1 to the model's N = {limit}.")
