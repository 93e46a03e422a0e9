"""Runs that several processes share, against runs of one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import ghostssm
from ghostssm.calibration.processes import Processes
from ghostssm.errors import ProcessError
from ghostssm.files.outputs import PLAN_FILE
from ghostssm.plan.file import TENSORS_FILE
from ghostssm.streaming.run_folder import RunFolder
from ghostssm.text import windows
from tests.conftest import Run, random_windows
from tests.programs import fork_server, in_process
from tests.test_streaming import assert_same_checkpoint, facts_of, model_of, saved, tensors_of

WINDOWS = random_windows(11, 40)  # six batches, of which the last has one window
HELD_OUT = random_windows(7, 40, seed=1)

Outcome = tuple[str, str]
"""Of one process: the name of what it raised, if anything, and its message."""


@pytest.fixture(autouse=True)
def _several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "_TOKENS_PER_BATCH", 80)


def prune(spec: str, output: Path, recipe: str, processes: Processes | None = None, **options: Any) -> Path:
    checkpoint = ghostssm.stream(spec, head=False)
    ghostssm.prune_streamed(checkpoint, WINDOWS, recipe, 5, output, held_out=HELD_OUT, processes=processes, **options)
    return output


def _ended_after(records: int, end: Callable[[], None]) -> None:
    record, seen = RunFolder.record, []

    def counted(self: RunFolder, *args: Any, **kwargs: Any) -> None:
        record(self, *args, **kwargs)
        seen.append(1)
        if len(seen) == records:
            end()

    RunFolder.record = counted  # type: ignore[method-assign]


def _fail() -> None:
    raise ghostssm.NumericalError("broken")


ENDS: dict[str, Callable[[], None]] = {
    "dies": lambda: os._exit(9),
    "stands still": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "fails": _fail,
}


def _worker(rank: int, size: int, port: int, end: tuple[int, str] | None, results: Any, arguments: Any) -> None:
    torch.set_num_threads(1)
    windows._TOKENS_PER_BATCH = 80
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    spec, output, recipe, options = arguments
    if end is not None and rank == end[0]:
        _ended_after(2, ENDS[end[1]])
    try:
        processes = Processes.join(timeout=timedelta(seconds=5 if end and end[1] == "stands still" else 120))
        prune(spec, output, recipe, processes, **options)
        processes.leave()
        results.put((rank, "", ""))
    except ghostssm.GhostError as error:
        results.put((rank, type(error).__name__, str(error)))
        results.close()
        results.join_thread()
        os._exit(1)


def together(
    size: int, spec: str, output: Path, recipe: str, *, end: tuple[int, str] | None = None, **options: Any
) -> dict[int, Outcome]:
    """Run in so many processes; what became of those that told."""
    context = fork_server()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = context.Queue()
    arguments = (spec, output, recipe, options)
    children = [
        context.Process(target=_worker, args=(rank, size, port, end, results, arguments)) for rank in range(size)
    ]
    for child in children:
        child.start()
    expected = size - (1 if end and end[1] != "fails" else 0)
    found = {rank: (name, message) for rank, name, message in (results.get(timeout=120) for _ in range(expected))}
    for child in children:
        if end is not None and child is children[end[0]]:
            child.kill()
        child.join(30)
        assert child.exitcode is not None
    results.close()
    return found


@pytest.mark.parametrize(
    ("case", "recipe", "groups"),
    [
        ("mamba2", "output+refit5+repair", "equal"),
        ("mamba2", "balanced+per-layer", "equal"),
        ("mamba2", "balanced+refit20", "equal"),
        pytest.param("granite", "balanced+repair", "equal", marks=pytest.mark.slow),
        pytest.param("zamba2", "ghost", "pooled", marks=pytest.mark.slow),
        pytest.param("mamba2", "sparsegpt", "equal", marks=pytest.mark.slow),
        pytest.param("mamba2", "random", "equal", marks=pytest.mark.slow),
    ],
)
def test_any_number_of_processes_makes_the_same_plan(case: str, recipe: str, groups: str, tmp_path: Path) -> None:
    spec = saved(model_of(case), tmp_path / "model")
    alone = prune(spec, tmp_path / "1", recipe, groups=groups)
    expected, scores = tensors_of(alone), scores_of(alone)
    for size in (2, 3):
        output = tmp_path / str(size)
        assert together(size, spec, output, recipe, groups=groups) == dict.fromkeys(range(size), ("", ""))
        assert facts_of(output) == facts_of(alone)
        for file in (PLAN_FILE, "config.json"):
            assert (output / file).read_bytes() == (alone / file).read_bytes()
        for name, score in scores_of(output).items():
            torch.testing.assert_close(score, scores[name], rtol=1e-6, atol=0)
        found = tensors_of(output)
        assert set(found) == set(expected)
        if recipe == "ghost":
            assert all(torch.equal(value, expected[name]) for name, value in found.items())
        for name, value in found.items():
            scale = expected[name].abs().max().item()
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-4 * scale)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "3", "model"]


def scores_of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(safetensors.torch.load_file(folder / TENSORS_FILE))


@pytest.mark.parametrize(
    ("rank", "how"),
    [
        (1, "dies"),
        pytest.param(0, "dies", marks=pytest.mark.slow),
        pytest.param(1, "stands still", marks=pytest.mark.slow),
        pytest.param(2, "fails", marks=pytest.mark.slow),
    ],
)
def test_a_process_that_is_gone(rank: int, how: str, tmp_path: Path) -> None:
    spec = saved(model_of("mamba2"), tmp_path / "model")
    alone, output = prune(spec, tmp_path / "alone", "ghost"), tmp_path / "out"
    begun = time.monotonic()
    found = together(3, spec, output, "ghost", end=(rank, how))
    assert time.monotonic() - begun < 60
    if how == "fails":  # as where one process's windows overflow
        assert found.pop(rank) == ("NumericalError", "broken")
    assert len(found) == 2
    for name, message in found.values():
        assert name == "ProcessError"
        assert "Another process of this run ended" in message
        assert message.endswith(f"What is done is in {output}.run: give the same command with --resume to go on.")
    assert not output.exists()
    assert len(list((tmp_path / "out.run" / "records").iterdir())) in (2, 3)
    with pytest.raises(ghostssm.OutputError, match="differs in processes: it was 3, now it is 1"):
        prune(spec, output, "ghost", resume=True)
    assert together(3, spec, output, "ghost", resume=True) == dict.fromkeys(range(3), ("", ""))
    assert_same_checkpoint(alone, output)


def test_more_processes_than_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ghostssm.InputError, match="11 windows of 40 tokens make 6 batches, too few for 7 processes"):
        Processes(0, 7).share(WINDOWS)
    shares = [Processes(rank, 4).share(WINDOWS) for rank in range(4)]
    assert [first for first, _ in shares] == [0, 2, 6, 8]
    assert torch.equal(torch.cat([part.ids for _, part in shares]), WINDOWS.ids)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ProcessError, match=r"can't be reached"):
        Processes.join()


@pytest.mark.parametrize("given", ["two", "", "0", "-1"])
def test_a_number_of_processes_that_is_none(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", given)
    with pytest.raises(ghostssm.InputError, match=f"WORLD_SIZE is '{given}'; expected the number of processes"):
        Processes.join()


def torchrun(count: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    program = "import runpy; runpy.run_module('torch.distributed.run', run_name='__main__', alter_sys=True)"
    options = [f"--nproc-per-node={count}", "--standalone", "-m", "ghostssm"]
    return in_process(program, *options, *arguments)


@pytest.mark.slow
def test_torchrun(
    run: Run, folder_of: Callable[..., Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = folder_of()
    cut = ["--calibration", text_file, "--windows", 4, "--window-length", 1100]
    arguments = ["prune", model, "--state-size", 4, "--method", "ghost", *cut, "--output", tmp_path / "out"]
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")  # as torchrun tells each of two
        code, _, err = run(*arguments)
    assert code == 2
    assert "with --stream only" in " ".join(err.split())
    done = torchrun(2, *arguments, "--stream", "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["state_size"] == {"before": 16, "after": 4}
    assert done.stderr.count("layers 3/3") == 1


def test_windows_are_shared_in_the_batches_that_the_device_works_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "_TOKENS_PER_GPU_BATCH", 320)
    many = random_windows(60, 40)
    for device in ("cpu", "cuda"):
        starts = {span.start for span in many.batches(torch.device(device))}
        assert len(starts) >= 3
        shared = [Processes(rank, 3, device).share(many) for rank in range(3)]
        assert {first for first, _ in shared} <= starts
        assert sum(len(own) for _, own in shared) == len(many)
