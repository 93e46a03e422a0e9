"""Prune a model that does not fit into memory: one block at a time, from its files to the output's.

A run that ended before is recognised by what the manifest of its output says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from ghostssm._version import __version__
from ghostssm.calibration.blocks import Blocks
from ghostssm.calibration.processes import Processes
from ghostssm.calibration.scratch import Scratch
from ghostssm.checkpoint.manifest import Manifest
from ghostssm.checkpoint.saving import check_dialect
from ghostssm.checkpoint.source import Source, find_source
from ghostssm.checkpoint.streamed import StreamedCheckpoint, open_blocks
from ghostssm.choices import DEFAULT_SEED, Groups
from ghostssm.errors import GhostError, ProcessError
from ghostssm.evaluation.perplexity import Evaluation, evaluate, measurement_of
from ghostssm.files.held_run import run_folder_of
from ghostssm.ops.state_format import FLOAT32, FLOAT32_STORAGE, StateStorage
from ghostssm.plan.measurement import Measurement
from ghostssm.plan.plan import Plan
from ghostssm.progress import Progress, listening, on_screen
from ghostssm.pruning.recipe import Recipe
from ghostssm.pruning.run import DEFAULT_MULTIPLE, Calibration
from ghostssm.streaming.run_folder import RunFolder
from ghostssm.text.windows import Windows
from ghostssm.units import dtype_name, text_name
from ghostssm.values import Value

Beside = Callable[[Evaluation | None, Evaluation | None, Path], None]
"""What writes into a folder, given the dense and the pruned model's losses, where they were measured."""
_NAMES = frozenset({"recipe", "model", "calibration", "evaluate", "tokenizer"})


@dataclass(frozen=True, repr=False, eq=False)
class StreamedRun(Value):
    """What a streamed run ended in.

    Attributes:
        plan: it names repaired parameters, and has the shapes of projections; their values are in the output only.
        measured: the loss before and after, where windows to measure it on were given.
    """

    plan: Plan
    measured: Measurement | None


def prune_streamed(
    checkpoint: StreamedCheckpoint,
    windows: Windows,
    recipe: str | Recipe,
    state_size: int,
    output: Path | str,
    *,
    groups: Groups = "equal",
    seed: int = DEFAULT_SEED,
    multiple: int = DEFAULT_MULTIPLE,
    overwrite: bool = False,
    resume: bool = False,
    dialect: str = "transformers",
    untie: bool = False,
    state_dtype: str | None = None,
    offload: Path | None = None,
    held_out: Windows | None = None,
    processes: Processes | None = None,
    request: Mapping[str, Any] | None = None,
    beside: Beside | None = None,
    progress: Progress | None = on_screen,
) -> StreamedRun:
    """Prune a streamed checkpoint and write the result; bit by bit what `ghostssm.Calibration`,
    `ghostssm.apply_plan` and `ghostssm.save` give for a loaded one, but for the division into files.

    After every block its decision and weights and the windows' hidden states are on disk, in OUTPUT.run.

    Args:
        checkpoint: of `ghostssm.stream`.
        windows: to calibrate on.
        recipe: a method's name, or what `Recipe` says; one that can be streamed.
        state_size: N', from 1 to the model's state size.
        output: the folder to write.
        groups: how the groups of a layer share the state: ``equal``, the same number of channels in each, or
            ``pooled``, where they compete.
        seed: of everything that is drawn at random.
        multiple: of sizes per layer.
        overwrite: replace an output folder that is not empty.
        resume: go on with what OUTPUT.run holds, if there is such a folder.
        dialect: of the output, as `ghostssm.save` has it.
        untie: store a tied head as a weight of its own, as `ghostssm.save` has it.
        state_dtype: in which the pruned model's state is to be kept, rounded after every token, also where the loss is
            measured; float32 if not given.
        offload: folder for memory-mapped files of all that grows with the windows; memory if not given.
        held_out: windows to measure the loss on, dense and pruned, in float32, for the manifest and the model card.
        processes: that share the windows; all must call this with the same arguments, and see the same files.
        request: all that was asked for, in JSON values: for the manifest, and to resume a run of the same only.
        beside: called in the first process, before the output is put in its place, to write more into it.
        progress: told how far the work is; a terminal or notebook shows it if not given; None for nobody.

    Raises:
        InputError: as `Calibration.plan`; a recipe that can't be streamed, or a dialect that can't hold its result.
        OutputError: the output must not or can't be written, or a run's state is there that this is no part of.
        ModelError: tokenizer, model card or the like can't be written; found before the work.
        IncompleteError: the output is written, but without something that belongs beside the weights; says what.
        ProcessError: another process is gone; what is done can be resumed.
    """
    recipe = Recipe.parse(recipe) if isinstance(recipe, str) else recipe
    recipe.check_streamable()
    check_dialect(dialect, checkpoint.model.config.model_type, not recipe.stock, untie)
    processes = processes or Processes()
    fingerprint = processes.from_first(checkpoint.source.fingerprint)
    asked = request or {
        "recipe": str(recipe),
        "state_size": state_size,
        "groups": groups,
        "seed": seed,
        "multiple": multiple,
        "dialect": dialect,
        "untie": untie,
        "state_dtype": state_dtype,
    }
    identity = {
        **options_of(asked),
        **_fingerprints(checkpoint, windows, fingerprint),
        "measured on": None if held_out is None else held_out.fingerprint,
        "processes": processes.size,
    }
    for shared in (windows, held_out):
        if shared is not None:
            processes.share(shared)  # refused if there are too few
    calibration = Calibration(checkpoint.blocks, windows, Scratch(offload), processes)

    def losses(name: str, source: Callable[[], Source], storage: StateStorage = FLOAT32_STORAGE) -> Evaluation | None:
        if held_out is None:
            return None

        def computed() -> list[float]:
            blocks = open_blocks(source(), torch.float32, checkpoint.blocks.device)
            return _shared_losses(blocks, held_out, processes, Scratch(offload), tell, storage)

        by_window = torch.tensor(run.kept(name, computed), dtype=torch.float64)
        return Evaluation(by_window, held_out.bytes_per_token, held_out.seed is None)

    folder = RunFolder(
        output, identity, resume=resume, overwrite=overwrite, dialect=dialect, untie=untie, processes=processes
    )
    with listening(progress) as tell, folder as run:
        try:
            run.dry_run(checkpoint, windows.ids.numel())
            run.begin(checkpoint.blocks)
            dense = losses("dense", lambda: checkpoint.source)
            plan = calibration.plan(recipe, state_size, groups, seed, tell, multiple, run, state_dtype)
            plan = plan.kept_in(state_dtype)
            run.assemble(plan)
            storage = StateStorage.of(state_dtype or FLOAT32)
            after = losses("pruned", lambda: find_source(str(run.output)), storage)
            measured = measurement_of(held_out, dense, after) if held_out and dense and after else None
            if beside is not None:
                run.add(partial(beside, dense, after))
            run.finish(checkpoint, plan, fingerprint, measured, request)
        except ProcessError as error:
            raise ProcessError(f"{error} {run.how_to_go_on()}") from error
    return StreamedRun(plan, measured)


