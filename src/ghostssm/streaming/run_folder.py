"""The state of a streamed run on disk: every block that is done, so that a run that was ended can go on.

A run that writes OUTPUT keeps in OUTPUT.run

    run.json            what the run is: model, text, options, versions
    outside/00000.*     tensors outside the blocks, one file each
    carried/00000.*     tensors that no block loads, and that go into the output as they are
    blocks/00007.*      the pruned tensors of block 7
    records/00007.json  its decision and scores; written last, so that it says that block 7 is done
    dense.json          the dense model's loss on every window that is measured on, and pruned.json the pruned one's
    hidden/00008-0.bin  the hidden states that reach block 8, of process 0's windows; of the last record only
    output/             the folder that becomes OUTPUT

Every file appears whole or not at all. Numbers in JSON are written so that they are read back bit by bit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ghostssm.calibration.processes import Processes
from ghostssm.checkpoint.loading import check_writable
from ghostssm.checkpoint.rehearsal import rehearse_run
from ghostssm.checkpoint.saving import write_beside_weights, write_config
from ghostssm.checkpoint.side_files import SideFiles
from ghostssm.checkpoint.streamed import StreamedBlocks, StreamedCheckpoint
from ghostssm.checkpoint.unread import carried_pieces
from ghostssm.errors import InputError, NumericalError, OutputError, StorageError
from ghostssm.files import durable
from ghostssm.files.durable import put_in_place
from ghostssm.files.kept_run import open_run
from ghostssm.files.output_folder import destination
from ghostssm.models.families import family_of
from ghostssm.plan.decision import Decision, Selection
from ghostssm.plan.measurement import Measurement
from ghostssm.plan.plan import Plan
from ghostssm.plan.surgery import change_parameters, prune_mixer
from ghostssm.pruning.journal import Journal
from ghostssm.streaming.assembling import gather_shards
from ghostssm.streaming.run_places import check_run_folder, is_in_place, run_folder_of

_ROWS_AT_ONCE = 8
"""Windows of hidden states that are copied from or to the disk together."""


class RunFolder(Journal):
    """The decisions and weights of a streamed run.

        with RunFolder(output, identity, resume=False) as run:
            run.rehearse(checkpoint, windows.ids.numel())
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
        processes: Processes | None = None,
    ):
        """
        Args:
            identity: what decides the result, by names that users know: JSON values.
            processes: that share the run and see the same folder; the first writes all but the others' hidden states.

        Raises:
            OutputError: a run's state is there and ``resume`` is false, or it is of a run with another identity, or
                another process works on it; or the output must not be written.
        """
        super().__init__()
        self.path = destination(output)
        self.folder = run_folder_of(self.path)
        self.output = self.folder / "output"
        self._identity = dict(identity)
        self._resume, self._overwrite = resume, overwrite
        self._created = False
        self._lock: IO[str] | None = None
        self._blocks: StreamedBlocks | None = None
        self._processes = processes or Processes()
        self._processes.from_first(lambda: check_run_folder(self.path, resume=resume, overwrite=overwrite))

    def __enter__(self) -> RunFolder:
        self._processes.from_first(self._enter)
        return self

    def _enter(self) -> None:
        self._lock, self._created = open_run(self.folder, self._identity)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        if self._created and not self.done and isinstance(error, InputError):
            self.remove()  # a mistake that showed before any work leaves nothing to go on with

    def rehearse(self, checkpoint: StreamedCheckpoint, tokens: int) -> None:
        """Try what `finish` may stumble over, and whether the disk has room for the run.

        Args:
            tokens: in all windows, whose hidden states the run keeps.

        Raises:
            ModelError, OutputError: as `ghostssm.checkpoint.rehearsal`.
        """

        def rehearsed() -> None:
            with self._told_faults():
                if not is_in_place(self.folder):
                    rehearse_run(self.folder, self.path, checkpoint, tokens)

        self._processes.from_first(rehearsed)

    def begin(self, blocks: StreamedBlocks) -> None:
        """Read what earlier runs did, and write what no decision changes."""
        self._blocks = blocks
        self.done, self.decisions, self.scores = self._processes.from_first(self._begin)

    def _begin(self) -> tuple[int, dict[str, Decision], dict[str, Tensor]]:
        blocks = self._streamed
        with self._told_faults():
            for part in ("outside", "blocks", "records", "hidden"):
                (self.folder / part).mkdir(exist_ok=True)
            for number, name in enumerate(blocks.outside()):
                shard = self._shard("outside", number)
                if not shard.exists():
                    durable.write_tensors(shard, blocks.stored_outside(name))
        while (record := self._record_file(self.done)).exists():
            try:
                self._take_over(json.loads(record.read_text(encoding="utf-8")))
            except (ValueError, KeyError, TypeError) as error:
                raise OutputError(f"{record} is damaged ({error}); remove {self.folder} to start again.") from error
        return self.done, self.decisions, self.scores

    def _take_over(self, found: dict[str, Any] | None) -> None:
        """Note what a record says of a block; None is one without a mixer."""
        self.done += 1
        if found is not None:
            kept = Selection(tuple(tuple(channels) for channels in found["kept"]))
            self.decisions[found["name"]] = Decision(kept, changes=_names_only(found["changed"]))
            self.scores[found["name"]] = torch.tensor(found["scores"], dtype=torch.float64)

    def restore(self, hidden: Tensor) -> None:
        if self.done == 0 or self.done == len(self._streamed.modules):
            return
        try:
            with torch.inference_mode(), self._hidden_file(self.done).open("rb") as file:
                for rows in hidden.split(_ROWS_AT_ONCE):
                    values = np.fromfile(file, dtype=_numpy_dtype(hidden), count=rows.numel())
                    rows.copy_(torch.from_numpy(values).view(rows.shape))
        except (OSError, ValueError, RuntimeError) as error:
            raise OutputError(
                f"{self._hidden_file(self.done)} can't be read ({error}); remove {self.folder} to start again."
            ) from error

    def record(
        self,
        block: nn.Module,
        name: str | None = None,
        decision: Decision | None = None,
        score: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> None:
        found: dict[str, Any] | None = None
        shard = self._shard("blocks", self.done)
        with self._told_faults():
            if name is not None and decision is not None and score is not None:
                self._apply(block, decision)
                score = score.double().cpu()
                decision = Decision(decision.selection, changes=_names_only(decision.changes))
                kept = [list(channels) for channels in decision.selection.kept]
                found = {"name": name, "kept": kept, "changed": list(decision.changes), "scores": score.tolist()}
            if self._processes.rank == 0:
                tensors = self._streamed.stored_block(self.done, block)
                check_writable(tensors)
                durable.write_tensors(shard, tensors)
            if hidden is not None:
                durable.write_durably(self._hidden_file(self.done + 1), partial(_write_rows, hidden))
        self._processes.gather([None])  # the record says that all hidden states are on the disk
        self._processes.from_first(lambda: self._write_record(found))
        self._hidden_file(self.done).unlink(missing_ok=True)
        super().record(block, name, decision, score)

    def _write_record(self, found: dict[str, Any] | None) -> None:
        with self._told_faults():
            durable.write_json(self._record_file(self.done), found)

    def kept(self, name: str, compute: Callable[[], list[float]]) -> list[float]:
        """Numbers that the run's folder keeps under a name; computed, by all processes, if it does not have them."""
        file = self.folder / f"{name}.json"
        found: list[float] | None = self._processes.from_first(lambda: _read_json(file))
        if found is None:
            found = compute()
            with self._told_faults():
                self._processes.from_first(lambda: durable.write_json(file, found))
        return found

    def assemble(self, plan: Plan) -> None:
        """Put the pruned model together in ``output``."""
        self._processes.from_first(lambda: self._assemble(plan))

    def _assemble(self, plan: Plan) -> None:
        if is_in_place(self.folder):
            return
        blocks, model = self._streamed, self._streamed.model
        with self._told_faults(), _pruned_config(model.config, plan):
            self.output.mkdir(exist_ok=True)
            gather_shards(
                blocks,
                plan,
                [*(self._shard("outside", number) for number in range(len(blocks.outside()))), *self._carried()],
                [(self._name_of(number), self._shard("blocks", number)) for number in range(len(blocks.modules))],
                self.output,
            )
            write_config(model, self.output, blocks.source)

    def _carried(self) -> list[Path]:
        """Write, as shards, what goes into the output and no block loads; called with the pruned config."""
        (self.folder / "carried").mkdir(exist_ok=True)
        shards = []
        for number, piece in enumerate(carried_pieces(self._streamed.model, self._streamed.source)):
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
                with self._told_faults(), _pruned_config(checkpoint.model.config, plan):
                    write_beside_weights(
                        files, checkpoint, plan, "transformers", measured, fingerprint, False, request=request
                    )
                    durable.synchronise(self.output)
                    durable.write_durably(self.folder / "finished", lambda path: path.touch())
                    put_in_place(self.output, self.path)
            self.remove()
            files.raise_missing(self.path)

        self._processes.from_first(finished)

    def remove(self) -> None:
        """Remove the run's folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def how_to_go_on(self) -> str:
        """A sentence for a person whose run ended."""
        return f"What is done is in {self.folder}: give the same command with --resume to go on."

    @contextmanager
    def _told_faults(self) -> Iterator[None]:
        """Within the context the system's errors become one message with the next step."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            place, reason = self.folder, str(error)
            if isinstance(error, OSError):
                place, reason = error.filename or place, error.strerror or reason
            raise StorageError(f"{place} could not be written: {reason}. {self.how_to_go_on()}") from error

    @property
    def _streamed(self) -> StreamedBlocks:
        assert self._blocks is not None, "begin was not called"
        return self._blocks

    def _close(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def _apply(self, block: nn.Module, decision: Decision) -> None:
        """Prune a block as the model has it."""
        config = self._streamed.model.config
        family = family_of(config)
        mixer = family.mixer(block, self.done)
        assert mixer is not None
        prune_mixer(family, mixer, decision.selection, decision.width)
        change_parameters(mixer.module, decision.changes)

    def _name_of(self, index: int) -> str | None:
        found = json.loads(self._record_file(index).read_text(encoding="utf-8"))
        return None if found is None else str(found["name"])

    def _shard(self, part: str, number: int) -> Path:
        return self.folder / part / f"{number:05d}.safetensors"

    def _record_file(self, index: int) -> Path:
        return self.folder / "records" / f"{index:05d}.json"

    def _hidden_file(self, index: int) -> Path:
        return self.folder / "hidden" / f"{index:05d}-{self._processes.rank}.bin"


@contextmanager
def _pruned_config(config: PreTrainedConfig, plan: Plan) -> Iterator[None]:
    """Within the context a config has the state size that a plan leaves; blocks are opened with the model's own."""
    family = family_of(config)
    family.set_state_size(config, plan.kept_state_size)
    try:
        yield
    finally:
        family.set_state_size(config, plan.state_size)


def _names_only(changed: Any) -> dict[str, Tensor]:
    """Changed parameters by name; their values are in the weights already."""
    return {name: torch.empty(0, device="meta") for name in changed}


def _read_json(path: Path) -> Any:
    """What a file holds; None if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _write_rows(hidden: Tensor, path: Path) -> None:
    with path.open("wb") as file:
        for rows in hidden.split(_ROWS_AT_ONCE):
            rows.cpu().numpy().tofile(file)


def _numpy_dtype(tensor: Tensor) -> Any:
    return torch.empty(0, dtype=tensor.dtype).numpy().dtype
