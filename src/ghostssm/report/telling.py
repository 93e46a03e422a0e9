"""What a page says in words: how a checkpoint came about, the command that repeats it, which engines run it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ghostssm.checkpoint.description import Description
from ghostssm.checkpoint.manifest import Manifest
from ghostssm.engines import Advice, advise
from ghostssm.engines.verdicts import Verdicts
from ghostssm.plan.plan import Plan
from ghostssm.report.page import Table
from ghostssm.units import bytes_text, text_name
from ghostssm.workflows.options import flag, options_of
from ghostssm.workflows.requests import CompareRequest, DistillRequest, PruneRequest, Request

_REQUESTS = {"prune": PruneRequest, "compare": CompareRequest, "distill": DistillRequest}


def command(verb: str, asked: Mapping[str, Any]) -> str:
    """The command line of a request's fields; those that say what the command does anyway are left out."""
    kind, words = _REQUESTS.get(verb, Request), ["ghostssm", verb]
    options = {each.name: each for each in options_of(kind)}
    for name, value in asked.items():
        values = tuple(value) if isinstance(value, list | tuple) else (value,)
        if name in options and options[name].usual_value(asked) in (value, values):
            continue
        if value is True:
            words.append(flag(kind, name))
        elif values and value not in (None, False):
            words += [*([] if name in ("model", "student") else [flag(kind, name)]), *map(str, values)]
    return shlex.join(words)


def repeating_command(plan: Plan, manifest: Manifest | None, **more: Any) -> str:
    """The command that wrote a folder: ``distill`` if that came last, else ``prune``; ``more`` is as there."""
    if manifest is not None and is_distilled(manifest):
        return command("distill", {**(manifest.request or {}), **more, "output": "DIR"})
    return prune_command(plan, manifest, **more)


def is_distilled(manifest: Manifest) -> bool:
    """Whether ``ghostssm distill`` wrote the folder."""
    return manifest.request is not None and "student" in manifest.request


def prune_command(plan: Plan, manifest: Manifest | None, **more: Any) -> str:
    """The command that repeats a run: its request, or what the plan tells of it in older checkpoints.

    Args:
        more: fields of the request that are to be others.
    """
    model = {"model": (None if manifest is None else manifest.base_model) or "MODEL"}
    asked: dict[str, Any] = dict(model)
    made = plan.provenance
    if manifest is not None and manifest.request is not None and not is_distilled(manifest):
        asked |= {**manifest.request, **model}
    elif made is None:
        asked |= {"recipe": plan.method, "state_size": plan.kept_state_size}
    else:
        seen = made.calibration
        asked |= {"recipe": plan.method, "state_size": made.requested_state_size, "groups": made.groups}
        asked |= {"calibration": seen.text, "windows": seen.windows, "window_length": seen.window_length}
        asked |= {"seed": made.seed}
    return command("prune", asked | more | {"output": "DIR"})


def manifest_table(manifest: Manifest) -> Table:
    """What a manifest says, in sentences."""
    base, made = manifest.base_model or "an unknown model", manifest.options
    told = {
        "Base model": base
        + ("" if manifest.base_model_sha256 is None else f", SHA-256 {manifest.base_model_sha256[:12]}")
    }
    told["Method"] = f"{manifest.method}, of ghostssm {manifest.ghostssm}, on {manifest.device or 'an unknown device'}"
    if made is not None:
        seen = made.calibration
        drawn = "" if seen.seed is None else f", drawn with seed {seen.seed}"
        told["Calibrated on"] = (
            f"{seen.windows} windows of {seen.window_length} tokens of {text_name(seen.text)}{drawn}"
        )
        told["Groups of a layer"] = "keep as many channels each" if made.groups == "equal" else made.groups
        if made.search is not None:
            told["Searched"] = f"for the smallest state within {made.search.max_excess_loss:g}: {made.search.text}"
        if made.choice is not None:
            told["Chosen"] = f"within {bytes_text(made.choice.state_bytes)} of state per sequence: {made.choice.text}"
            told["Candidates"] = "; ".join(" ".join(line) for line in made.choice.cells()[1])
    if (on := manifest.measured) is not None:
        told["Measured on"] = f"{on.windows} windows of {on.window_length} tokens of {text_name(on.text)}"
    told["Weights"] = f"{manifest.dtype}, in the {manifest.dialect} dialect"
    if manifest.untied_head:
        told["Head"] = "a weight of its own, which the base model ties to the embeddings"
    if manifest.overflow is not None:
        told["Range"] = manifest.overflow.text
    notes = [] if manifest.left_out is None else [*manifest.left_out.notes]
    told["Left out"] = "; ".join(notes) or "nothing of the base model"
    if manifest.missing:
        told["Missing"] = ", ".join(manifest.missing)
    size = bytes_text(sum(record.bytes for record in manifest.files.values()))
    told["Files"] = f"{len(manifest.files)}, {size}; ghostssm verify DIR compares them with what was written"
    told["Software"] = ", ".join(f"{name} {version}" for name, version in manifest.versions.items() if version)
    return Table("How it was made", (), [[f"{name}:", text] for name, text in told.items()])


def advice_of(described: Description, plan: Plan | None, *, written: bool = False) -> tuple[Advice, ...]:
    """Which engines run a model as it is, or under a plan.

    Args:
        written: whether the description is of files that engines would read as they are.
    """
    layout = described.layout if plan is None else described.layout.with_state_size(max(plan.state_sizes))
    return advise(
        layout,
        described.family,
        dialect=described.dialect if written else None,
        own_class=not described.is_stock if plan is None else plan.needs_own_class,
        tied_head=described.tied_head,
        config=described.config,
    )


def running(advice: Sequence[Advice]) -> str:
    """A phrase that names the engines that run a model at full speed."""
    names = engines_text(entry.engine for entry in advice if entry.level == "runs")
    return f"runs in {names}" if names else "no engine runs it at full speed"


def engines_text(engines: Iterable[str]) -> str:
    """Names of engines in a row; devices of one engine are in brackets."""
    places: dict[str, list[str]] = {}
    for name in engines:
        engine, _, place = name.partition("-")
        places.setdefault(engine, []).append(place)
    return ", ".join(
        f"{engine} ({', '.join(devices)})" if len(devices) > 1 else "-".join([engine, *filter(None, devices)])
        for engine, devices in places.items()
    )


def engine_tables(advice: Mapping[str, Sequence[Advice]]) -> list[Table]:
    """A table of the engines' verdicts, and one of the reasons; engines that share a reason share a row."""
    told = Verdicts.of(advice)
    caption = " ".join(["By what their source accepts; nothing was run for this.", *told.notes])
    verdicts = Table("Engines", ["engine", *advice], told.rows, caption)
    return [verdicts, *[Table("Why", (), told.reasons)] * bool(told.reasons)]
