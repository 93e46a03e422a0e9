"""Machines that fail in the middle of a run: one message, an exit code, and nothing half-written."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import ghostssm
from ghostssm.calibration.open_block import OpenBlock
from ghostssm.checkpoint import saving
from ghostssm.checkpoint.saving import save
from ghostssm.cli import main
from ghostssm.cli.console import print_error
from ghostssm.cli.memory import is_out_of_memory
from ghostssm.errors import OutputError, StorageError
from ghostssm.files.interrupts import Terminated, end_at_once, raise_again, terminable, uninterrupted
from ghostssm.files.outputs import OutputFolder
from tests.checkpoint.test_round_trip import pruned_checkpoint
from tests.cli.test_cli import prune_arguments
from tests.conftest import Run
from tests.programs import fork_server

FolderOf = Callable[..., Path]


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writing more into one file fails in the kernel, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("dialect", ["transformers", "mamba_ssm"])
@pytest.mark.parametrize("size", [100, 3000, 20_000])
def test_a_disk_that_fills_up(folder_of: FolderOf, tmp_path: Path, dialect: Any, size: int) -> None:
    checkpoint, plan = pruned_checkpoint(folder_of())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("x")
    (tmp_path / "out" / "config.json").write_text("{}")
    before = sorted(path.name for path in tmp_path.iterdir())
    with file_size_limit(size), pytest.raises(StorageError, match=r"could not be written: .*Nothing was kept"):
        save(checkpoint, plan, tmp_path / "out", dialect=dialect, overwrite=True)
    with file_size_limit(size), pytest.raises(StorageError):
        save(checkpoint, plan, tmp_path / "new" / "deep" / "out", dialect=dialect)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (tmp_path / "out" / "old").read_text() == "x"


def test_a_full_disk_is_no_mistake_of_the_user(run: Run, small: Path, text_file: Path, tmp_path: Path) -> None:
    with file_size_limit(10_000):
        code, out, err = run(*prune_arguments(small, text_file, tmp_path / "out"), "--method", "ghost")
    assert code == 1
    assert out == ""
    assert "could not be written" in err
    assert "File too large" in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_every_write_may_be_the_one_that_fails(
    folder_of: FolderOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, plan = pruned_checkpoint(folder_of())
    before = sorted(path.name for path in tmp_path.iterdir())

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    for target in (
        "ghostssm.checkpoint.saving.write_model",
        "os.fsync",
        "pathlib.Path.rename",
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, full)
            with pytest.raises(StorageError, match="No space left on device"):
                save(checkpoint, plan, tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == before, target


def test_the_old_folder_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("x")
    (tmp_path / "out" / "config.json").write_text("{}")
    rename = Path.rename

    def second_fails(path: Path, target: Path) -> Path:
        if target.name == "out" and not path.name.endswith(".old"):
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    with OutputFolder(tmp_path / "out", overwrite=True) as folder, pytest.raises(OSError, match="No space"):
        folder.commit()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "old").read_text() == "x"


def test_a_read_only_place_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # the tests may run as root
    with pytest.raises(OutputError, match="read-only"):
        OutputFolder(tmp_path / "a" / "b" / "out")


SHORT_OF_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    OSError(12, "Cannot allocate memory"),
]


@pytest.mark.parametrize("error", SHORT_OF_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["ghostssm.pruning.run.LayerWalk", "ghostssm.checkpoint.loading._build"])
def test_out_of_memory_names_the_options(
    run: Run,
    small: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    where: str,
) -> None:
    def short(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(where, short)
    code, out, err = run(*prune_arguments(small, text_file, tmp_path / "out"))
    assert code == 1
    assert out == ""
    assert "fewer --windows (now 3), a shorter --window-length (now 64), --refit 0" in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_what_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    assert not is_out_of_memory(OSError(2, "No such file"))


def test_a_shard_that_is_truncated_meanwhile(
    run: Run,
    small: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = ghostssm.Calibration.plan

    def truncated(self: Any, *args: Any, **kwargs: Any) -> Any:
        os.truncate(small / "model.safetensors", 100)
        return plan(self, *args, **kwargs)

    monkeypatch.setattr(ghostssm.Calibration, "plan", truncated)
    code, _, err = run(*prune_arguments(small, text_file, tmp_path / "out"), "--method", "ghost")
    assert code == 2
    assert "model.safetensors was changed or truncated meanwhile" in " ".join(err.split())
    assert not (tmp_path / "out").exists()


def test_nan_in_the_middle_of_a_run(
    run: Run,
    small: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prune = OpenBlock.prune

    def broken(self: OpenBlock, decision: Any, **options: Any) -> Any:
        if self.index == 1:
            self.present_mixer.out_proj.weight.data[0] = float("nan")
        return prune(self, decision, **options)

    monkeypatch.setattr(OpenBlock, "prune", broken)
    code, _, err = run(*prune_arguments(small, text_file, tmp_path / "out"), "--method", "ghost")
    assert code == 2
    assert "NaN or Inf in the activations after backbone.layers.1.mixer" in " ".join(err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
@pytest.mark.parametrize(
    "where", ["ghostssm.calibration.open_block.PrunedBlock.advance", "ghostssm.checkpoint.saving.probed"]
)
def test_signals(
    run: Run,
    small: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    code: int,
    word: str,
    where: str,
) -> None:
    def signalled(*_: Any) -> None:
        os.kill(os.getpid(), number)
        time.sleep(5)

    monkeypatch.setattr(where, signalled)
    before = sorted(path.name for path in tmp_path.iterdir())
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        found, _, err = run(*prune_arguments(small, text_file, tmp_path / "deep" / "out"), "--method", "ghost")
    finally:
        signal.signal(signal.SIGINT, handler)
    assert found == code
    assert f"{word}; nothing half-written is left" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def _waiting(command: list[str], begun: Path, errors: Path) -> None:
    """The command, which waits with an output half written."""
    os.dup2(os.open(errors, os.O_CREAT | os.O_WRONLY), 2)
    write = saving.write_model

    def waiting(*args: Any) -> None:
        write(*args)
        begun.touch()
        time.sleep(60)

    saving.write_model = waiting
    sys.argv = ["ghostssm", *command]
    main()


@pytest.mark.slow
def test_a_process_that_is_told_to_end(
    small: Path, text_file: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    command = [*map(str, prune_arguments(small, text_file, tmp_path / "out")), "--method", "ghost"]
    begun, errors = (tmp_path_factory.mktemp("told") / name for name in ("begun", "errors"))
    process = fork_server().Process(target=_waiting, args=(command, begun, errors))
    process.start()
    while not begun.exists():
        assert process.is_alive()
        time.sleep(0.01)
    process.terminate()
    process.join(60)
    assert process.exitcode == 143
    assert "Traceback" not in errors.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == before


STARTING = """
import os, runpy, signal, sys
moment, entry = sys.argv[1:]
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == moment:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
sys.argv = ["ghostssm", "evaluate", "reference"]
if entry == "module":
    runpy.run_module("ghostssm", run_name="__main__")
