"""The state of a streamed run on disk: every block that is done, so that a run that was ended can go on.

A run that writes OUTPUT keeps in OUTPUT.run

    run.json            what the run is: model, text, options, versions
    outside/00000.*     tensors outside the blocks, one file each
    carried/00000.*     tensors that no block loads, and that go into the output as they are
    blocks/00007.*      the pruned tensors of block 7
    records/00007.json  its decision and scores; written last, so that it says that block 7 is done
    curves/00007.json   what a smaller state costs block 7, where the sizes are per layer: found by a walk of its own
    dense.json          the dense model's loss on every window that is measured on, and pruned.json the pruned one's
    hidden/             the hidden states that reach the block after the last record, records-00008-0.bin, or after the
                        last curve, curves-00008-0.bin; of process 0's windows
    shards/             of a dialect with one file of weights, what that is written from
    output/             the folder that becomes OUTPUT

Every file appears whole or not at all. Numbers in JSON are written so that they are read back bit by bit.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ghostssm.calibration.processes import Processes
from ghostssm.checkpoint.carried import carried_pieces
from ghostssm.checkpoint.dialects import dialect_named
from ghostssm.checkpoint.dry_run import dry_run_streamed
from ghostssm.checkpoint.loading import Checkpoint, check_writable
from ghostssm.checkpoint.naming import has_tied_head
from ghostssm.checkpoint.saving import untied_head, write_beside_weights, write_config, write_model
from ghostssm.checkpoint.side_files import SideFiles
from ghostssm.checkpoint.streamed import StreamedBlocks, StreamedCheckpoint
from ghostssm.errors import NumericalError, OutputError
from ghostssm.files import durable
from ghostssm.files.durable import put_in_place
from ghostssm.files.held_run import RUN_FILE, HeldRun, run_folder_of
from ghostssm.files.outputs import OutputFolder, destination
from ghostssm.models.families import family_of
from ghostssm.models.families.own import write_code
from ghostssm.models.mixer import Projection
from ghostssm.models.transformers_private import tied_weights
from ghostssm.plan.decision import Decision, Selection
from ghostssm.plan.measurement import Measurement
from ghostssm.plan.plan import Plan
from ghostssm.plan.surgery import carry_out, pruned
from ghostssm.pruning.journal import Journal
from ghostssm.streaming.assembling import gather_shards, mapped_model
from ghostssm.streaming.findings import FindingsOnDisk

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RunFolder(HeldRun, Journal):
    """The decisions and weights of a streamed run.

        with RunFolder(output, identity, resume=False) as run:
            run.dry_run(checkpoint, windows.ids.numel())
            run.begin(blocks)
            plan = calibration.plan(..., journal=run)
            run.assemble(plan)
            run.finish(checkpoint, plan, fingerprint)

    Attributes:
        folder: where the run's state is.
        output: the folder in it that `assemble` makes.
        path: the folder that the run is to write.
    """

    def __init__(
        self,
        output: Path | str,
        identity: Mapping[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
        dialect: str = "transformers",
        untie: bool = False,
        processes: Processes | None = None,
    ):
        """
        Args:
            identity: what decides the result, by names that users know: JSON values.
            dialect, untie: of the output, as `ghostssm.save` has them.
            processes: that share the run and see the same folder; the first writes all but the others' hidden states.

        Raises:
            OutputError: a run's state is there and ``resume`` is false, or it is of a run with another identity, or
                another process works on it; or the output must not be written.
        """
        self._processes = processes or Processes()
        HeldRun.__init__(self, output, identity, self._processes.from_first)
        Journal.__init__(self)
        self.path = destination(output)
        self.output = self.folder / "output"
        self._dialect, self._untie = dialect, untie
        self._blocks: StreamedBlocks | None = None
        self._records = FindingsOnDisk(self.folder, "records", self._processes, self.told_faults)
        self.curves: FindingsOnDisk = FindingsOnDisk(self.folder, "curves", self._processes, self.told_faults)
        self._processes.from_first(lambda: check_run_folder(self.path, resume=resume, overwrite=overwrite))

    def has_work(self) -> bool:
        return self.done > 0

    def dry_run(self, checkpoint: StreamedCheckpoint, tokens: int) -> None:
        """Try what `finish` may stumble over, and whether the disk has room for the run.

        Args:
            tokens: in all windows, whose hidden states the run keeps.

        Raises:
            ModelError, OutputError: as `ghostssm.checkpoint.dry_run`.
        """

        def tried() -> None:
            with self.told_faults():
                if not is_in_place(self.folder):
                    dry_run_streamed(self.folder, self.path, checkpoint, tokens, self._dialect, self._untie)

        self._processes.from_first(tried)

    def begin(self, blocks: StreamedBlocks) -> None:
        """Read what earlier runs did, and write what no decision changes."""
        self._blocks = blocks
        self._processes.from_first(self._write_outside)
        self.curves.read(len(blocks.modules))
        self._records.read(len(blocks.modules), self._take_over)

    def _write_outside(self) -> None:
        with self.told_faults():
            for part in ("outside", "blocks", "carried"):
                (self.folder / part).mkdir(exist_ok=True)
            for number, (name, source) in enumerate(self._outside().items()):
                shard = self._shard("outside", number)
                if not shard.exists():
                    durable.write_tensors(shard, {name: self._streamed.tensor_outside(source)})

    def _outside(self) -> dict[str, str]:
        """The tensors outside the blocks that the output has, each with the one whose values it gets."""
        model = self._streamed.model
        names = {name: name for name in self._streamed.outside()}
        return names | tied_weights(model) if self._untie and has_tied_head(model) else names

    def decisions(self) -> dict[str, tuple[Decision, Tensor]]:
        """As `Journal.decisions`, made of the records, which hold Python's numbers and no tensors."""
        # A small tensor that is kept for every block would lie in memory between the block's large ones. What these
        # leave would then be too small for the next block's, and the process would grow with every block.
        return dict(_read_record(record) for record in self._records.entries if record is not None)

    def _take_over(self, record: dict[str, Any] | None) -> None:
        """Count a block that is done; its record is None if it has no mixer. Raises if the record can't be read."""
        if record is not None:
            _read_record(record)
            self.decided += 1
        self.done += 1

    def restore(self, hidden: Tensor) -> None:
        self._records.restore(hidden)

    def record(
        self,
        block: nn.Module,
        name: str | None = None,
        decision: Decision | None = None,
        score: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> None:
        record: dict[str, Any] | None = None
        with self.told_faults():
            if name is not None and decision is not None and score is not None:
                self._apply(block, decision)
                record = {
                    "name": name,
                    "kept": [list(channels) for channels in decision.selection.kept],
                    "projected": None if decision.projection is None else decision.width,
                    "changed": list(decision.changes),
                    "scores": score.double().tolist(),
                }
            if self._processes.rank == 0:
                tensors = self._streamed.tensors_of(self.done, block)
                check_writable(tensors)
                durable.write_tensors(self._shard("blocks", self.done), tensors)
        self._records.add(record, hidden)
        self._take_over(record)

    def kept(self, name: str, compute: Callable[[], list[float]]) -> list[float]:
        """Numbers that the run's folder keeps under a name; computed, by all processes, if it does not have them."""
        file = self.folder / f"{name}.json"

        def read() -> list[float] | None:
            return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

        if (numbers := self._processes.from_first(read)) is None:
            numbers = compute()
            with self.told_faults():
                self._processes.from_first(lambda: durable.write_json(file, numbers))
        return numbers

    def add(self, write: Callable[[Path], None]) -> None:
        """Have something written into the assembled output, unless that is in its place already."""
        self._processes.from_first(lambda: None if is_in_place(self.folder) else write(self.output))

    def assemble(self, plan: Plan) -> None:
        """Put the pruned model together in ``output``."""
        self._processes.from_first(lambda: self._assemble(plan))

    def _assemble(self, plan: Plan) -> None:
        if is_in_place(self.folder):
            return
        blocks, dialect = self._streamed, dialect_named(self._dialect)
        names = [None if record is None else record["name"] for record in self._records.entries]
        shards = [
            *((None, self._shard("outside", number)) for number in range(len(self._outside()))),
            *((name, self._shard("blocks", number)) for number, name in enumerate(names)),
        ]
        with self.told_faults(), self._pruned(blocks.model, plan) as (model, _):
            carried = self._carried(model) if dialect.keeps_unread else []
            place = self.output if dialect.has_shards else self.folder / "shards"
            place.mkdir(exist_ok=True)
            gather_shards(model, plan, shards, carried, place, as_files=dialect.has_shards)
            if not dialect.has_shards:
                whole = Checkpoint(mapped_model(model, place), None, blocks.source)
                self.output.mkdir(exist_ok=True)
                write_model(whole, self.output, self._dialect, plan.state_dtype)
                return
            write_config(model, self.output, blocks.source, state_dtype=plan.state_dtype)
            if plan.needs_own_class:
                write_code(self.output)

    @contextmanager
    def _pruned(self, model: PreTrainedModel, plan: Plan) -> Iterator[tuple[PreTrainedModel, bool]]:
        """Within the context a model without weights in its blocks as it is written, and whether its head is untied."""
        shapes_only = dataclasses.replace(plan, changes={})
        with pruned(model, shapes_only) as smaller, untied_head(smaller, self._untie) as untied:
            yield smaller, untied

    def _carried(self, model: PreTrainedModel) -> list[Path]:
        """Write, as shards, what goes into the output and no block of the pruned model loads."""
        shards = []
        for number, piece in enumerate(carried_pieces(model, self._streamed.source)):
            shards.append(self._shard("carried", number))
            durable.write_tensors(shards[-1], piece)
        return shards

    def finish(
        self,
        checkpoint: StreamedCheckpoint,
        plan: Plan,
        fingerprint: str,
        measured: Measurement | None = None,
        request: Mapping[str, Any] | None = None,
    ) -> None:
        """Write what belongs beside the pruned model, put it in its place, and remove the run's folder.

        Args:
            fingerprint: of the base model. measured, request: as `ghostssm.save`.

        Raises:
            StorageError: the disk failed; what is done can be resumed.
            IncompleteError: it is in its place, but without something that belongs beside the weights; says what.
        """

        def finished() -> None:
            files = SideFiles(self.output, fatal=(OSError, SafetensorError, NumericalError))
            if not is_in_place(self.folder):
                with self.told_faults(), self._pruned(checkpoint.model, plan) as (model, untied):
                    smaller = Checkpoint(model, checkpoint.tokenizer, checkpoint.source)
                    write_beside_weights(
                        files, smaller, plan, self._dialect, measured, fingerprint, untied, request=request
                    )
                    durable.synchronise(self.output)
                    durable.write_durably(self.folder / "finished", lambda path: path.touch())
                    put_in_place(self.output, self.path)
            self.remove()
            files.raise_missing(self.path)

        self._processes.from_first(finished)

    @property
    def _streamed(self) -> StreamedBlocks:
        assert self._blocks is not None, "begin was not called"
        return self._blocks

    def _apply(self, block: nn.Module, decision: Decision) -> None:
        """Prune a block as the model has it."""
        family = family_of(self._streamed.model.config)
        mixer = family.mixer(block, self.done)
        assert mixer is not None
        carry_out(family, mixer, decision)

    def _shard(self, part: str, number: int) -> Path:
        return self.folder / part / f"{number:05d}.safetensors"


def _read_record(record: dict[str, Any]) -> tuple[str, tuple[Decision, Tensor]]:
    """The name of a mixer, the decision on it, and the scores behind it.

    Values of projections and of changed parameters are in the weights; the decision has their shapes and names only.
    """
    kept = Selection(tuple(tuple(channels) for channels in record["kept"]))
    projection = None
    if record["projected"] is not None:
        projection = Projection(*torch.empty(2, len(kept.kept), kept.width, record["projected"], device="meta"))
    decision = Decision(kept, projection, {name: torch.empty(0, device="meta") for name in record["changed"]})
    return record["name"], (decision, torch.tensor(record["scores"], dtype=torch.float64))


def is_in_place(folder: Path) -> bool:
    """Whether all that a run left to do is to remove its folder."""
    return (folder / "finished").exists() and not (folder / "output").exists()


def check_run_folder(output: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise OutputError if an output must not be written, or has a run's state and is not to be resumed."""
    folder = run_folder_of(output)
    if is_in_place(folder) and resume:
        return
    OutputFolder(output, overwrite)
    if folder.exists() and not (folder / RUN_FILE).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(
            f"{folder}, where the run's state would be, holds something else; move it away, or name another --output."
        )
    if (folder / RUN_FILE).exists() and not resume:
        done = len(list((folder / "records").glob("*.json")))
        raise OutputError(
            f"{folder} holds a run that ended after {done} layers; pass --resume to go on, or remove that folder to "
            "start again."
        )
