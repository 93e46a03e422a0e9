"""A plan: what becomes of every mixer's state. A frozen value that is made, saved, read and applied apart.

On disk a plan is ``plan.json`` and its tensors, ``plan.tensors``: the method's scores, one float64 tensor (g, n) per
mixer; projections; and the parameters that were repaired. The reader reports every fault of a file at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from reprlib import repr as short
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ghostssm.errors import PlanError
from ghostssm.files.reading import read_json_object
from ghostssm.files.tensors import FLOAT_DTYPES, Entry, read_header, read_tensor
from ghostssm.models.layout import SSDLayout
from ghostssm.models.mixer import Projection

FORMAT = "ghostssm-plan"
VERSION = 1
PLAN_FILE = "plan.json"
TENSORS_FILE = "plan.tensors"
"""In the safetensors format, but not by its suffix: vLLM and SGLang take every *.safetensors for a model's weights."""
_LISTED_FAULTS = 20
_MOST_COUNT = 2**31 - 1


@dataclass(frozen=True)
class Selection:
    """The decision for one mixer: the state channels that each group keeps, in ascending order."""

    kept: tuple[tuple[int, ...], ...]

    @property
    def width(self) -> int:
        """The largest count over the groups: the state size that this mixer needs.

        At least 1: a mixer that keeps nothing has one channel of zeros, since no model class knows a state of size 0.
        """
        return max(1, *(len(channels) for channels in self.kept))

    def padded(self, width: int) -> tuple[tuple[int, ...], ...]:
        """``kept`` with every group filled up to ``width`` by -1, which stands for a channel of zeros."""
        return tuple(channels + (-1,) * (width - len(channels)) for channels in self.kept)


@dataclass(frozen=True)
class Decision:
    """All that is decided for one mixer.

    Attributes:
        selection: the channels that stay.
        projection: of these channels onto a smaller state, if any.
        changes: new values of the mixer module's parameters, by name, in their shapes after the selection.
    """

    selection: Selection
    projection: Projection | None = None
    changes: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """The state size that this mixer needs."""
        return self.selection.width if self.projection is None else self.projection.B.shape[-1]


