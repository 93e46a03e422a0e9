"""``ghostssm distill``: what it writes, what it refuses, and what becomes of runs that are ended."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import ghostssm
from ghostssm.checkpoint.manifest import Manifest
from ghostssm.evaluation.perplexity import evaluate
from ghostssm.ops.state_format import StateStorage
from ghostssm.recovery.distill.training import Training
from ghostssm.workflows import distill_checks
from ghostssm.workflows.distill import DistillOutcome, distill
from ghostssm.workflows.requests import DistillRequest
from tests.conftest import Run, tiny_model
from tests.programs import fork_server
from tests.test_streaming import assert_same_checkpoint


@pytest.fixture
def request_of(
    folder_of: Callable[..., Path], text_file: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> Callable[..., DistillRequest]:
    """A request for a student that ghostssm pruned."""

    def make(recipe: str = "ghost", **options: Any) -> DistillRequest:
        teacher, student, other = folder_of("teacher"), tmp_path / "student", tmp_path / "other.txt"
        checkpoint = ghostssm.load(str(teacher))
        windows = ghostssm.cut_windows(ghostssm.read_text(str(text_file), "calibration"), tokenizer, 40, 4, 0)
        plan = ghostssm.Calibration(checkpoint.model, windows).plan(recipe, 4)
        ghostssm.save(replace(checkpoint, model=ghostssm.apply_plan(checkpoint.model, plan)), plan, student)
        other.write_text("".join(f"row {n}: a lazy dog sleeps below {n * n} foxes\n" for n in range(30)))
        basis = DistillRequest(str(student), str(teacher), str(text_file), str(tmp_path / "healed"))
        return replace(basis, **{"steps": 8, "batch": 4, "window_length": 40, "learning_rate": 1e-2} | options)

    return make


def test_a_student_of_ghostssm(request_of: Callable[..., DistillRequest], tmp_path: Path) -> None:
    """Verified, with plan, card and manifest; the losses are those of what is on the disk."""
    asked = request_of(evaluate=(str(tmp_path / "other.txt"),))
    outcome = distill(asked)
    found = outcome.distillation
    assert (outcome.written, found.steps, found.tokens) == (tmp_path / "healed", 8, 8 * 4 * 40)
    assert ghostssm.verify(outcome.written).passed
    assert ghostssm.describe(str(outcome.written)).pruning.method == "ghost+distill8"
    assert ghostssm.Plan.read(outcome.written, changes=False).distillations == (found,)
    manifest = Manifest.read(outcome.written)
    assert manifest.distillations == (found,)
    assert manifest.base_model == "teacher"
    assert found.overlap == 0
    assert manifest.measured == found.after[0]
    card = (outcome.written / "README.md").read_text()
    assert "- method: `ghost+distill8`" in card
    assert "- distilled: 8 steps, 1,280 tokens of text.txt" in card
    assert str(tmp_path) not in card + (outcome.written / "ghostssm.json").read_text()
    models = [ghostssm.load(place).model for place in (asked.teacher, str(outcome.written))]
    text = ghostssm.read_text(asked.evaluate[0], "evaluation")
    windows = ghostssm.evaluation_windows(text, ghostssm.load(asked.teacher).require_tokenizer(), 40)
    dense, healed = (ghostssm.evaluate(model, windows) for model in models)
    assert found.after[0].excess.mean == pytest.approx(healed.excess_over(dense).mean, abs=1e-6)
    assert found.before[0].pruned_loss != found.after[0].pruned_loss
    assert not (tmp_path / "healed.run").exists()


def test_a_student_for_a_dtype(request_of: Callable[..., DistillRequest], tmp_path: Path) -> None:
    """Whatever reads the result later keeps its state in that dtype; the losses are measured so."""
    asked = request_of(evaluate=(str(tmp_path / "other.txt"),), state_dtype="int4", steps=2)
    written = distill(asked).written
    assert ghostssm.verify(written).passed
    assert Manifest.read(written).distillations[0].state_dtype == "int4"
    assert ghostssm.describe(str(written)).pruning.state_dtype == "int4"
    card = (written / "README.md").read_text()
    assert "with the state rounded to int4 after every token" in card
    assert "**The state is meant to be kept in int4**" in card
    text = ghostssm.read_text(asked.evaluate[0], "evaluation")
    windows = ghostssm.evaluation_windows(text, ghostssm.load(asked.teacher).require_tokenizer(), 40)
    losses = evaluate(ghostssm.load(str(written)).model.float(), windows, storage=StateStorage.of("int4"))
    assert Manifest.read(written).measured.pruned_loss == pytest.approx(losses.loss, abs=1e-6)
    again = distill(replace(asked, student=str(written), output=str(tmp_path / "again"), state_dtype=None))
    assert again.distillation.state_dtype == "int4"
    with pytest.raises(ghostssm.errors.InputError, match="state dtype is tiers; expected one of float32"):
        distill(replace(asked, state_dtype="tiers"))


def test_distilled_twice(request_of: Callable[..., DistillRequest], tmp_path: Path) -> None:
    asked = request_of(steps=2)
    distill(asked)
    second = distill(replace(asked, student=asked.output, output=str(tmp_path / "again"), steps=3))
    assert Manifest.read(second.written).method == "ghost+distill2+distill3"
    assert [each.steps for each in Manifest.read(second.written).distillations] == [2, 3]


@pytest.mark.parametrize("recipe", ["balanced", "balanced+per-layer"])
def test_own_class(request_of: Callable[..., DistillRequest], recipe: str) -> None:
    outcome = distill(request_of(recipe))
    assert ghostssm.verify(outcome.written).passed
    assert outcome.distillation.best.divergence < outcome.distillation.curve[0].divergence


def test_pruned_elsewhere(request_of: Callable[..., DistillRequest], tmp_path: Path) -> None:
    """Without plan and manifest; in bfloat16, whose weights that do not move stay bit by bit."""
    asked = request_of()
    student = Path(asked.student)
    model = ghostssm.load(asked.student).model.to(torch.bfloat16)
    for file in ("ghostssm.json", "plan.json", "plan.tensors", "README.md"):
        (student / file).unlink()
    model.save_pretrained(student)
    before = ghostssm.load(asked.student).model
    outcome = distill(asked)
    verification = ghostssm.verify(outcome.written)
    assert verification.passed, verification
    assert "there is no plan: the state was cut by others, and ghostssm distilled the model" in verification.notes
    assert "## Distilled by ghostssm" in (outcome.written / "README.md").read_text()
    after = ghostssm.load(str(outcome.written)).model
    assert after.dtype == torch.bfloat16
    for name, value in after.named_parameters():
        assert torch.equal(value, before.get_parameter(name)) == (".mixer." not in name), name


def test_a_tied_head_stays_tied(request_of: Callable[..., DistillRequest]) -> None:
    outcome = distill(request_of(trained="all"))
    assert ghostssm.verify(outcome.written).passed
    model = ghostssm.load(str(outcome.written)).model
    assert model.lm_head.weight is model.backbone.embeddings.weight
    assert outcome.distillation.best.divergence < outcome.distillation.curve[0].divergence


def test_the_command(run: Run, request_of: Callable[..., DistillRequest], tmp_path: Path) -> None:
    asked = request_of()
    options = ["--teacher", asked.teacher, "--text", asked.text, "--steps", 4, "--batch", 4, "--window-length", 40]
    verb = ["distill", asked.student, *options, "--evaluate", tmp_path / "other.txt", "--output", asked.output]
    code, out, err = run(*verb)
    assert code == 0, err
    assert "4 steps, 640 tokens of text.txt; all steps were taken" in out
    assert "excess loss on other.txt" in out
    assert "tokens/s" in err
    code, out, _ = run(*verb, "--resume", "--json")
    assert (code, json.loads(out)["steps"]) == (0, 4)
    assert run(*verb)[0] == 2
    options = ["--calibration", asked.text, "--text", tmp_path / "other.txt", "--windows", 8, "--window-length", 40]
    verb = ["compare", asked.teacher, "--state-size", 4, "--methods", "ghost", "ghost+distill2", "--batch", 1]
    code, out, err = run(*verb, *options)
    assert code == 0, err
    assert "ghost+distill2" in out
    assert "ghost+distill2 saw gradients through the whole model, on 560 tokens" in err
    code, out, err = run(*verb[:-4], *verb[-3:], "--state-dtype", "float32", "int8", "int4", "--json", *options)
    assert code == 0, err
    rows = {(row["method"], row["state_dtype"]) for row in json.loads(out) if "distill" in row["method"]}
    trained = "ghost+distill2 trained in int4"
    assert rows == {("ghost+distill2", "float32"), ("ghost+distill2", "int8"), (trained, "int4")}


def _faulty(asked: DistillRequest, tmp_path: Path, **sizes: Any) -> str:
    folder = tmp_path / f"faulty-{len(list(tmp_path.iterdir()))}"
    shutil.copytree(asked.teacher, folder)
    tiny_model(**sizes).save_pretrained(folder)
    return str(folder)


def test_bad_input(run: Run, request_of: Callable[..., DistillRequest], tmp_path: Path) -> None:
    asked = request_of()

    def refused(**changes: Any) -> str:
        now = replace(asked, **changes)
        code, out, err = run(
            *("distill", now.student, "--teacher", now.teacher, "--text", now.text, "--output", now.output),
            *("--batch", now.batch, "--window-length", now.window_length, "--steps", 2),
            *(["--evaluate", *now.evaluate] if now.evaluate else ()),
            *(["--log-to", now.log_to] if now.log_to else ()),
        )
        assert (code, out) == (2, ""), err
        assert "Traceback" not in err
        assert not list(tmp_path.glob("healed*"))
        return err

    other = _faulty(asked, tmp_path, vocab_size=300, num_hidden_layers=2)
    assert "don't fit: vocabulary 288 and 300, layers 3 and 2; expected the model that" in refused(teacher=other)
    assert "windows of 40 tokens, of which" in refused(batch=10000)
    assert "fewer tokens than one window" in refused(window_length=100000)
    assert "is to be trained on and to be measured on" in refused(evaluate=(asked.text,))
    assert "No text at" in refused(text=str(tmp_path / "nothing.txt"))
    config = Path(other) / "config.json"
    tiny_model().save_pretrained(other)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": "awq"}}))
    assert "is quantised (quantization_config in config.json: awq)" in refused(student=other)
    assert "distil the unquantised model" in refused(student=other)
    if importlib_missing("wandb"):
        assert "--log-to wandb needs" in refused(log_to="wandb")


def importlib_missing(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is None


def test_other_tokenizers(request_of: Callable[..., DistillRequest], tmp_path: Path) -> None:
    asked = request_of()
    other = _faulty(asked, tmp_path)
    file = Path(other) / "tokenizer.json"
    document = json.loads(file.read_text())
    vocabulary = document["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(document))
    with pytest.raises(ghostssm.InputError, match="Student and teacher have tokenizers that differ"):
        distill(replace(asked, teacher=other))


def test_no_room(request_of: Callable[..., DistillRequest], monkeypatch: pytest.MonkeyPatch) -> None:
    """How much is needed, and what each option would need."""
    monkeypatch.setattr(distill_checks, "_free_bytes", lambda device: 1 << 18)
    with pytest.raises(ghostssm.InputError, match=r"take \d+\.\d KiB, and cpu has 256.0 KiB free. What lowers it: "
                       r"--train mixers \(\d+\.\d KiB\), --train small \(\d+\.\d KiB\), --bfloat16"):  # fmt: skip
        distill(request_of(trained="all"))


class _Died(BaseException):
    """What no handler catches."""


def _ending_at(step: int, monkeypatch: pytest.MonkeyPatch, end: Callable[[], None]) -> None:
    take_step = Training.take_step

    def ended(self: Training) -> float:
        if self.step == step:
            end()
        return take_step(self)

    monkeypatch.setattr(Training, "take_step", ended)


def _die() -> None:
    raise _Died


@pytest.mark.parametrize("step", [0, 1, 5])
def test_going_on(
    request_of: Callable[..., DistillRequest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """To the same bits, with the same curve."""
    asked = request_of(save_minutes=0.0)
    expected = distill(replace(asked, output=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        _ending_at(step, patch, _die)
        with pytest.raises(_Died):
            distill(asked)
    with pytest.raises(ghostssm.OutputError, match="holds a distillation that ended early; pass --resume"):
        distill(asked)
    with pytest.raises(ghostssm.OutputError, match=r"differs in learning_rate: it was 0\.01, now it is 0\.5"):
        distill(replace(asked, learning_rate=0.5, resume=True))
    found = distill(replace(asked, resume=True))
    assert found.distillation == expected.distillation
    assert_same_checkpoint(tmp_path / "whole", found.written)
    assert not (tmp_path / "healed.run").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(
    run: Run,
    request_of: Callable[..., DistillRequest],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    code: int,
) -> None:
    asked = request_of()
    _ending_at(2, monkeypatch, lambda: os.kill(os.getpid(), number))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    try:
        found, out, err = run(
            *("distill", asked.student, "--teacher", asked.teacher, "--text", asked.text, "--output", asked.output),
            *("--steps", 4, "--window-length", 40, "--save-minutes", 0),
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert (found, out) == (code, "")
    assert f"What was kept last is in {asked.output}.run: give the same command with --resume to go on." in err
    assert not Path(asked.output).exists()


def _child(asked: DistillRequest, begun: Path) -> None:
    torch.set_num_threads(1)
    begun.touch()
    distill(replace(asked, resume=True))


@pytest.mark.parametrize("moments", [2, pytest.param(15, marks=pytest.mark.slow)])
def test_killed_at_random_moments(request_of: Callable[..., DistillRequest], tmp_path: Path, moments: int) -> None:
    """Runs are killed again and again, and go on each time."""
    asked = request_of(save_minutes=0.0, steps=12)
    expected = distill(replace(asked, output=str(tmp_path / "whole")))
    context = fork_server()
    chance, killed, length = random.Random(0), 0, 0.0
    for number in range(10 * moments):
        marker = tmp_path / f"begun-{number}"
        child = context.Process(target=_child, args=(asked, marker))
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
        if Path(asked.output).exists() and not Path(f"{asked.output}.run").exists():
            assert_same_checkpoint(tmp_path / "whole", Path(asked.output))
            shutil.rmtree(asked.output)
        if killed == moments:
            break
    found = distill(replace(asked, resume=True))
    assert_same_checkpoint(tmp_path / "whole", found.written)
    assert found.distillation == expected.distillation


def _worker(rank: int, size: int, port: int, results: Any, asked: DistillRequest) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    results.put(distill(asked))


def _together(size: int, asked: DistillRequest) -> DistillOutcome:
    context = fork_server()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = context.Queue()
    children = [context.Process(target=_worker, args=(rank, size, port, results, asked)) for rank in range(size)]
    for child in children:
        child.start()
    found = [results.get(timeout=120) for _ in children]
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert found[0].distillation == found[-1].distillation
    outcome: DistillOutcome = found[0]
    return outcome


@pytest.mark.parametrize(("recipe", "trained", "hidden_weight"), [("ghost", "all", 3.0), ("balanced", "mixers", 0.0)])
def test_two_processes(
    request_of: Callable[..., DistillRequest], tmp_path: Path, recipe: str, trained: Any, hidden_weight: float
) -> None:
    """Student and teacher sharded by FSDP2: the losses of one process, all along the curve."""
    asked = request_of(
        recipe,
        trained=trained,
        hidden_weight=hidden_weight,
        learning_rate=1e-3,
        save_minutes=0.0,
        checkpointing=True,
    )
    expected, found = distill(replace(asked, output=str(tmp_path / "one"))), _together(2, asked)
    assert ghostssm.verify(found.written).passed
    for one, two in zip(expected.distillation.curve, found.distillation.curve, strict=True):
        assert two.divergence == pytest.approx(one.divergence, abs=1e-5)
        assert two.excess.mean == pytest.approx(one.excess.mean, abs=1e-5)
    assert not (tmp_path / "healed.run").exists()


def test_a_student_of_our_own_class_fits_the_family_that_it_was_pruned_from() -> None:
    teacher = replace(ghostssm.describe("reference"), family="bamba")
    distill_checks._check_pair(replace(teacher, family="ghost_bamba"), teacher)
    with pytest.raises(ghostssm.InputError, match="family 'mamba2' and 'bamba'"):
        distill_checks._check_pair(replace(teacher, family="ghost_mamba2"), teacher)