def _shared_losses(
    blocks: Blocks,
    windows: Windows,
    processes: Processes,
    scratch: Scratch,
    progress: Progress,
    storage: StateStorage,
) -> list[float]:
    """The loss on every window; each process measures its own windows."""
    _, own = processes.share(windows)
    losses: list[float] = evaluate(blocks, own, progress, scratch, storage).losses.tolist()
    return processes.gather(losses)


def options_of(request: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a request without models and texts, which are compared by fingerprint and not by name."""
    options = {name: value for name, value in request.items() if name not in _NAMES}
    return {"method": str(Recipe.parse(request["recipe"])), **options}


def _fingerprints(checkpoint: StreamedCheckpoint, windows: Windows, fingerprint: str) -> dict[str, Any]:
    """What decides the numbers of a run besides its options."""
    return {
        "ghostssm": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": checkpoint.blocks.device.type,
        "dtype": dtype_name(checkpoint.model.dtype),
        "model": fingerprint,
        "text": windows.text_fingerprint,
        "windows": len(windows),
        "window_length": windows.length,
        "tokens": windows.fingerprint,
    }


def may_be_finished(output: Path) -> bool:
    """Whether an output is there and no run is under way that would write it."""
    return Manifest.is_in(output) and not run_folder_of(output).exists()


def finished_run(
    folder: Path, base_fingerprint: str, request: Mapping[str, Any], windows: Windows, held_out: Windows | None
) -> StreamedRun | None:
    """What the run ended in that wrote an output; None if another run wrote it.

    Args:
        base_fingerprint: of the model to prune. request: what is asked for, JSON values.
        windows: to calibrate on. held_out: to measure on, if that is wanted.
    """
    try:
        manifest, plan = Manifest.read(folder), Plan.read(folder, changes=False)
        options = None if manifest.request is None else options_of(manifest.request)
    except (GhostError, KeyError, TypeError):  # not a folder of ours, or a broken one
        return None
    made = manifest.options
    if options is None or made is None or not _covers(manifest.measured, held_out):
        return None
    wanted = options_of(request) | {"text_windows": options.get("text_windows")}  # their number was just compared
    written = (manifest.base_model_sha256, made.calibration.tokens_sha256)
    if written != (base_fingerprint, windows.fingerprint) or options != wanted:
        return None
    return StreamedRun(plan, manifest.measured)


def _covers(measured: Measurement | None, held_out: Windows | None) -> bool:
    """Whether a measurement is the one that is wanted, if one is."""
    if held_out is None:
        return True
    wanted = (text_name(held_out.text_name), len(held_out), held_out.length)
    return measured is not None and wanted == (text_name(measured.text), measured.windows, measured.window_length)
