"""Numbers beyond float16: a warning that names the layer, a probe that can be read, and no NaN in what is written."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import ghostssm
from ghostssm.checkpoint.probe import probe_in, probe_tokens, probed
from ghostssm.errors import GhostWarning, NumericalError, PrecisionWarning
from ghostssm.models.mixer import Mixer
from ghostssm.recovery import repair
from tests.cli.test_cli import prune_arguments
from tests.conftest import Run, random_windows, tiny_model
from tests.families.tiny import CASES, tiny_hybrid

CONVERTED = ("--format", "transformers", "--no-tokenizer")
WINDOWS = random_windows(2, 24)
NAMED = r"In float16, in which the weights are stored, the output of backbone\.layers\.1 is not finite"


@torch.no_grad()
def overflowing(dtype: torch.dtype = torch.float16) -> PreTrainedModel:
    """Weights that fit in float16; what the second layer makes of them does not."""
    model = tiny_model()
    mixer = model.backbone.layers[1].mixer
    mixer.in_proj.weight[64:128].normal_(std=1e4)  # x
    return model.to(dtype)


@pytest.fixture
def overflows(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path / "model"
    overflowing().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def prune_loaded(folder: Path, output: Path, recipe: str, dialect: str = "transformers") -> Path:
    checkpoint = ghostssm.load(str(folder))
    plan = ghostssm.Calibration(checkpoint.model, WINDOWS).plan(recipe, 5)
    smaller = ghostssm.Checkpoint(ghostssm.apply_plan(checkpoint.model, plan), checkpoint.tokenizer, checkpoint.source)
    return ghostssm.save(smaller, plan, output, dialect=dialect)  # type: ignore[arg-type]


def prune_streamed(folder: Path, output: Path, recipe: str) -> Path:
    ghostssm.prune_streamed(ghostssm.stream(str(folder), head=False), WINDOWS, recipe, 5, output)
    return output


ROADS = [prune_loaded, prune_streamed]


@pytest.mark.parametrize("recipe", ["ghost", "magnitude"])
def test_both_roads_warn_and_write_the_same_probe(overflows: Path, tmp_path: Path, recipe: str) -> None:
    manifests = []
    for road in ROADS:
        output = tmp_path / road.__name__
        with pytest.warns(PrecisionWarning, match=NAMED):
            road(overflows, output, recipe)
        manifest = json.loads((output / "ghostssm.json").read_text())
        manifests.append(manifest)
        assert manifest["overflow"] == {"dtype": "float16", "part": "backbone.layers.1"}
        assert manifest["probe"]["dtype"] == "float32"
        found = ghostssm.verify(output)
        assert found.passed
        assert "computed in float32" in next(check.detail for check in found.checks if check.name == "logits")
        assert any(re.search(NAMED, note) for note in found.notes)
    assert manifests[0]["probe"] == manifests[1]["probe"]


def test_a_projected_model_and_the_other_dialect(overflows: Path, tmp_path: Path) -> None:
    for recipe, dialect in (("balanced", "transformers"), ("ghost", "mamba_ssm")):
        with pytest.warns(PrecisionWarning, match=NAMED):
            written = prune_loaded(overflows, tmp_path / dialect, recipe, dialect)
        assert ghostssm.verify(written).passed


@pytest.mark.parametrize("stream", [False, True])
def test_the_command_warns(overflows: Path, text_file: Path, tmp_path: Path, run: Run, stream: bool) -> None:
    options = ["--method", "ghost", *(["--stream"] if stream else [])]
    code, out, err = run(*prune_arguments(overflows, text_file, tmp_path / "out"), *options)
    assert code == 0, err
    assert re.search(f"warning: {NAMED}.*bfloat16 or float32", err)
    assert "warning" not in out
    code, out, _ = run("verify", tmp_path / "out")
    assert code == 0, err
    code, _, err = run("generate", tmp_path / "out", "--prompt", "abc", "--max-new-tokens", "3")
    assert code == 2
    assert "NaN or Inf in the logits of" in err
    code, _, err = run("export", tmp_path / "out", *CONVERTED[:2], "--dtype", "bf16", "--output", tmp_path / "wider")
    assert code == 0, err
    assert "warning" not in err
    code, out, err = run("generate", tmp_path / "wider", "--prompt", "abc", "--max-new-tokens", "3")
    assert code == 0, err


def test_export_to_a_dtype_that_is_too_narrow_warns(tmp_path: Path, run: Run) -> None:
    overflowing(torch.float32).save_pretrained(tmp_path / "model")
    code, _, err = run("export", tmp_path / "model", *CONVERTED, "--dtype", "f16", "--output", tmp_path / "out")
    assert code == 0, err
    assert re.search(f"warning: {NAMED}", err)
    for dtype in ("f32", "bf16"):
        code, _, err = run("export", tmp_path / "model", *CONVERTED, "--dtype", dtype, "--output", tmp_path / dtype)
        assert (code, "warning" in err) == (0, False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_without_an_overflow_is_silent(tmp_path: Path, dtype: torch.dtype) -> None:
    tiny_model().to(dtype).save_pretrained(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        written = prune_loaded(tmp_path / "model", tmp_path / "out", "ghost")
    manifest = json.loads((written / "ghostssm.json").read_text())
    assert "overflow" not in manifest
    assert manifest["probe"]["tolerance"] == 1e-3
    assert ghostssm.verify(written).passed


@pytest.mark.parametrize("case", ["mamba2", *CASES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_is_what_transformers_computes_in_float32(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    model = tiny_model() if case == "mamba2" else tiny_hybrid(case)
    model.to(dtype).save_pretrained(tmp_path)
    ids = probe_tokens(model.config.vocab_size)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        logits = stock(torch.tensor([ids])).logits[0].double()
    probe, overflow = probed(tmp_path)
    assert overflow is None
    torch.testing.assert_close(torch.tensor(probe.mean, dtype=torch.float64), logits.mean(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor(probe.largest, dtype=torch.float64), logits.amax(-1), rtol=1e-4, atol=1e-5)
    half = probe_in(ghostssm.find_source(str(tmp_path)), ids, dtype)  # as older manifests have it
    assert half is not None
    assert half.dtype == str(dtype).removeprefix("torch.")


def test_a_probe_of_half_precision_still_verifies(tmp_path: Path) -> None:
    """As written by earlier versions."""
    tiny_model().half().save_pretrained(tmp_path / "model")
    written = prune_loaded(tmp_path / "model", tmp_path / "out", "ghost")
    older = probe_in(ghostssm.find_source(str(written)), probe_tokens(288), torch.float16)
    assert older is not None
    file = written / "ghostssm.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"probe": vars(older)}))
    found = ghostssm.verify(written)
    assert found.passed
    assert any("computed in float16" in check.detail for check in found.checks)


@pytest.mark.parametrize("road", ROADS)
def test_a_repaired_weight_that_the_stored_dtype_cannot_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, road: Callable[..., Path]
) -> None:
    tiny_model().half().save_pretrained(tmp_path / "model")

    def huge(mixer: Mixer, *_: Any) -> float:
        """Numbers that float32 holds and float16 does not."""
        with torch.no_grad():
            mixer.out_proj.weight *= 1e6
        return 1.0

    monkeypatch.setattr(repair, "repair_output", huge)
    with pytest.raises(
        NumericalError,
        match=r"layers\.0\.mixer\.out_proj\.weight .*65504.*export MODEL --format transformers --dtype bf16",
    ):
        road(tmp_path / "model", tmp_path / "out", "ghost+repair")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_projection_that_the_stored_dtype_cannot_hold(tmp_path: Path) -> None:
    tiny_model().half().save_pretrained(tmp_path / "model")
    checkpoint = ghostssm.load(str(tmp_path / "model"), dtype=torch.float32)
    plan = ghostssm.Calibration(checkpoint.model, WINDOWS).plan("balanced", 5)
    narrow = ghostssm.load(str(tmp_path / "model")).model
    before = {name: value.clone() for name, value in narrow.state_dict().items()}
    first = next(iter(plan.projections.values()))
    first.B.mul_(1e6)
    with pytest.raises(NumericalError, match=r"layers\.0\.mixer\.B_projection of the pruned model has numbers up to"):
        ghostssm.apply_plan(narrow, plan)
    assert all(torch.equal(value, before[name]) for name, value in narrow.state_dict().items())


@pytest.mark.parametrize("dialect", ["transformers", "mamba_ssm"])
def test_nothing_that_is_not_finite_is_written(tmp_path: Path, dialect: str) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    checkpoint = ghostssm.load(str(tmp_path / "model"))
    plan = ghostssm.Calibration(checkpoint.model, WINDOWS).plan("ghost", 5)
    ghostssm.apply_plan(checkpoint.model, plan)
    checkpoint.model.backbone.layers[2].mixer.D.data[1] = float("nan")
    with pytest.raises(NumericalError, match=r"layers\.2\.mixer\.D would be written with NaN"):
        ghostssm.save(checkpoint, plan, tmp_path / "out", dialect=dialect)  # type: ignore[arg-type]
    with pytest.raises(NumericalError, match=r"layers\.2\.mixer\.D would be written with NaN"):
        ghostssm.export_checkpoint(checkpoint, tmp_path / "out", dialect=dialect)  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("road", ROADS)
def test_activations_beyond_float32_are_an_error_without_calibration_too(
    tmp_path: Path, road: Callable[..., Path]
) -> None:
    """`random` looks at no number."""
    model = tiny_model(residual_in_fp32=True)
    with torch.no_grad():
        model.backbone.layers[0].mixer.in_proj.weight.fill_(1e38)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(NumericalError, match=r"NaN or Inf in the output of backbone\.layers\.0, in float32"):
        road(tmp_path / "model", tmp_path / "out", "random")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:.* stored as float32 in a float16 checkpoint")
def test_loading_in_a_dtype_that_is_too_narrow_blames_the_dtype(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.backbone.layers[1].mixer.D[0] = 1e6
    model.save_pretrained(tmp_path)
    message = r"layers\.1\.mixer\.D in .* beyond 65504, the largest of float16"
    with pytest.raises(NumericalError, match=message):
        ghostssm.load(str(tmp_path), dtype=torch.float16)
    with (
        pytest.raises(NumericalError, match=message),
        ghostssm.stream(str(tmp_path), dtype=torch.float16).blocks.opened(1),
    ):
        pass
    # Most of the weights in float16, one in float32: the loaded model would have infinity there.
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    mixed = {name: value if name.endswith("1.mixer.D") else value.half() for name, value in tensors.items()}
    safetensors.torch.save_file(mixed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericalError, match=r"--dtype bf16"):
        ghostssm.load(str(tmp_path))


@pytest.mark.parametrize("road", [ghostssm.load, ghostssm.stream], ids=["in memory", "streamed"])
def test_tensors_that_are_stored_wider_are_named(tmp_path: Path, road: Callable[..., Any]) -> None:
    """Some keep A_log, D and dt_bias in float32; transformers loads all of a model in one dtype."""
    model = tiny_model().to(torch.bfloat16)
    for block in model.backbone.layers:
        block.mixer.A_log.data = block.mixer.A_log.data.float()
    model.save_pretrained(tmp_path / "model")
    with pytest.warns(GhostWarning, match=r"A_log and 2 more of .* are stored as float32 in a bfloat16 checkpoint"):
        road(str(tmp_path / "model"))
