"""Streamed runs, against the same work on a model in memory."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from benchmarks.streaming import write_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import ghostssm
from ghostssm.calibration.scratch import Scratch
from ghostssm.checkpoint.manifest import MANIFEST_FILE, RECORD_FILE
from ghostssm.checkpoint.weights import stored_tensors
from ghostssm.evaluation.perplexity import measurement_of
from ghostssm.files.held_run import run_folder_of
from ghostssm.streaming.run_folder import RunFolder
from tests.conftest import random_windows, tiny_model
from tests.families.tiny import CASES, tiny_hybrid
from tests.programs import in_process

WINDOWS = random_windows(9, 200)  # two batches of them
HELD_OUT = random_windows(7, 200, seed=1)


def model_of(case: str) -> PreTrainedModel:
    return tiny_model(n_groups=2) if case == "mamba2" else tiny_hybrid(case)


def saved(model: PreTrainedModel, folder: Path) -> str:
    model.save_pretrained(folder, max_shard_size="40KB")
    return str(folder)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor.read() for name, tensor in stored_tensors(folder).items()}


def assert_same_checkpoint(one: Path, other: Path) -> None:
    """Every tensor bit by bit, and every other file byte by byte, but for how the manifest lists the weight files."""
    expected, found = tensors_of(one), tensors_of(other)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name
    for file in one.iterdir():
        if file.name == MANIFEST_FILE:
            assert facts_of(other) == facts_of(one)
        elif not file.name.startswith("model"):
            assert (other / file.name).read_bytes() == file.read_bytes(), file.name
    assert ghostssm.verify(other).passed


def facts_of(folder: Path) -> dict[str, Any]:
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    return {key: value for key, value in manifest.items() if key not in ("files", "probe")}


def pruned_in_memory(
    spec: str, output: Path, recipe: str, dialect: str = "transformers", untie: bool = False, **options: Any
) -> Path:
    written: dict[str, Any] = {"dialect": dialect, "untie": untie}
    checkpoint = ghostssm.load(spec)
    plan = ghostssm.Calibration(checkpoint.model, WINDOWS).plan(recipe, 5, **options)
    checkpoint = dataclasses.replace(checkpoint, model=ghostssm.apply_plan(checkpoint.model, plan))
    ghostssm.save(checkpoint, plan, output, **written)
    dense, after = (
        ghostssm.evaluate(ghostssm.load(str(where), dtype=torch.float32).model, HELD_OUT) for where in (spec, output)
    )
    measured = measurement_of(HELD_OUT, dense, after)
    return ghostssm.save(checkpoint, plan, output, measured=measured, overwrite=True, **written)


def pruned_from_files(spec: str, output: Path, recipe: str, **options: Any) -> Path:
    checkpoint = ghostssm.stream(spec, head=False)
    run = ghostssm.prune_streamed(checkpoint, WINDOWS, recipe, 5, output, held_out=HELD_OUT, **options)
    assert run.measured is not None
    assert run.measured.as_json() == facts_of(output)["measured"]
    return output


def test_a_refit_heeds_the_dtype_on_both_roads(tmp_path: Path) -> None:
    spec, recipe = saved(tiny_model(), tmp_path / "model"), "magnitude+refit3"
    checkpoint = ghostssm.load(spec)
    plans = {
        dtype: ghostssm.Calibration(checkpoint.model, WINDOWS).plan(recipe, 5, state_dtype=dtype)
        for dtype in (None, "int4")
    }
    output = pruned_from_files(spec, tmp_path / "out", recipe, state_dtype="int4")
    expected = dict(ghostssm.apply_plan(checkpoint.model, plans["int4"]).named_parameters())
    for name, value in ghostssm.load(output).model.named_parameters():
        assert torch.equal(value, expected[name]), name
    changed = plans["int4"].changes
    assert any(not torch.equal(value, plans[None].changes[name]) for name, value in changed.items())


@pytest.mark.parametrize("case", ["mamba2", *CASES])
def test_opened_blocks_hold_what_a_loaded_model_holds(case: str, tmp_path: Path) -> None:
    spec = saved(model_of(case).to(torch.bfloat16), tmp_path / "model")
    loaded, streamed = ghostssm.load(spec).model, ghostssm.stream(spec).blocks
    expected = dict(loaded.named_parameters(remove_duplicate=False)) | dict(loaded.named_buffers())
    names = {id(module): name for name, module in streamed.model.named_modules()}
    seen = set()
    for index, module in enumerate(streamed.modules):
        with streamed.opened(index) as block:
            for name, value in (*block.named_parameters(remove_duplicate=False), *block.named_buffers()):
                whole = f"{names[id(module)]}.{name}"
                assert value.dtype == expected[whole].dtype
                assert torch.equal(value, expected[whole]), whole
                seen.add(whole)
        assert all(value.is_meta for value in module.parameters())
    for name in set(expected) - seen:
        assert torch.equal(streamed.model.get_parameter_or_buffer(name), expected[name]), name


@pytest.mark.parametrize(
    ("case", "recipe", "groups"),
    [
        ("mamba2", "ghost", "pooled"),
        ("mamba2", "output+refit5+repair", "equal"),
        ("mamba2", "random", "pooled"),
        ("mamba2", "sparsegpt", "equal"),
        ("zamba2", "ghost", "pooled"),
        ("zamba2", "output+refit5+repair", "equal"),
        ("falcon_h1", "magnitude+repair", "pooled"),
        ("nemotron_h", "ghost", "equal"),
        ("granite", "ghost", "pooled"),
        ("mamba2", "balanced", "equal"),
        ("mamba2", "balanced+refit5+repair", "equal"),
        ("mamba2", "ghost+per-layer", "pooled"),
        ("mamba2", "balanced+repair+per-layer", "equal"),
        ("mamba2", "magnitude+per-layer", "equal"),
        ("zamba2", "balanced+refit5+repair", "equal"),
        ("zamba2", "ghost+per-layer", "equal"),
        ("falcon_h1", "balanced+per-layer", "equal"),
        ("nemotron_h", "balanced", "equal"),
        ("granite", "balanced", "equal"),
        ("granite", "output+repair+per-layer", "equal"),
        ("bamba", "balanced+repair", "equal"),
    ],
)
def test_pruned_from_files_is_pruned_in_memory(case: str, recipe: str, groups: str, tmp_path: Path) -> None:
    spec = saved(model_of(case).to(torch.bfloat16), tmp_path / "model")
    expected = pruned_in_memory(spec, tmp_path / "memory", recipe, groups=groups)
    found = pruned_from_files(spec, tmp_path / "files", recipe, groups=groups)
    assert_same_checkpoint(expected, found)
    assert len(list(found.glob("*.safetensors"))) > 3
    assert not facts_of(found)["left_out"]["tensors"]
    AutoModelForCausalLM.from_pretrained(found, trust_remote_code=False)  # warnings are errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["files", "memory", "model"]


@pytest.mark.parametrize(
    ("case", "recipe", "options"),
    [
        ("mamba2", "ghost", {"untie": True}),
        ("mamba2", "balanced", {"untie": True}),
        ("granite", "random", {"untie": True}),
        ("mamba2", "output+repair", {"dialect": "mamba_ssm", "groups": "pooled"}),
        ("codestral-mamba", "random", {"dialect": "mamba_ssm"}),
    ],
)
def test_other_forms_of_the_output(case: str, recipe: str, options: dict[str, Any], tmp_path: Path) -> None:
    spec = saved(model_of(case).to(torch.bfloat16), tmp_path / "model")
    expected = pruned_in_memory(spec, tmp_path / "memory", recipe, **options)
    found = pruned_from_files(spec, tmp_path / "files", recipe, **options)
    assert_same_checkpoint(expected, found)
    assert HEAD in tensors_of(found)


@pytest.mark.parametrize(
    ("case", "recipe", "options", "message"),
    [
        ("zamba2", "ghost", {"untie": True}, "share nothing but the head's weight"),
        ("mamba2", "balanced", {"dialect": "mamba_ssm"}, "no model class for projected states"),
        ("granite", "ghost", {"dialect": "mamba_ssm"}, "no granitemoehybrid models"),
    ],
)
def test_forms_that_no_file_has_are_refused_before_any_work(
    case: str, recipe: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    spec = saved(model_of(case), tmp_path / "model")
    with pytest.raises(ghostssm.InputError, match=message):
        pruned_from_files(spec, tmp_path / "out", recipe, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_sizes_that_come_out_equal_leave_the_stock_class(tmp_path: Path) -> None:
    """Nemotron-H's files have other names than the model has in memory, and our own class would keep the latter."""
    spec = saved(model_of("nemotron_h"), tmp_path / "model")
    expected = pruned_in_memory(spec, tmp_path / "memory", "magnitude+per-layer", multiple=5)
    found = pruned_from_files(spec, tmp_path / "files", "magnitude+per-layer", multiple=5)
    assert_same_checkpoint(expected, found)
    assert ghostssm.describe(str(found)).is_stock


