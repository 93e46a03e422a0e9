"""Check a checkpoint that ghostssm wrote: files, shapes, numbers, logits and plan, against what its manifest says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short

import torch

from ghostssm.checkpoint.loading import Checkpoint, checked_tensors, load, model_config
from ghostssm.checkpoint.manifest import MANIFEST_FILE, RECORD_FILE, Manifest, file_hash
from ghostssm.checkpoint.place import written_folder
from ghostssm.checkpoint.probe import Probe, probe_in
from ghostssm.checkpoint.source import find_source
from ghostssm.errors import GhostError, ModelError, NumericalError
from ghostssm.files.outputs import PAGE_FILE, PLAN_FILE
from ghostssm.files.reading import is_plain_name
from ghostssm.models.families import mixers_of
from ghostssm.models.mixer import Mixer
from ghostssm.plan.decision import Selection
from ghostssm.plan.plan import Plan
from ghostssm.units import listed
from ghostssm.values import Value

_CARD = "README.md"
# Loaders read these: with one more of them it is another checkpoint.
_LOADED_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".model", ".jinja", ".py", ".h5", ".msgpack"})
_LOADED_NAMES = frozenset(
    {
        *("config.json", "generation_config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
        *("chat_template.json", "model.safetensors.index.json", "pytorch_model.bin.index.json"),
        *("plan.json",),
    }
)
_LISTED = 5


@dataclass(frozen=True)
class Check:
    """One thing that was checked, and what was found."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True, repr=False)
class Verification(Value):
    """What was checked of a folder.

    Attributes:
        folder: that was checked.
        checks: each with its name, whether it passed, and what was found.
        notes: what is worth knowing but no fault.
    """

    folder: str
    checks: tuple[Check, ...]
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


def verify(folder: str | Path) -> Verification:
    """Check a checkpoint that ghostssm wrote.

    Files: those that the manifest lists are there with their SHA-256, and none beside them that a loader would read.
    Shapes: names and shapes of all tensors are those that the config implies. Weights: finite. Logits: those of the
    recorded probe, within its tolerance. Plan: group count, mixers and state sizes are those of the weights, and
    channels that pad a group are zero.

    A model card that was changed and files that no loader reads are notes.

    Args:
        folder: that ghostssm wrote.

    Raises:
        ModelError: there is no such folder, or no manifest in it.
    """
    path = written_folder(folder)
    if not (path / MANIFEST_FILE).exists():
        Manifest.read(path)
    notes: list[str] = []
    checks: list[Check] = []
    manifest = Manifest()

    def check(name: str, found_by: Callable[[], str]) -> None:
        try:
            checks.append(Check(name, True, found_by()))
        except GhostError as error:
            checks.append(Check(name, False, str(error)))

    def read() -> str:
        nonlocal manifest
        manifest = Manifest.read(path)
        return f"written by ghostssm {manifest.ghostssm}"

    check("manifest", read)
    check("files", lambda: _check_files(path, manifest, notes))
    loaded: list[Checkpoint] = []
    check("shapes", lambda: _check_shapes(path))
    if checks[-1].passed:
        check("weights", lambda: _check_weights(path, loaded))
    if loaded:
        check("logits", lambda: _check_logits(loaded[0], manifest.probe))
        notes += [] if manifest.overflow is None else [manifest.overflow.text]
        if (path / PLAN_FILE).exists() or not manifest.distillations:
            check("plan", lambda: _check_plan(path, loaded[0]))
        else:
            notes.append("there is no plan: the state was cut by others, and ghostssm distilled the model")
    return Verification(str(folder), tuple(checks), tuple(notes))


def _check_files(folder: Path, manifest: Manifest, notes: list[str]) -> str:
    recorded = manifest.files
    if not recorded:
        raise ModelError("the manifest lists no files")
    faults = []
    for name, record in recorded.items():
        path = folder / name
        if not name or not all(map(is_plain_name, name.split("/"))) or ".." in name.split("/"):
            faults.append(f"{short(name)} in the manifest is no file of this folder")
        elif not path.is_file():
            faults.append(f"{name} is missing")
        elif file_hash(path) != record.sha256:
            if name == _CARD:
                notes.append(f"{name} was changed")
            else:
                faults.append(f"{name} was changed")
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or name == MANIFEST_FILE or name in recorded or name in (PAGE_FILE, RECORD_FILE):
            continue
        if path.suffix in _LOADED_SUFFIXES or path.name in _LOADED_NAMES:
            faults.append(f"{name} was added, and loaders read it")
        else:
            notes.append(f"{name} was added")
    _raise(faults)
    return f"{len(recorded)} files as written"