@dataclass(frozen=True)
class Plan:
    """Decisions for every mixer of a model.

    Attributes:
        method: the name of the method that decided.
        model_type: the family's model type.
        n_groups, state_size: of the model that the plan is for.
        selections: mixer name to the channels that stay, front to back.
        projections: mixer name to its projection, for every mixer or for none.
        changes: mixer name to new values of its module's parameters, in their shapes after the selection.
        per_layer: keep a state size per layer, rather than pad all layers to the widest.
        scores: mixer name to (g, n) float64, as the method saw them; may be empty.
        provenance: what the plan was made from and with: JSON values only.
    """

    method: str
    model_type: str
    n_groups: int
    state_size: int
    selections: Mapping[str, Selection]
    scores: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    projections: Mapping[str, Projection] = field(default_factory=dict, repr=False)
    changes: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict, repr=False)
    per_layer: bool = False

    @property
    def kept_state_size(self) -> int:
        """The state size of the pruned model: the widest of any mixer. In a stock model narrower ones are padded."""
        return max(self.state_sizes)

    @property
    def state_sizes(self) -> tuple[int, ...]:
        """The state size that each mixer needs, front to back."""
        return tuple(self.decision(name).width for name in self.selections)

    @property
    def needs_own_class(self) -> bool:
        """Whether stock classes can't express the result: projections, or a size of its own in every layer."""
        return bool(self.projections) or (self.per_layer and len(set(self.state_sizes)) > 1)

    @property
    def mean_state_size(self) -> float:
        """The state size of the pruned model, averaged over its mixers."""
        if not self.needs_own_class:
            return self.kept_state_size
        return sum(self.state_sizes) / len(self.state_sizes)

    def decision(self, name: str) -> Decision:
        """All that is decided for one mixer."""
        return Decision(self.selections[name], self.projections.get(name), self.changes.get(name, {}))

    @property
    def kept_channels(self) -> int:
        """Channels kept in all, padding not counted."""
        return sum(len(channels) for selection in self.selections.values() for channels in selection.kept)

    def check_fits(self, layouts: Mapping[str, SSDLayout], model_type: str) -> None:
        """Raise PlanError, naming every difference, unless the plan is for a model with these mixers."""
        faults = []
        if model_type != self.model_type:
            faults.append(f"the plan is for model type {self.model_type!r}, the model's is {model_type!r}")
        if list(layouts) != list(self.selections):
            faults.append(
                f"the plan names {len(self.selections)} mixers, the model has {len(layouts)}"
                if len(layouts) != len(self.selections)
                else "the plan names other mixers than the model has"
            )
        for attribute in ("n_groups", "state_size"):
            found = sorted({getattr(layout, attribute) for layout in layouts.values()})
            if found != [getattr(self, attribute)]:
                faults.append(f"the plan's {attribute} is {getattr(self, attribute)}, the model's is {found}")
        if faults:
            raise PlanError(
                "The plan does not fit this model: " + "; ".join(faults) + ". Prune this model to get its plan."
            )

    def save(self, folder: Path | str, *, changes: bool = True) -> None:
        """Write ``plan.json`` and ``plan.tensors`` into a folder, which is made if it is not there.

        Without ``changes`` the repaired parameters and projections are only named: enough beside a checkpoint, which
        holds them, but such a plan can't be applied.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        document = {
            "format": FORMAT,
            "version": VERSION,
            "method": self.method,
            "model_type": self.model_type,
            "n_groups": self.n_groups,
            "state_size": self.state_size,
            "kept_state_size": self.kept_state_size,
            "per_layer": self.per_layer,
            "projected": {name: projection.B.shape[-1] for name, projection in self.projections.items()},
            "changed": {name: sorted(changed) for name, changed in self.changes.items()},
            "provenance": dict(self.provenance),
            "selections": {name: [list(channels) for channels in s.kept] for name, s in self.selections.items()},
        }
        (folder / PLAN_FILE).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        tensors = {f"scores:{name}": score.to(torch.float64) for name, score in self.scores.items()}
        if changes:
            for name, projection in self.projections.items():
                tensors |= {f"B_projection:{name}": projection.B, f"C_projection:{name}": projection.C}
            for name, changed in self.changes.items():
                tensors |= {f"change:{name}:{parameter}": value for parameter, value in changed.items()}
        if tensors:
            whole = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
            safetensors.torch.save_file(whole, folder / TENSORS_FILE)

    @classmethod
    def read(cls, path: Path | str, *, changes: bool = True) -> Plan:
        """Read a plan from its folder or from its ``plan.json``.

        Without ``changes`` repaired parameters are left out, and projections have shapes but no values (they are on
        the device ``meta``): enough to look at a plan that was written with a checkpoint.

        Raises:
            PlanError: the file is missing or not a plan; lists everything that is wrong with it.
        """
        file = Path(path) / PLAN_FILE if Path(path).is_dir() else Path(path).resolve()
        document = read_description(file)
        tensors = _read_tensors(file.with_name(TENSORS_FILE), document)
        return cls(
            method=document["method"],
            model_type=document["model_type"],
            n_groups=document["n_groups"],
            state_size=document["state_size"],
            selections=selections_of(document),
            scores=_keyed(tensors, "scores:"),
            provenance=document.get("provenance", {}),
            projections={
                name: Projection(*(_named(tensors, f"{part}_projection:{name}", file) for part in "BC"))
                if changes
                else Projection(*torch.empty(2, document["n_groups"], document["state_size"], size, device="meta"))
                for name, size in document.get("projected", {}).items()
            },
            changes={
                name: {parameter: _named(tensors, f"change:{name}:{parameter}", file) for parameter in parameters}
                for name, parameters in document.get("changed", {}).items()
                if changes
            },
            per_layer=document.get("per_layer", False),
        )


def _keyed(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _named(tensors: Mapping[str, Tensor], key: str, file: Path) -> Tensor:
    if key not in tensors:
        raise PlanError(
            f"{file} names {key!r}, which {TENSORS_FILE} beside it does not hold; a plan that was written with a "
            "checkpoint only describes it. Prune again, and keep the plan with Plan.save, to apply it elsewhere."
        )
    return tensors[key]


def read_description(file: Path) -> dict[str, Any]:
    """The checked contents of a ``plan.json``, whether or not its tensors are there.

    Raises:
        PlanError: as `Plan.read` has it.
    """
    try:
        document = read_json_object(file, PlanError)
    except FileNotFoundError:
        raise PlanError(f"{file} can't be read: there is no such file.") from None
    _raise_faults(file, _faults(document))
    return document


def selections_of(document: Mapping[str, Any]) -> dict[str, Selection]:
    """The selections in a checked plan document."""
    return {
        name: Selection(tuple(tuple(channels) for channels in kept)) for name, kept in document["selections"].items()
    }


def _raise_faults(file: Path, faults: list[str]) -> None:
    if faults:
        listed = [f"  - {fault}" for fault in faults[:_LISTED_FAULTS]]
        more = [f"  and {len(faults) - _LISTED_FAULTS} more"] if len(faults) > _LISTED_FAULTS else []
        raise PlanError("\n".join([f"{file} is not a valid plan:", *listed, *more]))


def _read_tensors(file: Path, document: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every tensor of a plan, of the shapes that its document implies as far as it does."""
    if not file.exists() and not file.is_symlink():
        return {}
    header = read_header(file, PlanError)
    _raise_faults(file, _header_faults(header, document))
    tensors = {name: read_tensor(file, name, entry, PlanError) for name, entry in header.items()}
    _raise_faults(file, [f"{name!r} holds NaN or Inf" for name, value in tensors.items() if not value.isfinite().all()])
    return tensors


