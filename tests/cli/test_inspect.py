"""``ghostssm inspect``."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.cli.test_cli import prune_arguments
from tests.conftest import Run


def test_inspect(run: Run, small: Path) -> None:
    code, out, _ = run("inspect", small, "--state-size", 8, 4)
    assert code == 0
    assert "8 of 8" in out
    assert "50%" in out
    assert "75%" in out
    code, out, _ = run("inspect", small, "--state-size", 4, "--json")
    found = json.loads(out)
    assert (found["layers"], found["layout"]["state_size"]) == (3, 16)
    assert found["cuts"][1]["state_bytes_float32"] == 3 * 8 * 8 * 4 * 4


def test_inspect_lists_engines(run: Run, small: Path) -> None:
    code, out, _ = run("inspect", small, "--state-size", 8, 3)
    assert code == 0
    table = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith(("vllm ", "mlx-lm "))}
    assert table["vllm"] == ["runs", "runs", "runs"]
    assert "computes as for 4" in out
    code, out, _ = run("inspect", small, "--state-size", 8, "--json", "--engine", "mlx-lm", "vllm")
    found = [(advice["engine"], advice["level"]) for advice in json.loads(out)["cuts"][1]["engines"]]
    assert found == [("mlx-lm", "no"), ("vllm", "runs")]
    code, _, err = run("inspect", small, "--engine", "vlm")
    assert code == 2
    assert "No engine is called 'vlm'; expected one of: transformers-cpu" in err
    assert "Did you mean 'vllm'?" in err


def test_inspect_knows_the_dialect_of_the_files(run: Run, small: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    assert run("export", small, "--format", "mamba_ssm", "--output", theirs)[0] == 0
    code, out, _ = run("inspect", theirs, "--state-size", 8, "--engine", "transformers-cpu", "mamba_ssm", "sglang")
    assert code == 0
    table = {
        line.split()[0]: re.split(r"  +", line)[1:] for line in out.splitlines() if re.search("  (after|runs)", line)
    }
    assert table == {
        "transformers-cpu": ["after --format transformers", "runs"],
        "mamba_ssm": ["runs", "after --dialect mamba_ssm"],
        "sglang": ["after --untie", "after --untie"],
    }
    assert "knows no tied head" not in out


@pytest.mark.parametrize(("method", "multiple"), [("ghost+per-layer", ["--multiple", 2]), ("balanced", [])])
def test_inspect_tells_how_a_checkpoint_was_pruned(
    run: Run, small: Path, text_file: Path, tmp_path: Path, method: str, multiple: list[object]
) -> None:
    common = ["--calibration", text_file, "--windows", 8, "--window-length", 64, "--output", tmp_path / "out"]
    options = ["--budget", 0.5, "--method", method, "--evaluate", text_file, "--text-windows", 2, "--json"]
    code, out, _ = run("prune", small, *options, *multiple, *common)
    assert code == 0
    outcome = json.loads(out)
    after = outcome["state_size"]["after"]
    sizes = after if multiple else [after] * 3
    told, label = (" ".join(map(str, sizes)), f"{min(sizes)} to {max(sizes)}") if multiple else ("8", "8")
    code, out, _ = run("inspect", tmp_path / "out")
    assert code == 0
    facts = {line[:14].strip(): line[14:].strip() for line in out.splitlines()[:12]}
    assert facts["state size"] == f"16 -> {told}"
    assert facts["pruned by"] == method
    assert facts["excess loss"].startswith(f"{outcome['measured']['excess_loss']:.4f} ± ")
    assert f"\n{label}  " in out
    assert "50%" in out
    assert out.count("has no class for") == 1
    found = json.loads(run("inspect", tmp_path / "out", "--json")[1])["pruning"]
    assert (found["method"], found["state_size"], found["kept"]) == (method, 16, sizes)
    assert found["measured"]["pruned_loss"] == outcome["measured"]["pruned_loss"]


def test_inspect_tells_padding_from_what_was_kept(run: Run, small: Path, text_file: Path, tmp_path: Path) -> None:
    assert run(*prune_arguments(small, text_file, tmp_path / "out"), "--method", "ghost")[0] == 0
    padded = ["--format", "transformers", "--pad-to", 12, "--output", tmp_path / "padded"]
    assert run("export", tmp_path / "out", *padded)[0] == 0
    out = run("inspect", tmp_path / "padded")[1]
    assert "state size      16 -> 4, padded to 12\n" in out
    assert "25%" in out  # of the state of 16, not of what the cut left
    (tmp_path / "padded" / "ghostssm.json").write_text('{"method": 3, "state_size": {"before": "x"}}')
    assert "state size N    12\n" in run("inspect", tmp_path / "padded")[1]


def test_a_checkpoint_is_served_in_the_dtype_that_it_was_pruned_for(
    run: Run, small: Path, text_file: Path, tmp_path: Path
) -> None:
    arguments = prune_arguments(small, text_file, tmp_path / "out")
    code, out, _ = run(*arguments, "--method", "ghost", "--state-dtype", "bfloat16", "--engine", "vllm")
    assert code == 0
    assert re.search(r"^vllm +bfloat16  no flag: its default$", out, re.MULTILINE)
    assert "sglang" not in out  # which was not named
    code, out, _ = run("inspect", tmp_path / "out", "--memory", "80GiB", "--engine", "vllm")
    assert re.findall(r"^vllm +(float32|bfloat16) +[\d,]+ +[\d,]+$", out, re.MULTILINE) == ["float32", "bfloat16"]
    assert re.search(r"^vllm +float32 +--mamba-ssm-cache-dtype float32$", out, re.MULTILINE)
    assert out.endswith("runs\n")  # no empty line at the end


def test_our_own_class_is_served_by_our_own_loops(run: Run, small: Path, text_file: Path, tmp_path: Path) -> None:
    arguments = prune_arguments(small, text_file, tmp_path / "out")
    code, out, _ = run(*arguments, "--method", "balanced", "--state-dtype", "int8")
    assert code == 0
    assert 'transformers-cpu  int8   ghostssm.accelerate(model, state_dtype="int8")' in out


def test_a_memory_without_room_for_the_weights(run: Run, small: Path) -> None:
    code, out, _ = run("inspect", small, "--memory", "1KiB", "--json")
    assert code == 0
    (cut,) = json.loads(out)["cuts"]
    assert repr(cut["state_size"]) == "16"
    assert {(entry["sequences"], entry["weights"]) for entry in cut["admitted"]} == {(0, 2 * cut["parameters"])}
    assert "The weights alone take" in run("inspect", small, "--memory", "1KiB")[1]
    assert "The weights alone take" not in run("inspect", small, "--memory", "80GiB")[1]


def test_context_without_a_memory_is_refused(run: Run, small: Path) -> None:
    code, out, err = run("inspect", small, "--context", 4096)
    assert (code, out) == (2, "")
    assert "add the memory of a GPU, such as --memory 80GiB" in err


def test_inspect_predicts(run: Run, small: Path) -> None:
    code, out, _ = run("inspect", small, "--state-size", 4, "--batch", 2, "--json")
    assert code == 0
    dense, cut = (cut["predicted_tokens_per_second"]["2"] for cut in json.loads(out)["cuts"])
    assert cut > dense > 0


@pytest.mark.parametrize("engines", [[], ["--engine", "vllm"]])
def test_what_fits_into_so_many_bytes_is_what_prune_chooses_from(
    run: Run, small: Path, text_file: Path, tmp_path: Path, engines: list[str]
) -> None:
    code, out, err = run("inspect", small, "--state-bytes", "1/2", "1/4", *engines, "--json")
    assert code == 0, err
    fits = json.loads(out)["fits"]
    assert {fit["within"] for fit in fits} == {"1/2", "1/4"}
    for fit in fits:
        assert ("vllm" in fit["engines"]) == (fit["state_dtype"] in ("float32", "bfloat16", "float16")), fit
        in_transformers = fit["state_dtype"] == "float32" and not engines
        assert ("transformers-cpu" in fit["engines"]) == in_transformers, fit
    texts = ["--calibration", text_file, "--windows", 4, "--window-length", 64, "--output", tmp_path / "out"]
    code, out, err = run("prune", small, "--state-bytes", "1/2", "--method", "magnitude", *engines, *texts, "--json")
    assert code == 0, err
    keys = ("state_size", "state_dtype", "state_bytes")
    tried = {tuple(each[key] for key in keys) for each in json.loads(out)["choice"]["candidates"]}
    assert tried == {tuple(fit[key] for key in keys) for fit in fits if fit["within"] == "1/2"}
    told = run("inspect", small, "--state-bytes", "1/2", *engines)[1]
    assert "transformers with ghostssm.accelerate" in told or engines
    assert "ghostssm prune --state-bytes measures which of them loses least." in told


def test_bytes_that_say_nothing_are_refused(run: Run, small: Path) -> None:
    for bound, fault in (("3", "expected a share"), ("1MiB", "which is 1,048,576 bytes"), ("40B", "No state fits")):
        code, _, err = run("inspect", small, "--state-bytes", bound)
        assert code == 2
        assert fault in " ".join(err.split())