else:  # as the script that installers write
    from ghostssm.__main__ import main
    sys.exit(main())
"""


@pytest.mark.parametrize(
    ("moment", "entry"),
    [
        ("typer", "module"),
        ("typer", "script"),
        ("torch", "module"),
        ("numpy", "script"),
        pytest.param("transformers.modeling_utils", "script", marks=pytest.mark.slow),
        pytest.param("ghostssm.checkpoint.manifest", "module", marks=pytest.mark.slow),
    ],
)
def test_an_interrupt_while_libraries_are_imported(moment: str, entry: str) -> None:
    command = [sys.executable, "-c", STARTING, moment, entry]
    # A process in the background ignores SIGINT, and so would its children.
    default = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120, preexec_fn=default)
    assert ended.returncode == 130
    *waiting, last = ended.stderr.splitlines()
    assert last == "error: interrupted; nothing half-written is left."
    assert all(line.startswith(("starting: ", "working")) for line in waiting), "no traceback"


def test_the_script_that_is_installed_is_the_one_that_is_tested() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"ghostssm": "ghostssm.__main__:main"}


def test_an_ignored_interrupt_stays_ignored() -> None:
    """As of processes in the background of a shell script."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        end_at_once()
        raise_again()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_signals_wait_for_the_end_of_what_must_not_be_interrupted() -> None:
    reached = []

    def work() -> None:
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
            reached.append("end")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            work()
    finally:
        signal.signal(signal.SIGINT, before)
    assert reached == ["end"]


