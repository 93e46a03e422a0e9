"""Streamed runs that are ended, by whatever means, and go on."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ghostssm
from ghostssm.files import durable
from ghostssm.files.held_run import HeldRun, run_folder_of
from ghostssm.streaming import run_folder
from ghostssm.streaming.findings import FindingsOnDisk
from ghostssm.streaming.run_folder import RunFolder
from ghostssm.text import windows
from tests.cli.test_faults import file_size_limit
from tests.conftest import Run, random_windows, tiny_model
from tests.programs import fork_server
from tests.test_streaming import assert_same_checkpoint, saved

RECIPE = "output+refit5+repair"
WINDOWS, HELD_OUT = random_windows(9, 40), random_windows(5, 40, seed=1)


class _Died(BaseException):
    """What no handler catches."""


@pytest.fixture(autouse=True)
def _several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ghostssm.text.windows._TOKENS_PER_BATCH", 80)


@pytest.fixture
def spec(tmp_path: Path) -> str:
    return saved(tiny_model(n_groups=2).to(torch.bfloat16), tmp_path / "model")


def prune(spec: str, output: Path, *, recipe: str = RECIPE, groups: Any = "pooled", **options: Any) -> Path:
    ghostssm.prune_streamed(
        ghostssm.stream(spec, head=False), WINDOWS, recipe, 5, output, groups=groups, held_out=HELD_OUT, **options
    )
    return output


@pytest.mark.parametrize(
    ("recipe", "torn", "files"),
    [
        ("ghost+repair", False, 2 + 2 * 3 + 2),  # hidden states of the first block, a narrow block once more
        ("ghost+repair", True, 2 + 2 * 3 + 2),
        # Two files per block more for its curve, and none is written anew.
        pytest.param("balanced+repair+per-layer", False, 2 + 2 * 5, marks=pytest.mark.slow),
    ],
)
def test_died_at_every_durable_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, torn: bool, files: int
) -> None:
    """After each file, and in the middle of it; of a first and a last layer, for one between them adds no new step."""
    spec = saved(tiny_model(n_groups=2, num_hidden_layers=2).to(torch.bfloat16), tmp_path / "model")
    expected = prune(spec, tmp_path / "whole", recipe=recipe)
    durably = durable.write_durably
    for last in itertools.count(1):
        steps = itertools.count(1)

        def step(path: Path, write: Callable[[Path], None], steps: Any = steps, last: int = last) -> None:
            number = next(steps)
            if torn and number == last:
                path.with_name(f".{path.name}.unfinished").write_bytes(b"half")
            else:
                durably(path, write)
            if number == last:
                raise _Died

        output = tmp_path / f"out-{last}"
        try:
            with monkeypatch.context() as patch:
                patch.setattr(durable, "write_durably", step)
                prune(spec, output, recipe=recipe)
        except _Died:
            assert not output.exists()
            prune(spec, output, recipe=recipe, resume=True)
            assert_same_checkpoint(expected, output)
            assert not run_folder_of(output).exists()
        else:
            break
    assert last > files


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("balanced+repair+per-layer", {}),
        ("balanced+refit5", {"untie": True}),
        ("ghost", {"dialect": "mamba_ssm"}),
    ],
)
def test_died_here_and_there(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, options: dict[str, Any]
) -> None:
    """In a walk, and twice while the output is put together; the same run goes on each time."""
    options = {"recipe": recipe, "groups": "equal", **options}
    expected, output = prune(spec, tmp_path / "whole", **options), tmp_path / "out"
    for owner, name, last in (
        (FindingsOnDisk, "add", 2),
        (run_folder, "gather_shards", 1),
        (run_folder, "write_beside_weights", 1),
    ):
        calls, real = itertools.count(1), getattr(owner, name)

        def dying(*args: Any, real: Any = real, calls: Any = calls, last: int = last, **named: Any) -> None:
            real(*args, **named)
            if next(calls) == last:
                raise _Died

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, dying)
            with pytest.raises(_Died):
                prune(spec, output, resume=True, **options)
    assert_same_checkpoint(expected, prune(spec, output, resume=True, **options))


@pytest.mark.parametrize("overwrite", [False, True])
def test_died_while_the_output_is_put_in_place(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    expected, output = prune(spec, tmp_path / "whole"), tmp_path / "out"
    if overwrite:
        output.mkdir()
        (output / "old").write_text("x")
        (output / "config.json").write_text("{}")

    def died(*_: object) -> None:
        raise _Died

    for owner, name in ((run_folder, "put_in_place"), (run_folder.RunFolder, "remove")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, died)
            with pytest.raises(_Died):
                prune(spec, output, overwrite=overwrite, resume=True)
    options: Any = {"groups": "pooled", "held_out": HELD_OUT, "resume": True}
    plan = ghostssm.prune_streamed(ghostssm.stream(spec), WINDOWS, RECIPE, 5, output, **options).plan
    assert plan.kept_state_size == ghostssm.describe(str(output)).layout.state_size
    assert_same_checkpoint(expected, output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "whole"]


def _child(spec: str, output: Path, begun: Path) -> None:
    torch.set_num_threads(1)
    windows._TOKENS_PER_BATCH = 80
    begun.touch()
    prune(spec, output, resume=True)


@pytest.mark.parametrize("moments", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(spec: str, tmp_path: Path, moments: int) -> None:
    """Runs are killed again and again, and go on each time."""
    expected, output = prune(spec, tmp_path / "whole"), tmp_path / "out"
    context = fork_server()
    chance = random.Random(0)
    killed, length = 0, 0.0
    for number in itertools.count():
        marker = tmp_path / f"begun-{number}"
        child = context.Process(target=_child, args=(spec, output, marker))
        child.start()
        while not marker.exists():
            time.sleep(0.001)
        begun = time.monotonic()
        if length:
            child.join(chance.uniform(0, length))
            if child.is_alive():
                assert child.pid is not None
                os.kill(child.pid, signal.SIGKILL)
                killed += 1
        child.join()
        length = length or time.monotonic() - begun  # of a whole run
        if output.exists():
            assert_same_checkpoint(expected, output)
            output.rename(tmp_path / f"finished-{number}")
        if killed == moments:
            break
    prune(spec, output, resume=True)
    assert_same_checkpoint(expected, output)


def ended_after(records: int, monkeypatch: pytest.MonkeyPatch, how: Callable[[], None]) -> None:
    """Have runs end after so many blocks."""
    record, seen = RunFolder.record, itertools.count(1)

    def counted(self: RunFolder, *args: Any, **kwargs: Any) -> None:
        record(self, *args, **kwargs)
        if next(seen) == records:
            how()

    monkeypatch.setattr(RunFolder, "record", counted)


def die() -> None:
    raise _Died


def test_a_run_is_not_taken_for_another(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        ended_after(2, patch, die)
        with pytest.raises(_Died):
            prune(spec, output)
    with pytest.raises(ghostssm.OutputError, match=r"ended after 2 layers; pass --resume .* or remove that folder"):
        prune(spec, output)
    with pytest.raises(
        ghostssm.OutputError, match=r"differs in method: it was 'output\+refit5\+repair', now .*'ghost'"
    ):
        prune(spec, output, recipe="ghost", resume=True)
    with pytest.raises(ghostssm.OutputError, match=r"differs in groups: it was 'pooled', now it is 'equal'"):
        prune(spec, output, groups="equal", resume=True)
    other = saved(tiny_model(seed=1, n_groups=2).to(torch.bfloat16), tmp_path / "other")
    with pytest.raises(ghostssm.OutputError, match=r"differs in model: it was '[0-9a-f]{64}'"):
        prune(other, output, resume=True)
    with monkeypatch.context() as patch:
        patch.setattr("ghostssm.streaming.run.__version__", "9.9")
        with pytest.raises(ghostssm.OutputError, match=r"differs in ghostssm: .*'9\.9'"):
            prune(spec, output, resume=True)
    checkpoint = ghostssm.stream(spec)
    other_windows = random_windows(9, 40, seed=1)
    with pytest.raises(ghostssm.OutputError, match="differs in tokens"):
        ghostssm.prune_streamed(checkpoint, other_windows, RECIPE, 5, output, groups="pooled", resume=True)
    with pytest.raises(ghostssm.OutputError, match=r"differs in measured on: .* now it is None"):
        ghostssm.prune_streamed(checkpoint, WINDOWS, RECIPE, 5, output, groups="pooled", resume=True)
    prune(spec, output, resume=True)


def test_a_damaged_record_is_named(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        ended_after(2, patch, die)
        with pytest.raises(_Died):
            prune(spec, tmp_path / "out")
    for content in ("{", '{"name": 1}', "[]"):
        (run_folder_of(tmp_path / "out") / "records" / "00000.json").write_text(content)
        with pytest.raises(ghostssm.OutputError, match=r"00000.json is damaged .* to start again"):
            prune(spec, tmp_path / "out", resume=True)


def test_two_processes_on_one_run(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def again() -> None:
        with pytest.raises(ghostssm.OutputError, match="Another process works on the run"):
            prune(spec, tmp_path / "out", resume=True)

    ended_after(1, monkeypatch, again)
    prune(spec, tmp_path / "out")


def test_a_full_disk(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    durably, steps = durable.write_durably, itertools.count(1)

    def write(path: Path, content: Callable[[Path], None]) -> None:
        if next(steps) == 6:
            full()
        durably(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(durable, "write_durably", write)
        with pytest.raises(
            ghostssm.StorageError, match=r"could not be written: No space left .*with --resume to go on"
        ):
            prune(spec, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    expected = prune(spec, tmp_path / "whole")
    assert_same_checkpoint(expected, prune(spec, tmp_path / "out", resume=True))


@pytest.mark.parametrize("room", [2500, 5000])
def test_a_disk_that_fills_up(spec: str, tmp_path: Path, room: int) -> None:
    """In the middle of a file of tensors, whose writer has an error class of its own."""
    with file_size_limit(room), pytest.raises(ghostssm.StorageError, match=r"File too large.*with --resume to go on"):
        prune(spec, tmp_path / "out")
    assert_same_checkpoint(prune(spec, tmp_path / "whole"), prune(spec, tmp_path / "out", resume=True))


def test_what_is_not_a_runs_state_stays(spec: str, tmp_path: Path) -> None:
    place = run_folder_of(tmp_path / "out")
    place.mkdir()
    (place / "mine.txt").write_text("precious")
    with pytest.raises(ghostssm.OutputError, match="holds something else"):
        prune(spec, tmp_path / "out")
    assert (place / "mine.txt").read_text() == "precious"


def test_a_run_of_another_dtype_is_another_run(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        ended_after(1, patch, die)
        with pytest.raises(_Died):
            prune(spec, tmp_path / "out")
    widened = ghostssm.stream(spec, dtype=torch.float32)
    with pytest.raises(ghostssm.OutputError, match="differs in dtype: it was 'bfloat16', now it is 'float32'"):
        ghostssm.prune_streamed(widened, WINDOWS, RECIPE, 5, tmp_path / "out", groups="pooled", resume=True)


def arguments(model: Path, text: Path, output: Path, *more: object) -> list[object]:
    cut = ["--windows", 3, "--window-length", 64, "--calibration", text]
    return ["prune", model, "--state-size", 4, "--output", output, *cut, "--method", "ghost", *more]


@pytest.mark.parametrize(
    ("number", "word", "code"), [(signal.SIGINT, "interrupted", 130), (signal.SIGTERM, "terminated", 143)]
)
def test_signals(
    run: Run,
    folder_of: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    word: str,
    code: int,
) -> None:
    model, output = folder_of(), tmp_path / "out"
    run(*arguments(model, text_file, tmp_path / "whole", "--stream"))
    with monkeypatch.context() as patch:
        ended_after(2, patch, lambda: os.kill(os.getpid(), number))
        found, out, err = run(*arguments(model, text_file, output, "--stream"))
    assert (found, out) == (code, "")
    assert f"{word}. What is done is in {output}.run: give the same command with --resume to go on." in err
    assert not output.exists()
    assert run(*arguments(model, text_file, output, "--stream"))[0] == 2
    found, out, err = run(*arguments(model, text_file, output, "--stream", "--resume", "--json"))
    assert found == 0, err
    assert_same_checkpoint(tmp_path / "whole", output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "text.txt", "whole"]


def test_the_command_line(
    run: Run,
    folder_of: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
) -> None:
    model = folder_of()
    code, _, _ = run(*arguments(model, text_file, tmp_path / "memory"))
    assert code == 0
    code, out, _ = run(*arguments(model, text_file, tmp_path / "files", "--stream", "--offload", tmp_path / "scratch"))
    assert code == 0
    assert "16 -> 4" in out
    assert_same_checkpoint(tmp_path / "memory", tmp_path / "files")
    evaluate = ["evaluate", tmp_path / "files", "--text", text_file, "--window-length", 64, "--json"]
    in_memory = run(*evaluate)
    assert in_memory[0] == 0
    assert run(*evaluate, "--stream")[:2] == in_memory[:2]
    for refused, message in (
        (arguments(model, text_file, tmp_path / "x", "--resume"), "--resume works with --stream only"),
        (arguments(model, text_file, tmp_path / "x", "--offload", tmp_path), "--offload works with --stream only"),
        (arguments(model, text_file, tmp_path / "x", "--stream", "--report", "--batch", 2), "decodes with the whole"),
        (arguments(model, text_file, tmp_path / "x", "--stream", "--offload", text_file / "no"), "has no room"),
        (arguments(model, text_file, tmp_path / "x", "--stream", "--method", "taylor"), "can't be streamed"),
        (["prune", model, "--output", tmp_path / "x", "--max-excess-loss", 1, "--stream"], "--max-excess-loss tries"),
        (arguments(model, text_file, tmp_path / "files", "--stream"), "pass --overwrite"),
        (["evaluate", model, "--last-words", text_file, "--stream"], "leave out --stream"),
        (["evaluate", model, "--text", text_file, "--offload", tmp_path], "--offload works with --stream only"),
    ):
        code, _, err = run(*refused)
        assert code == 2
        assert message in " ".join(err.split())
    assert not (tmp_path / "x").exists()
    assert not run_folder_of(tmp_path / "x").exists()


def test_a_removal_that_is_killed_leaves_no_half_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Run(HeldRun):
        def has_work(self) -> bool:
            return True

    run = Run(tmp_path / "out", {"what": 1}, lambda work: work())
    with run:
        (run.folder / "more").touch()

    def killed(path: Path, ignore_errors: bool) -> None:
        if path.exists():
            (path / "run.json").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            run.remove()
    assert not run.folder.exists()
    with run:
        run.remove()
    assert list(tmp_path.iterdir()) == []