def _header_faults(header: Mapping[str, Entry], document: Mapping[str, Any]) -> list[str]:
    scores = {f"scores:{name}" for name in document["selections"]}
    maps = {f"{part}_projection:{name}" for name in document.get("projected", {}) for part in "BC"}
    changes = {f"change:{name}:{part}" for name, parts in document.get("changed", {}).items() for part in parts}
    known = scores | maps | changes
    faults = []
    for name, entry in header.items():
        if name not in known:
            faults.append(f"{short(name)} belongs to no mixer that the plan names")
        elif entry.dtype not in FLOAT_DTYPES:
            faults.append(f"{name!r} is stored as {entry.dtype}, expected floating-point numbers")
        elif name in scores and entry.shape != (document["n_groups"], document["state_size"]):
            faults.append(f"{name!r} has shape {entry.shape}, expected n_groups and state_size")
        elif name in maps and len(entry.shape) != 3:
            faults.append(f"{name!r} has shape {entry.shape}, expected three dimensions")
    for name in document.get("projected", {}):
        pair = [header[key].shape for key in (f"B_projection:{name}", f"C_projection:{name}") if key in header]
        if len(set(pair)) > 1:
            faults.append(f"the projections of {name!r} have shapes {pair[0]} and {pair[1]}, expected the same")
    return faults


def _faults(document: dict[str, Any]) -> list[str]:
    """Everything that keeps a JSON document from being a plan."""
    faults = []
    if document.get("format") != FORMAT:
        faults.append(f"format is {short(document.get('format'))}, expected {FORMAT!r}")
    if document.get("version") != VERSION:
        faults.append(f"version is {short(document.get('version'))}, expected {VERSION}")
    for key in ("method", "model_type"):
        if not isinstance(document.get(key), str):
            faults.append(f"{key} is {short(document.get(key))}, expected a string")
    for key in ("n_groups", "state_size"):
        if not _is_count(document.get(key)):
            faults.append(f"{key} is {short(document.get(key))}, expected a positive integer")
    if not isinstance(document.get("provenance", {}), dict):
        faults.append("provenance is not an object")
    selections = document.get("selections")
    if not isinstance(selections, dict) or not selections:
        return [*faults, "selections is missing or empty, expected an object of mixers"]
    faults += _option_faults(document, list(selections))
    for name, kept in selections.items():
        faults += [f"selections[{short(name)}]: {fault}" for fault in _selection_faults(kept, document)]
    if not faults and not any(channels for kept in selections.values() for channels in kept):
        faults.append("selections keep no channel at all")
    return faults


def _selection_faults(kept: Any, document: dict[str, Any]) -> list[str]:
    if not isinstance(kept, list) or not all(isinstance(channels, list) for channels in kept):
        return ["expected a list of lists of channels, one per group"]
    faults = []
    if len(kept) != document.get("n_groups"):
        faults.append(f"{len(kept)} groups, expected {short(document.get('n_groups'))}")
    limit: int = document["state_size"] if _is_count(document.get("state_size")) else 0
    for group, channels in enumerate(kept):
        bad = [c for c in channels if isinstance(c, bool) or not isinstance(c, int) or not 0 <= c < limit]
        if bad:
            faults.append(f"group {group} names channel {short(bad[0])}, expected integers from 0 to {limit - 1}")
        elif any(a >= b for a, b in pairwise(channels)):
            faults.append(f"group {group} is not strictly ascending")
    return faults


def _option_faults(document: dict[str, Any], mixers: list[str]) -> list[str]:
    """What is wrong with the entries that a plan may lack."""
    faults = []
    if not isinstance(document.get("per_layer", False), bool):
        faults.append("per_layer is neither true nor false")
    projected, changed = document.get("projected", {}), document.get("changed", {})
    if not isinstance(projected, dict):
        faults.append("projected is not an object")
    elif not all(_is_count(size) for size in projected.values()):
        faults.append("projected has a state size that is not a positive integer")
    elif projected and set(projected) != set(mixers):
        faults.append("projected names some mixers, expected all of those in selections, or none")
    if not _is_names(changed):
        faults.append("changed is not an object of lists of parameter names")
    elif not set(changed) <= set(mixers):
        faults.append(f"changed names {short(min(set(changed) - set(mixers)))}, which is not in selections")
    return faults


def _is_names(value: Any) -> bool:
    """Whether a value is an object of lists of strings."""
    return isinstance(value, dict) and all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for names in value.values()
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MOST_COUNT
