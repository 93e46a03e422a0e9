"""The command, run in this process the way its entry point is called."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ghostssm.cli.parsing import _repeat
from ghostssm.units import plus_minus
from tests.conftest import Run


def prune_arguments(model: Path, text: Path, output: Path) -> list[object]:
    windows = ["--windows", 3, "--window-length", 64]
    return ["prune", model, "--state-size", 4, "--calibration", text, "--output", output, *windows]


def test_help_lists_the_verbs(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert all(verb in out for verb in ("inspect", "prune", "compare", "evaluate", "generate"))


def test_prune_writes_a_checkpoint_a_plan_and_a_manifest(
    run: Run, small: Path, text_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    code, out, err = run(*prune_arguments(small, text_file, output))
    assert code == 0
    assert "16 -> 4" in out
    assert str(output) in out
    assert "layers 3/3" in err
    assert {"config.json", "model.safetensors", "plan.json", "ghostssm.json", "tokenizer.json"} <= {
        path.name for path in output.iterdir()
    }
    assert AutoModelForCausalLM.from_pretrained(output).config.state_size == 4
    again = ["--overwrite", "--refit", 2, "--json", "--dialect", "mamba_ssm"]
    code, out, _ = run(*prune_arguments(small, text_file, output), *again)
    assert code == 0
    assert json.loads(out)["state_size"] == {"before": 16, "after": 4}
    assert (output / "pytorch_model.bin").exists()
    assert not (output / "model.safetensors").exists()


def test_a_gpu_that_is_left_idle_is_named(
    run: Run, small: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    code, _, err = run(*prune_arguments(small, text_file, tmp_path / "out"), "--method", "ghost")
    assert code == 0
    assert "computing on the CPU; --device cuda would take the Some GPU" in err


def test_prune_by_share_and_per_layer(run: Run, small: Path, text_file: Path, tmp_path: Path) -> None:
    common = ["--calibration", text_file, "--windows", 8, "--window-length", 64, "--output", tmp_path / "out"]
    options = ["--budget", 0.5, "--method", "balanced", "--per-layer", "--multiple", 2, "--json"]
    code, out, _ = run("prune", small, *options, *common)
    assert code == 0
    sizes = json.loads(out)["state_size"]["after"]
    sizes = sizes if isinstance(sizes, list) else [sizes] * 3
    assert sum(sizes) <= 24
    assert all(size % 2 == 0 for size in sizes)
    code, out, _ = run("inspect", tmp_path / "out", "--json")
    assert json.loads(out)["state_sizes"] == sizes
    code, out, _ = run("evaluate", tmp_path / "out", "--text", text_file, "--window-length", 64)
    assert code == 0
    for verb, told in (("inspect", "the original model"), ("bench", "the model that it was made of")):
        code, _, err = run(verb, tmp_path / "out", "--state-size", 4)
        assert code == 2
        assert told in " ".join(err.split())


def test_prune_to_a_bound_on_the_loss(run: Run, small: Path, text_file: Path, tmp_path: Path) -> None:
    common = ["--calibration", text_file, "--windows", 8, "--window-length", 64, "--output", tmp_path / "out"]
    options = ["--max-excess-loss", 100, "--method", "ghost"]
    code, out, err = run("prune", small, *options, "--json", *common)
    assert code == 0
    assert "calibrating on 8 windows" in err
    assert "2 of these windows are held out to measure the excess loss on; so few make it uncertain" in err
    found = json.loads(out)
    assert found["state_size"]["after"] == 8
    searched = found["searched"]
    assert (searched["max_excess_loss"], searched["held_out_windows"], searched["state_dtype"]) == (100, 2, "int4")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["state_size"] == 8
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["method"] == "ghost"
    assert plan["provenance"]["search"] == searched
    lost = plus_minus(searched["excess_loss"], searched["standard_error"])
    told = f"{lost} nats per token with the state in int4, on 2 held-out"
    assert told in (tmp_path / "out" / "README.md").read_text()
    _, out, _ = run("prune", small, *options, *common, "--overwrite")
    assert f"excess loss               {told} calibration windows" in out
    _, out, _ = run("prune", small, *options, *common, "--overwrite", "--state-dtype", "float32", "--json")
    assert json.loads(out)["searched"]["state_dtype"] == "float32"


@pytest.mark.parametrize(("windows", "few"), [(29, True), (30, False)])
def test_few_held_out_windows_are_told(
    run: Run, small: Path, text_file: Path, tmp_path: Path, windows: int, few: bool
) -> None:
    common = ["--calibration", text_file, "--windows", windows, "--window-length", 64, "--output", tmp_path / "out"]
    code, _, err = run("prune", small, "--max-excess-loss", 100, "--method", "magnitude", *common)
    assert code == 0
    assert ("uncertain" in err) == few


def test_prune_for_engines_takes_the_nearest_size_that_suits(
    run: Run, folder_of: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    arguments = prune_arguments(folder_of(state_size=64), text_file, tmp_path / "out")
    arguments[arguments.index("--state-size") + 1] = 20
    code, out, err = run(*arguments, "--engine", "llama.cpp-cpu", "vllm", "--method", "magnitude", "--json")
    assert code == 0
    assert json.loads(out)["state_size"]["after"] == 32
    assert "state size 32 in place of 20" in err
    assert "llama.cpp-cpu: slow" in err


def test_a_bound_on_the_loss_is_met_among_the_sizes_that_suit(
    run: Run, folder_of: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    common = ["--calibration", text_file, "--windows", 8, "--window-length", 64, "--output", tmp_path / "out"]
    options = ["--max-excess-loss", 100, "--method", "magnitude", "--engine", "llama.cpp-cpu", "--json"]
    code, out, _ = run("prune", folder_of(state_size=96), *options, *common)
    assert code == 0
    told = json.loads(out)
    assert told["state_size"]["after"] == 32
    assert told["searched"]["state_dtype"] == "float32"  # the only one that llama.cpp keeps a state in


def test_prune_measures_for_the_card(run: Run, small: Path, text_file: Path, tmp_path: Path) -> None:
    options = ["--method", "magnitude", "--evaluate", text_file, "--text-windows", 3]
    code, out, _ = run(*prune_arguments(small, text_file, tmp_path / "out"), *options, "--json")
    assert code == 0
    measured = json.loads(out)["measured"]
    assert measured["windows"] == 3
    losses = {}
    for name, folder in (("dense", small), ("pruned", tmp_path / "out")):
        _, out, _ = run("evaluate", folder, "--text", text_file, "--window-length", 64, "--text-windows", 3, "--json")
        losses[name] = json.loads(out)["loss"]
    assert (measured["dense_loss"], measured["pruned_loss"]) == (losses["dense"], pytest.approx(losses["pruned"]))
    assert f"| this model | {measured['pruned_loss']:.4f} |" in (tmp_path / "out" / "README.md").read_text()


def test_prune_ends_with_the_commands_that_come_next(run: Run, small: Path, text_file: Path, tmp_path: Path) -> None:
    arguments = [*prune_arguments(small, text_file, tmp_path / "a folder"), "--method", "magnitude"]
    _, out, _ = run(*arguments)
    assert f"or    ghostssm report '{tmp_path}/a folder'" in out
    (line,) = re.findall(r"^next +ghostssm (evaluate .*)$", out, re.MULTILINE)
    words = [str(text_file) if word == "TEXT" else word for word in shlex.split(line)]
    code, out, err = run(*words, "--window-length", 64)
    assert code == 0, err
    assert "excess loss" in out
    _, out, _ = run(*arguments, "--evaluate", text_file, "--overwrite")
    assert f"next  ghostssm report '{tmp_path}/a folder'" in out
    assert "ghostssm evaluate" not in out


def test_a_failed_upload_leaves_the_checkpoint(
    run: Run, small: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_not_a_token")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    options = ["--method", "magnitude", "--push-to-hub", "org/name"]
    code, _, err = run(*prune_arguments(small, text_file, tmp_path / "out"), *options)
    assert code == 1
    assert "The upload to org/name failed" in err
    assert "Traceback" not in err
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.state_size == 4
    code, _, err = run(*prune_arguments(small, text_file, tmp_path / "two"), "--push-to-hub", "name")
    assert code == 2
    assert "expected ORG/NAME" in err
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "sglang"], "sglang: knows no tied head for mamba2"),
        (["--engine", "mamba_ssm"], "add --dialect mamba_ssm"),
        (["--untie", "--dialect", "mamba_ssm"], "always stores lm_head.weight"),
        (["--engine", "mlx-lm"], "mlx-lm: N' is a multiple of 32"),
        (["--engine", "vllm", "--per-layer"], "vllm has no class for projected states"),
        (["--engine", "vllm", "--method", "balanced"], "vllm has no class for projected states"),
        (["--engine", "vllm", "--method", "taylor"], "known beforehand"),
        (["--engine", "llama"], "Did you mean 'llama.cpp-cpu'?"),
    ],
)
def test_engines_that_refuse(
    run: Run, small: Path, text_file: Path, tmp_path: Path, options: list[object], message: str
) -> None:
    code, _, err = run(*prune_arguments(small, text_file, tmp_path / "out"), *options)
    assert code == 2
    assert message in " ".join(err.split())
    assert not (tmp_path / "out").exists()


def test_the_same_command_twice_writes_the_same_files(run: Run, small: Path, text_file: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        run(*prune_arguments(small, text_file, tmp_path / name), "--refit", 5)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_compare(run: Run, small: Path, text_file: Path) -> None:
    texts = ["--calibration", text_file, "--text", text_file, "--windows", 2, "--window-length", 64]
    code, out, _ = run("compare", small, "--state-size", 8, 4, "--methods", "ghost", "taylor", "--batch", 2, *texts)
    assert code == 0
    rows = [line.split()[:2] for line in out.splitlines()[1:]]
    assert rows[0] == ["dense", "16"]
    assert sorted(map(tuple, rows[1:])) == [("ghost", "4"), ("ghost", "8"), ("taylor", "4"), ("taylor", "8")]
    code, out, _ = run("compare", small, "--state-size", 8, "--methods", "random", "--batch", 1, "--json", *texts)
    dense, random = json.loads(out)
    assert dense["excess"] == 0
    assert random["tokens_per_second"]["1"] > 0
    assert random["state_bytes"] * 2 == dense["state_bytes"]


def test_compare_state_dtypes(run: Run, small: Path, text_file: Path) -> None:
    texts = ["--calibration", text_file, "--text", text_file, "--windows", 2, "--window-length", 64, "--batch", 1]
    dtypes = ["--state-dtype", "float32", "int8", "--state-rounding", "stochastic"]
    code, out, _ = run("compare", small, "--state-size", 8, "--methods", "ghost", *dtypes, *texts)
    assert code == 0
    rows = [tuple(line.split()[:3]) for line in out.splitlines()[1:]]
    assert rows == [
        ("dense", "16", "float32"), ("ghost", "8", "float32"), ("dense", "16", "int8"), ("ghost", "8", "int8"),
    ]  # fmt: skip
    code, out, _ = run("compare", small, "--state-size", 8, "--methods", "ghost", *dtypes[:3], *texts, "--json")
    bytes_of = {(row["method"], row["state_dtype"]): row["state_bytes"] for row in json.loads(out)}
    rows_of_state = 3 * 64
    assert bytes_of["dense", "int8"] == rows_of_state * (16 + 4)
    assert bytes_of["ghost", "float32"] == rows_of_state * 4 * 8


def test_a_narrow_state_is_measured_timed_and_generated_from(run: Run, small: Path, text_file: Path) -> None:
    asked = ["--text", text_file, "--window-length", 100, "--json"]
    plain, narrow = (
        json.loads(run("evaluate", small, *asked, *state)[1])["loss"] for state in ([], ["--state-dtype", "int4"])
    )
    assert plain != narrow
    code, out, _ = run("bench", small, "--batch", 1, "--state-size", 8, "--state-dtype", "int8", "--json")
    assert code == 0
    found = [(row["state_size"], row["state_dtype"], row["state_bytes"]) for row in json.loads(out)["rows"]]
    assert [row[:2] for row in found] == [(16, "float32"), (16, "int8"), (8, "float32"), (8, "int8")]
    assert found[1][2] == 3 * 64 * (16 + 4)
    assert run("generate", small, "--prompt", "abc", "--max-new-tokens", 3, "--state-dtype", "fp8")[0] == 0
    for wrong, said in (
        (["--state-dtype", "int3"], "expected one of"),
        (["--state-rounding", "up"], "is not one of 'nearest'"),
    ):
        for verb in (["evaluate", "--text", text_file], ["generate", "--prompt", "a"], ["bench", "--state-size", 8]):
            code, _, err = run(verb[0], small, *verb[1:], *wrong)
            assert code == 2
            assert said in err


def test_compare_sizes_per_layer(run: Run, small: Path, text_file: Path) -> None:
    texts = ["--calibration", text_file, "--text", text_file, "--windows", 2, "--window-length", 64]
    recipes = ["--methods", "balanced+per-layer", "taylor+per-layer"]
    code, out, _ = run("compare", small, "--state-size", 6, *recipes, "--batch", 1, "--json", *texts)
    assert code == 0
    dense, *rows = json.loads(out)
    for row in rows:
        assert row["stored_state_size"] <= 6 + 1e-9
        share = row["stored_state_size"] / dense["stored_state_size"]
        assert row["state_bytes"] == pytest.approx(share * dense["state_bytes"], abs=1)


def test_evaluate(run: Run, small: Path, text_file: Path) -> None:
    code, out, _ = run("evaluate", small, "--text", text_file, "--window-length", 100, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["loss"] == pytest.approx(sum(found["window_losses"]) / len(found["window_losses"]))
    code, out, _ = run("evaluate", small, "--text", text_file, "--window-length", 100, "--text-windows", 2)
    assert "2 windows of 100 tokens" in out


def test_evaluate_last_words(run: Run, small: Path, tmp_path: Path) -> None:
    passages = tmp_path / "passages.txt"
    passages.write_text("the quick brown fox\n\none two three\n")
    code, out, _ = run("evaluate", small, "--last-words", passages, "--json")
    assert code == 0
    assert json.loads(out)["passages"] == 2
    code, out, _ = run("evaluate", small, "--last-words", passages)
    assert "accuracy" in out
    first, *_ = passages.read_text().splitlines()
    _, out, _ = run("evaluate", small, "--last-words", passages, "--limit", 1, "--json")
    passages.write_text(first)
    assert out == run("evaluate", small, "--last-words", passages, "--json")[1]
    passages.write_text("word\n")
    code, _, err = run("evaluate", small, "--last-words", passages)
    assert code == 2
    assert "fewer than two words" in err


def test_evaluate_copying(run: Run, small: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n * n % 7919:05d} {n % 17:x}; " for n in range(200)))
    code, out, _ = run("evaluate", small, "--text", text, "--copying", "--window-length", 600, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["distance"] == 256
    assert found["copied"]["tokens"] + found["elsewhere"]["tokens"] == 3 * 599
    assert found["copied"]["tokens"] > 0
    code, out, _ = run("evaluate", small, "--text", text, "--copying", "--window-length", 600)
    assert "256 or more tokens before" in out
    code, _, err = run("evaluate", small, "--text", text, "--copying", "--window-length", 100)
    assert code == 2
    assert "windows have 100 tokens" in err


def test_generate(run: Run, small: Path) -> None:
    def printed() -> tuple[int, str, list[str]]:
        code, out, err = run("generate", small, "--prompt", "abc", "--max-new-tokens", 5)
        return code, out, [line for line in err.splitlines() if line != "working ..."]  # said where it takes long

    first = printed()
    assert first[0] == 0
    assert first == printed()
    assert run("generate", small, "--prompt", "abc", "--temperature", 1.5, "--seed", 1)[0] == 0


def test_values_that_are_given_twice_count_once(run: Run, small: Path) -> None:
    code, out, _ = run("inspect", small, "--state-size", 8, 4, "--state-size", 8, "--json")
    assert code == 0
    assert [cut["state_size"] for cut in json.loads(out)["cuts"]] == [16, 8, 4]


def test_an_interrupt_leaves_nothing(
    run: Run, small: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ghostssm.checkpoint.saving.write_model", interrupted)
    before = sorted(path.name for path in tmp_path.iterdir())
    code, _, err = run(*prune_arguments(small, text_file, tmp_path / "out"), "--method", "ghost")
    assert code == 130
    assert "nothing half-written is left" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_values_that_follow_one_another() -> None:
    arguments = ["m", "--x", "1", "2", "3", "--y", "4", "5", "--x", "6", "--x=7", "8"]
    assert _repeat(arguments, {"--x"}) == (
        ["m", "--x", "1", "--x", "2", "--x", "3", "--y", "4", "5", "--x", "6", "--x=7", "8"]
    )


def test_export(run: Run, small: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    target = tmp_path / "deep" / "model.gguf"
    code, out, _ = run("export", small, "--dtype", "q8_0", "--pad-to", 24, "--output", target)
    assert code == 0
    assert "gguf, q8_0" in out
    assert target.read_bytes()[:4] == b"GGUF"
    code, _, err = run("export", small, "--output", target)
    assert code == 2
    assert "--overwrite" in err
    code, out, _ = run(
        "export", small, "--format", "gguf", "--no-tokenizer", "--overwrite", "--output", target, "--json"
    )
    found = json.loads(out)
    assert (found["dtype"], found["state_sizes"], found["bytes"]) == ("f32", [16], target.stat().st_size)
    folder = tmp_path / "theirs"
    code, out, _ = run("export", small, "--format", "mamba_ssm", "--dtype", "bf16", "--pad-to", 32, "--output", folder)
    assert code == 0
    assert "bfloat16" in out
    assert json.loads((folder / "config.json").read_text())["ssm_cfg"]["d_state"] == 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "transformers", "--dtype", "q8_0"], "number format of GGUF"),
        (["--pad-to", 8], "16 channels already"),
        (["--untie"], "--untie is for --format transformers"),
        (["--format", "mamba_ssm", "--untie"], "always stores lm_head.weight"),
        (["--format", "onnx"], "onnx"),
    ],
)
def test_export_options_that_can_not_be(
    run: Run, small: Path, tmp_path: Path, options: list[object], message: str
) -> None:
    code, _, err = run("export", small, "--output", tmp_path / "out", *options)
    assert code == 2
    assert message in " ".join(err.split())
    assert not (tmp_path / "out").exists()
