"""A plan: what happens to every mixer's state. It is a frozen value; it is made and applied elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ghostssm.errors import PlanError
from ghostssm.files.outputs import PLAN_FILE
from ghostssm.models.layout import SSDLayout
from ghostssm.models.mixer import Projection
from ghostssm.ops.state_format import StateFormat, Tiers
from ghostssm.plan import file
from ghostssm.plan.decision import Decision, Selection
from ghostssm.plan.distillation import Distillation, distillations_from_json, state_dtype_of
from ghostssm.plan.provenance import Provenance
from ghostssm.units import sizes_text
from ghostssm.values import Value


@dataclass(frozen=True, repr=False, eq=False)
class Plan(Value):
    """The decisions on every mixer of a model, and the other parameters that change.

    Attributes:
        method: the recipe that decided.
        model_type: the family's model type.
        n_groups: of the model that the plan is for.
        state_size: N of that model.
        decisions: mixer name to its selection and projection, front to back; all are projected or none.
        changes: full parameter name to its new value, in its shape after the selection.
        scores: mixer name to (g, n) float64, as the method saw them; may be empty.
        provenance: what the plan was made from and with; None for one made by hand.
        per_layer: keep a state size per layer, rather than pad all layers to the widest.
        distillations: trainings of the whole pruned model, whose results are among the changes.
    """

    method: str
    model_type: str
    n_groups: int
    state_size: int
    decisions: Mapping[str, Decision]
    changes: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    scores: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    provenance: Provenance | None = None
    per_layer: bool = False
    distillations: tuple[Distillation, ...] = ()

    def __repr__(self) -> str:
        dtype = "" if self.state_dtype is None else f" in {self.state_dtype}"
        sizes = f"state size {self.state_size} to {sizes_text(self.state_sizes)}{dtype}"
        return f"<Plan: {self.method}, {len(self.decisions)} mixers of {self.model_type}, {sizes}>"

    @property
    def selections(self) -> dict[str, Selection]:
        """The channels that stay, by mixer name, front to back."""
        return {name: decision.selection for name, decision in self.decisions.items()}

    @property
    def projections(self) -> dict[str, Projection]:
        """The projections by mixer name, of every mixer or of none."""
        return {name: d.projection for name, d in self.decisions.items() if d.projection is not None}

    @property
    def tiers(self) -> dict[str, Tiers]:
        """Mixer name to how many channels each head keeps in how many bits, for every mixer or for none."""
        return {name: d.tiers for name, d in self.decisions.items() if d.tiers is not None}

    @property
    def is_projected(self) -> bool:
        return any(decision.projection is not None for decision in self.decisions.values())

    @property
    def widths(self) -> tuple[int, ...]:
        """The state size that each mixer needs, front to back."""
        return tuple(decision.width for decision in self.decisions.values())

    @property
    def needs_own_class(self) -> bool:
        """Whether stock classes can't express the result: projections, or a size of its own in every layer."""
        return self.is_projected or (self.per_layer and len(set(self.widths)) > 1)

    @property
    def state_sizes(self) -> tuple[int, ...]:
        """The state size of every mixer of the pruned model, front to back.

        In a stock model all mixers have that of the widest; narrower ones are padded with channels of zeros.
        """
        return self.widths if self.needs_own_class else (max(self.widths),) * len(self.widths)

    @property
    def kept_state_size(self) -> int:
        """The state size of the widest mixer of the pruned model."""
        return max(self.widths)

    @property
    def state_dtype(self) -> str | None:
        """The dtype that the state is to be kept in: trained for, chosen or asked for; None if nothing says so."""
        decided = None if self.provenance is None else self.provenance.state_dtype
        return state_dtype_of(self.distillations) or decided

    def kept_in(self, state_dtype: str | None) -> Plan:
        """The same plan for a state that is to be kept in a dtype; for None this plan."""
        return self if state_dtype is None else self.with_provenance(asked_state_dtype=state_dtype)

    def with_provenance(self, **known: Any) -> Plan:
        """The same plan with other values of some fields of its provenance."""
        assert self.provenance is not None
        return replace(self, provenance=replace(self.provenance, **known))

    def state_bytes(self, layout: SSDLayout, state_dtype: str) -> int:
        """Of one sequence over all layers, scales included.

        Args:
            layout: of the model that the plan is for.
            state_dtype: by name; ``tiers`` for a plan that has them only.
        """
        form, tiers = StateFormat.of(state_dtype), tuple(self.tiers.values())
        return form.model_bytes(layout.intermediate_size, self.state_sizes, tiers)

    @property
    def mean_state_size(self) -> float:
        """The state size of the pruned model, averaged over its mixers."""
        return sum(self.state_sizes) / len(self.state_sizes)

    @property
    def kept_channels(self) -> int:
        """Channels kept in all, padding not counted."""
        return sum(len(channels) for selection in self.selections.values() for channels in selection.kept)

    def kept(self, name: str) -> Tensor:
        """(g, n), whether a mixer's channels stay; of a projection, its directions."""
        decision, kept = self.decisions[name], torch.zeros(self.n_groups, self.state_size, dtype=torch.bool)
        if decision.projection is not None:
            kept[:, : decision.width] = True
            return kept
        for group, channels in enumerate(decision.selection.kept):
            kept[group, list(channels)] = True
        return kept

    @property
    def kept_share(self) -> float:
        """Of all channels of all layers, the share that stays; of projections, the share of directions."""
        return sum(self.kept(name).double().mean().item() for name in self.decisions) / len(self.decisions)

    @property
    def has_scores(self) -> bool:
        """Whether every mixer has a score for each of its channels."""
        shape = (self.n_groups, self.state_size)
        return all(name in self.scores and self.scores[name].shape == shape for name in self.decisions)

    def check_fits(self, layouts: Mapping[str, SSDLayout], model_type: str) -> None:
        """Raise PlanError, naming every difference, unless the plan is for a model with these mixers."""
        faults = []
        if model_type != self.model_type:
            faults.append(f"the plan is for model type {self.model_type!r}, the model's is {model_type!r}")
        if list(layouts) != list(self.decisions):
            faults.append(
                f"the plan names {len(self.decisions)} mixers, the model has {len(layouts)}"
                if len(layouts) != len(self.decisions)
                else "the plan names other mixers than the model has"
            )
        for attribute in ("n_groups", "state_size"):
            sizes = sorted({getattr(layout, attribute) for layout in layouts.values()})
            if sizes != [getattr(self, attribute)]:
                faults.append(f"the plan's {attribute} is {getattr(self, attribute)}, the model's is {sizes}")
        if faults:
            raise PlanError(
                "The plan does not fit this model: " + "; ".join(faults) + ". Prune this model to get its plan."
            )

    def save(self, folder: Path | str, *, changes: bool = True) -> None:
        """Write ``plan.json`` and ``plan.tensors`` into a folder.

        Args:
            folder: is made if it is not there.
            changes: False only names the changed parameters and projections: enough beside a checkpoint, which holds
                them, but such a plan can't be applied.
        """
        document = {
            "method": self.method,
            "model_type": self.model_type,
            "n_groups": self.n_groups,
            "state_size": self.state_size,
            "kept_state_size": self.kept_state_size,
            "per_layer": self.per_layer,
            "projected": {name: projection.B.shape[-1] for name, projection in self.projections.items()},
            "tiers": {name: [list(tier) for tier in tiers] for name, tiers in self.tiers.items()},
            "changed": sorted(self.changes),
            "provenance": None if self.provenance is None else self.provenance.as_json(),
            "distillations": [each.as_json() for each in self.distillations],
            "selections": {name: [list(channels) for channels in s.kept] for name, s in self.selections.items()},
        }
        tensors = {f"scores:{name}": score.to(torch.float64) for name, score in self.scores.items()}
        if changes:
            for name, projection in self.projections.items():
                tensors |= {f"B_projection:{name}": projection.B, f"C_projection:{name}": projection.C}
            tensors |= {f"change:{name}": value for name, value in self.changes.items()}
        file.write_document(Path(folder), document, tensors)

    @classmethod
    def read(cls, path: Path | str, *, changes: bool = True) -> Plan:
        """Read a plan from its folder or from its ``plan.json``.

        Args:
            path: the folder, or the ``plan.json`` in it.
            changes: False leaves out changed parameters, and gives projections shapes but no values (they are on the
                device ``meta``): enough to look at a plan that was written with a checkpoint.

        Raises:
            PlanError: the file is missing or not a plan; lists everything that is wrong with it.
        """
        place = Path(path) / PLAN_FILE if Path(path).is_dir() else Path(path).resolve()
        document = file.read_document(place)
        tensors = file.read_tensors(place.with_name(file.TENSORS_FILE), document)

        def projection(name: str) -> Projection | None:
            size = document.get("projected", {}).get(name)
            if size is None:
                return None
            if not changes:
                return Projection(*torch.empty(2, document["n_groups"], document["state_size"], size, device="meta"))
            return Projection(*(_named(tensors, f"{part}_projection:{name}", place) for part in "BC"))

        tiers: dict[str, Tiers] = {name: tuple(map(tuple, heads)) for name, heads in document.get("tiers", {}).items()}
        plan = cls(
            method=document["method"],
            model_type=document["model_type"],
            n_groups=document["n_groups"],
            state_size=document["state_size"],
            decisions={
                name: Decision(Selection(tuple(map(tuple, kept))), projection(name), tiers=tiers.get(name))
                for name, kept in document["selections"].items()
            },
            changes={name: _named(tensors, f"change:{name}", place) for name in document.get("changed", []) if changes},
            scores={key.removeprefix("scores:"): value for key, value in tensors.items() if key.startswith("scores:")},
            provenance=Provenance.from_json(document.get("provenance")),
            per_layer=document.get("per_layer", False),
            distillations=distillations_from_json(document.get("distillations")),
        )
        if document.get("kept_state_size", plan.kept_state_size) != plan.kept_state_size:
            raise PlanError(
                f"{place}: kept_state_size is {document['kept_state_size']!r}, its selections give "
                f"{plan.kept_state_size}."
            )
        return plan


def _named(tensors: Mapping[str, Tensor], key: str, place: Path) -> Tensor:
    if key not in tensors:
        raise PlanError(
            f"{place} names {key!r}, which {file.TENSORS_FILE} beside it does not hold; a plan that was written with a "
            "checkpoint only describes it. Prune again, and keep the plan with Plan.save, to apply it elsewhere."
        )
    return tensors[key]