def _check_shapes(folder: Path) -> str:
    source = find_source(str(folder))
    return f"{len(checked_tensors(source, model_config(source)))} tensors as the config implies"


def _check_weights(folder: Path, loaded: list[Checkpoint]) -> str:
    checkpoint = load(str(folder))
    loaded.append(checkpoint)
    tensors = set(checkpoint.model.state_dict(keep_vars=True).values())  # a tied head is the embeddings' own tensor
    return f"{sum(tensor.numel() for tensor in tensors):,} numbers, all finite"


def _check_logits(checkpoint: Checkpoint, probe: Probe | None) -> str:
    if probe is None:
        raise ModelError("the manifest has no probe that can be read")
    tokens, size = probe.token_ids, checkpoint.model.config.vocab_size
    if not 0 < len(tokens) <= 1024 or not all(0 <= token < size for token in tokens):
        raise ModelError("the probe's tokens are not of this vocabulary")
    again = _computed_again(checkpoint, tokens, getattr(torch, probe.dtype))
    difference = None if again is None else probe.difference(again)
    if difference is None:
        raise NumericalError(f"NaN or Inf in the logits, computed in {probe.dtype}")
    if not difference <= probe.tolerance:
        raise ModelError(
            f"they differ by {difference:.2g} standard deviations, computed in {probe.dtype}, expected at most "
            f"{probe.tolerance:g}"
        )
    return (
        f"within {difference:.2g} standard deviations of the probe's, computed in {probe.dtype}, allowed "
        f"{probe.tolerance:g}"
    )


def _computed_again(checkpoint: Checkpoint, tokens: Sequence[int], dtype: torch.dtype) -> Probe | None:
    """The probe in the dtype that it was taken in; None if it is not finite."""
    if dtype == checkpoint.model.dtype:
        return Probe.of(checkpoint.model, tokens)
    return probe_in(checkpoint.source, tokens, dtype)


def _check_plan(folder: Path, checkpoint: Checkpoint) -> str:
    plan, mixers = Plan.read(folder, changes=False), mixers_of(checkpoint.model)
    names = [mixer.name for mixer in mixers]
    if names != list(plan.decisions):
        raise ModelError(f"the plan is for {len(plan.decisions)} mixers, the model has {len(names)} or other ones")
    widths, sizes = [selection.width for selection in plan.selections.values()], plan.state_sizes
    if not plan.needs_own_class:
        widths = list(sizes)
    faults = []
    for mixer, width, size in zip(mixers, widths, sizes, strict=True):
        # An exported copy may be padded further, for the sake of an engine.
        padded = mixer.projection is None and not plan.is_projected and mixer.state_size >= width
        if mixer.layout.n_groups != plan.n_groups:
            faults.append(f"{mixer.name} has {mixer.layout.n_groups} groups, the plan {plan.n_groups}")
        elif not padded and (mixer.layout.state_size, mixer.state_size) != (width, size):
            faults.append(f"{mixer.name} has state size {mixer.state_size}, the plan {size}")
        elif not _padding_is_zero(mixer, plan.selections[mixer.name]):
            faults.append(f"{mixer.name} has weights in channels that the plan does not keep")
    _raise(faults)
    stored = tuple(mixer.state_size for mixer in mixers)
    padding = "" if stored == sizes else f", stored as {_sizes_text(stored)}"
    return f"{len(mixers)} mixers, state size {plan.state_size} to {_sizes_text(sizes)}{padding}"


def _sizes_text(sizes: Iterable[int]) -> str:
    return "/".join(map(str, sorted(set(sizes))))


def _padding_is_zero(mixer: Mixer, selection: Selection) -> bool:
    """Whether the channels that fill a narrower group up write nothing into the state."""
    layout = mixer.layout
    for part, places in (
        (mixer.in_proj, (layout.in_proj_B, layout.in_proj_C)),
        (mixer.conv1d, (layout.conv_B, layout.conv_C)),
    ):
        for tensor in (part.weight, part.bias):
            for place in places:
                if tensor is None:
                    continue
                by_group = tensor[place].unflatten(0, (layout.n_groups, layout.state_size))
                if any(by_group[group, len(kept) :].any() for group, kept in enumerate(selection.kept)):
                    return False
    return True


def _raise(faults: list[str]) -> None:
    if faults:
        raise ModelError(listed(faults, _LISTED, "; "))
