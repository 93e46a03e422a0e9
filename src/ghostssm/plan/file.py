"""A plan on disk: ``plan.json``, and its tensors in ``plan.tensors``.

The tensors are the method's scores, one float64 tensor (g, n) per mixer; projections; and the parameters that were
changed. A file is checked in full, and all its faults are listed at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from reprlib import repr as short
from typing import Any

import safetensors.torch
from torch import Tensor

from ghostssm.errors import PlanError
from ghostssm.files.outputs import PLAN_FILE
from ghostssm.files.reading import read_json_object
from ghostssm.files.tensors import FLOAT_DTYPES, Entry, read_header, read_tensor

FORMAT = "ghostssm-plan"
VERSION = 2
TENSORS_FILE = "plan.tensors"
"""In the safetensors format, but not by its suffix: vLLM and SGLang take every *.safetensors for a model's weights."""
_LISTED_FAULTS = 20
_MOST_COUNT = 1 << 20


def write_document(folder: Path, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a plan's document and tensors into a folder, which is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {"format": FORMAT, "version": VERSION, **document}
    (folder / PLAN_FILE).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    if tensors:
        kept = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        safetensors.torch.save_file(kept, folder / TENSORS_FILE)


def read_document(file: Path) -> dict[str, Any]:
    """The checked contents of a ``plan.json``, whether or not its tensors are there.

    Raises:
        PlanError: the file is missing or not a plan; lists everything that is wrong with it.
    """
    try:
        document = read_json_object(file, PlanError)
    except FileNotFoundError:
        raise PlanError(f"{file} can't be read: there is no such file.") from None
    _raise_faults(file, _faults(document))
    return document


def _raise_faults(file: Path, faults: list[str]) -> None:
    if faults:
        listed = [f"  - {fault}" for fault in faults[:_LISTED_FAULTS]]
        more = [f"  and {len(faults) - _LISTED_FAULTS} more"] if len(faults) > _LISTED_FAULTS else []
        raise PlanError("\n".join([f"{file} is not a valid plan:", *listed, *more]))


def read_tensors(file: Path, document: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every tensor of a plan; shapes that the document implies are checked."""
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
    changes = {f"change:{name}" for name in document.get("changed", [])}
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
    """Everything in a JSON document that no plan can have."""
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
            faults.append(f"{key} is {short(document.get(key))}, expected an integer from 1 to {_MOST_COUNT}")
    if not isinstance(document.get("provenance"), (dict, type(None))):
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
    projected, changed = document.get("projected", {}), document.get("changed", [])
    if not isinstance(projected, dict):
        faults.append("projected is not an object")
        projected = {}
    elif not all(_is_count(size) for size in projected.values()):
        faults.append(f"projected has a state size that is no integer from 1 to {_MOST_COUNT}")
    elif projected and set(projected) != set(mixers):
        faults.append("projected names some mixers, expected all of those in selections, or none")
    faults += _tier_faults(document.get("tiers", {}), projected)
    if not isinstance(changed, list) or not all(isinstance(name, str) for name in changed):
        faults.append("changed is not a list of parameter names")
    return faults


def _tier_faults(tiers: Any, projected: dict[str, Any]) -> list[str]:
    """What is wrong with the numbers of channels per head and number of bits."""
    if not isinstance(tiers, dict):
        return ["tiers is not an object"]
    if tiers and set(tiers) != set(projected):
        return ["tiers names other mixers than projected, expected the same, or none"]
    return [
        f"tiers[{short(name)}] has {short(heads)}, expected for every head two numbers of channels, of those projected"
        for name, heads in tiers.items()
        if not isinstance(heads, list) or not heads or not all(_is_tier(tier, projected[name]) for tier in heads)
    ]


def _is_tier(tier: Any, size: Any) -> bool:
    numbers = isinstance(tier, list) and len(tier) == 2 and all(type(each) is int and each >= 0 for each in tier)
    return numbers and isinstance(size, int) and sum(tier) <= size


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MOST_COUNT