def test_a_streamed_checkpoint_can_be_pruned_again(tmp_path: Path) -> None:
    spec = saved(tiny_model(), tmp_path / "model")
    checkpoint = ghostssm.stream(spec)
    for size in (4, 12):
        plan = ghostssm.prune_streamed(checkpoint, WINDOWS, "ghost", size, tmp_path / f"to {size}").plan
        assert (plan.state_size, plan.kept_state_size) == (16, size)
        assert ghostssm.verify(tmp_path / f"to {size}").passed


def test_from_the_other_dialect(tmp_path: Path) -> None:
    """Tensors under mamba_ssm's names, in one pickled file."""
    checkpoint = ghostssm.load(saved(tiny_model(n_groups=2), tmp_path / "model"))
    plan = ghostssm.Calibration(checkpoint.model, WINDOWS).plan("random", 12)
    ghostssm.apply_plan(checkpoint.model, plan)
    spec = str(ghostssm.save(checkpoint, plan, tmp_path / "other", dialect="mamba_ssm"))
    expected = pruned_in_memory(spec, tmp_path / "memory", "ghost")
    assert_same_checkpoint(expected, pruned_from_files(spec, tmp_path / "files", "ghost"))


@pytest.mark.parametrize("case", ["mamba2", "zamba2", "granite"])
@pytest.mark.parametrize("offload", [False, True])
def test_evaluated_from_files(case: str, offload: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ghostssm.calibration.capture._LARGE_BYTES", 1)
    spec = saved(model_of(case), tmp_path / "model")
    expected = ghostssm.evaluate(ghostssm.load(spec, dtype=torch.float32).model, WINDOWS)
    blocks = ghostssm.stream(spec, dtype=torch.float32).blocks
    scratch = Scratch(tmp_path / "scratch") if offload else None
    assert torch.equal(ghostssm.evaluate(blocks, WINDOWS, scratch=scratch).losses, expected.losses)
    with torch.inference_mode():
        logits = model_of(case)(WINDOWS.ids).logits[:, :-1]
    stock = torch.nn.functional.cross_entropy(logits.flatten(0, 1), WINDOWS.ids[:, 1:].flatten())
    assert expected.loss == pytest.approx(stock.item(), rel=1e-5)


def test_scratch_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that grows with the windows in files: the same result, and nothing left behind."""
    monkeypatch.setattr("ghostssm.calibration.capture._LARGE_BYTES", 1)
    spec = saved(tiny_hybrid("zamba2"), tmp_path / "model")
    recipe = "output+repair"
    expected = pruned_from_files(spec, tmp_path / "memory", recipe)
    found = pruned_from_files(spec, tmp_path / "files", recipe, offload=tmp_path / "scratch")
    assert_same_checkpoint(expected, found)
    assert list((tmp_path / "scratch").iterdir()) == []

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(ghostssm.OutputError, match=r"no room for .*No space left.*--offload"):
        pruned_from_files(spec, tmp_path / "again", recipe, offload=tmp_path / "scratch")
    assert list((tmp_path / "scratch").iterdir()) == []


def rename(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> str:
    tensors = tensors_of(folder)
    for file in folder.glob("model*"):
        file.unlink()
    safetensors.torch.save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


EMBEDDING, HEAD = "backbone.embeddings.weight", "lm_head.weight"


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors | {HEAD: tensors[EMBEDDING].clone()},
        lambda tensors: tensors | {HEAD: tensors[EMBEDDING] * 2},
        lambda tensors: {HEAD if name == EMBEDDING else name: value for name, value in tensors.items()},
    ],
    ids=["both, the same", "both, different", "the head only"],
)
def test_tied_embeddings(change: Callable[[dict[str, Tensor]], dict[str, Tensor]], tmp_path: Path) -> None:
    model = tmp_path / "model"
    saved(tiny_model(), model)
    spec = rename(model, change)
    expected = pruned_in_memory(spec, tmp_path / "memory", "ghost")
    assert_same_checkpoint(expected, pruned_from_files(spec, tmp_path / "files", "ghost"))
    losses = [
        ghostssm.evaluate(each, WINDOWS).losses for each in (ghostssm.load(spec).model, ghostssm.stream(spec).blocks)
    ]
    assert torch.equal(*losses)


def test_shared_blocks_that_are_stored_more_than_once(tmp_path: Path) -> None:
    model = tmp_path / "model"
    saved(tiny_hybrid("zamba2"), model)

    def again(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        shared = {name for name in tensors if ".1.shared_transformer." in name}
        return tensors | {name.replace(".1.shared", ".5.shared"): tensors[name].clone() for name in shared}

    spec = rename(model, again)
    expected = pruned_in_memory(spec, tmp_path / "memory", "ghost")
    assert_same_checkpoint(expected, pruned_from_files(spec, tmp_path / "files", "ghost"))


@pytest.mark.parametrize("recipe", ["taylor", "taylor-layer+repair", "ghost+distill5"])
def test_recipes_that_need_the_whole_model_are_refused_before_any_work(recipe: str, tmp_path: Path) -> None:
    checkpoint = ghostssm.stream(saved(tiny_model(), tmp_path / "model"))
    with pytest.raises(ghostssm.InputError, match=r"can't be streamed\. Leave out --stream, or take one of .*ghost"):
        ghostssm.prune_streamed(checkpoint, WINDOWS, recipe, 5, tmp_path / "out")
    assert not run_folder_of(tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", ["ghost", "balanced+per-layer"])
def test_a_report_has_what_blocks_alone_tell(
    folder_of: Callable[..., Path], text_file: Path, tmp_path: Path, recipe: str
) -> None:
    """Observations and losses are those of a run in memory; nothing was decoded."""
    asked: dict[str, Any] = {
        "model": str(folder_of()),
        "state_size": 4,
        "recipe": recipe,
        "windows": 3,
        "window_length": 64,
    }
    asked |= {"calibration": str(text_file), "evaluate": str(text_file), "text_windows": 3, "report": True}
    found = {}
    for stream in (False, True):
        output = tmp_path / f"{stream}"
        batches = None if stream else (1,)
        ghostssm.prune(ghostssm.PruneRequest(**asked, output=str(output), stream=stream, batches=batches))
        found[stream] = json.loads((output / RECORD_FILE).read_text())
        assert ghostssm.verify(output).passed
        assert RECORD_FILE not in json.loads((output / MANIFEST_FILE).read_text())["files"]
    for part in ("observations", "losses"):
        assert found[True][part] == found[False][part]
    assert not found[True]["decode"]
    assert "samples" not in found[True]


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    model = tiny_model()
    model.backbone.layers[1].mixer.D.data[0] = float("nan")
    spec = saved(model, tmp_path / "model")
    with pytest.raises(ghostssm.NumericalError, match=r"layers\.1\.mixer\.D"):
        pruned_from_files(spec, tmp_path / "out", "ghost")
    assert not (tmp_path / "out").exists()


def test_a_shard_that_is_cut_short_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = saved(tiny_model(), tmp_path / "model")
    checkpoint = ghostssm.stream(spec, head=False)
    last = stored_tensors(tmp_path / "model")["backbone.layers.2.mixer.in_proj.weight"].file
    os.truncate(last, last.stat().st_size - 100)
    with pytest.raises(ghostssm.ModelError, match="was changed or truncated meanwhile"):
        ghostssm.prune_streamed(checkpoint, WINDOWS, "ghost", 5, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", ["ghost", "balanced", "magnitude"])
def test_no_tensor_is_kept_for_a_block_that_is_done(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small one between a block's large ones breaks up the memory that these leave, and the process grows."""
    record, counts = RunFolder.record, []

    def counted(self: RunFolder, *args: Any, **kwargs: Any) -> None:
        record(self, *args, **kwargs)
        del args, kwargs
        gc.collect()
        counts.append(sum(type(each) in (Tensor, torch.nn.Parameter) for each in gc.get_objects()))

    monkeypatch.setattr(RunFolder, "record", counted)
    checkpoint = ghostssm.stream(saved(tiny_model(num_hidden_layers=5), tmp_path / "model"))
    ghostssm.prune_streamed(checkpoint, WINDOWS, recipe, 5, tmp_path / "out")
    assert counts == counts[:1] * 5


ROOM = 330_000_000
"""Bytes that a run, its compiled loops included, may take beside its libraries.

These take 0.4 GB with a CPU's PyTorch and 0.9 GB with CUDA's.
"""


BLOCK_BYTES = 26_404_224
"""Of a block of hidden size 1024 in float32."""


def in_child(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a program that ends by printing what the system knows of its process."""
    told = "import atexit; atexit.register(lambda: print(open('/proc/self/status').read()))"
    return in_process(f"{told}; {program}", *arguments)


def bytes_of(kind: str, done: subprocess.CompletedProcess[str]) -> int:
    found = re.search(rf"{kind}:\s*(\d+) kB", done.stdout)
    assert found is not None
    return int(found[1]) * 1024


def limited(limit: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The command under a limit on all memory that it allocates, its libraries included."""
    program = (
        f"import resource, runpy; resource.setrlimit(resource.RLIMIT_DATA, ({limit}, {limit})); "
        "runpy.run_module('ghostssm', run_name='__main__')"
    )
    return in_child(program, *arguments)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits and /proc are Linux's")
def test_a_model_of_twice_the_memory(tmp_path: Path, text_file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    libraries = in_child("import ghostssm.streaming.run; from transformers import Mamba2ForCausalLM")
    limit = bytes_of("VmData", libraries) + ROOM
    blocks = 2 * limit // BLOCK_BYTES + 1
    assert write_model(tmp_path / "model", blocks, 1024, torch.float32, one_block=True) >= 2 * limit
    tokenizer.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"chunk_size": 32}))  # what is read at once
    windows = ["--window-length", 32]
    prune = ["prune", tmp_path / "model", "--output", tmp_path / "out", "--state-size", 32, "--method", "ghost"]
    prune += ["--calibration", text_file, "--windows", 1, *windows]
    assert limited(limit, *prune).returncode != 0
    for command in (prune, ["evaluate", tmp_path / "out", "--text", text_file, "--text-windows", 1, *windows]):
        done = limited(limit, *command, "--stream")
        assert done.returncode == 0, done.stderr[-2000:]
        # Libraries that are mapped from files are no allocations; of the model's files only a part is resident.
        assert bytes_of("VmHWM", done) < limit + bytes_of("RssFile", libraries)