def test_sigterm_is_as_before_after_a_run() -> None:
    def work() -> None:
        with terminable():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated):
        work()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_failed_save_keeps_tensors_usable(folder_of: FolderOf, tmp_path: Path) -> None:
    """After a full disk the same result can be written elsewhere."""
    checkpoint, plan = pruned_checkpoint(folder_of())
    with file_size_limit(3000), pytest.raises(StorageError):
        save(checkpoint, plan, tmp_path / "out")
    folder = save(checkpoint, plan, tmp_path / "out")
    assert safetensors.torch.load_file(folder / "model.safetensors")
    assert ghostssm.verify(folder).passed


def test_messages_spell_control_characters_out(capsys: pytest.CaptureFixture[str]) -> None:
    """A tensor's name must not drive the terminal."""
    print_error("first\nname \x1b[2J\x07 ünï")
    assert capsys.readouterr().err == "error: first\nname \\x1b[2J\\x07 ünï\n"


def test_a_link_to_a_folder_stays_a_link(folder_of: FolderOf, tmp_path: Path) -> None:
    checkpoint, plan = pruned_checkpoint(folder_of())
    (tmp_path / "disk" / "large").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "large")
    save(checkpoint, plan, tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "large" / "plan.json").exists()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["large"]


def test_a_folder_in_use_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for place in (".", "..", tmp_path / "here", "/"):
        with pytest.raises(OutputError, match="is in use and can't be replaced as a whole"):
            OutputFolder(place, overwrite=True)


def test_a_streamed_run_that_is_short_of_memory_can_go_on(
    run: Run, small: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("ghostssm.calibration.open_block.PrunedBlock.advance", short)
    code, _, err = run(*prune_arguments(small, text_file, tmp_path / "out"), "--stream", "--method", "ghost")
    assert code == 1
    assert "what is done is kept for --resume" in err
    assert "--offload FOLDER, fewer --windows (now 3), a shorter --window-length (now 64)." in err


def test_one_window_has_no_standard_error(run: Run, small: Path, text_file: Path) -> None:
    texts = ["--calibration", text_file, "--text", text_file, "--windows", 2, "--window-length", 64]
    arguments = ["compare", small, "--state-size", 4, "--methods", "random", *texts, "--text-windows", 1, "--batch", 1]
    _, out, _ = run(*arguments)
    assert "nan" not in out
    _, out, _ = run(*arguments, "--json")
    assert "NaN" not in out
    assert json.loads(out)[1]["standard_error"] is None


def test_the_input_and_what_is_no_checkpoint_are_not_replaced(
    run: Run, small: Path, text_file: Path, tmp_path: Path
) -> None:
    before = {path.name: path.read_bytes() for path in small.iterdir()}
    for output in (small, tmp_path):
        code, _, err = run(*prune_arguments(small, text_file, output), "--overwrite")
        assert code == 2
        assert "holds the model" in err
        code, _, err = run("export", small, "--format", "mamba_ssm", "--output", output, "--overwrite")
        assert code == 2
        assert "holds the model" in err
    assert {path.name: path.read_bytes() for path in small.iterdir()} == before
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("x")
    code, _, err = run(*prune_arguments(small, text_file, tmp_path / "precious"), "--overwrite")
    assert code == 2
    assert "holds other things than a checkpoint" in err
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "x"


def test_standard_output_that_can_not_be_written(run: Run, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ghostssm.cli.inspect.print_json", full)
    code, _, err = run("inspect", small, "--json")
    assert code == 1
    assert "error: [Errno 28] No space left on device" in err
