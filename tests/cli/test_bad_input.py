"""What a user gives wrong ends in one message and exit code 2, and nothing is written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import ghostssm
from tests.cli.test_cli import prune_arguments
from tests.conftest import Run, tiny_model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give one of --state-size, --budget, --max-excess-loss, --state-bytes"),
        (["--state-size", 4, "--budget", 0.5], "--state-size and --budget each say how much to keep"),
        (["--state-size", 16], "The state size would be 16; expected 1 to 15, less than the model's own N = 16"),
        (["--state-size", 17], "The state size would be 17; expected 1 to 15, less than the model's own N = 16"),
        (["--state-size", 16, "--method", "sparsegpt"], "less than the model's own N"),
        (["--budget", 1], "a smaller --state-size, or a --budget that leaves less"),
        (["--budget", 0.99, "--per-layer"], "less than the model's own N"),
        (["--budget", 1.5], "--budget is 1.5"),
        (["--max-excess-loss", -1], "--max-excess-loss is -1"),
        (["--state-size", 4, "--per-layer", "--dialect", "mamba_ssm"], "mamba_ssm dialect"),
        (["--state-size", 4, "--method", "output+mend"], "'mend'"),
    ],
)
def test_prune_options_that_contradict(
    run: Run, small: Path, text_file: Path, tmp_path: Path, options: list[object], message: str
) -> None:
    code, _, err = run("prune", small, "--calibration", text_file, "--output", tmp_path / "out", *options)
    assert code == 2
    assert message in " ".join(err.split())
    assert not (tmp_path / "out").exists()


def break_weights(model: Path, _: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def drop_tokenizer(model: Path, _: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()


def wrong_shape(model: Path, _: Path) -> None:
    tiny_model(state_size=8).save_pretrained(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"state_size": 16}))


def not_finite(model: Path, _: Path) -> None:
    broken = tiny_model()
    broken.backbone.layers[0].mixer.D.data[0] = float("nan")
    broken.save_pretrained(model)


def overflowing(model: Path, _: Path) -> None:
    broken = tiny_model()
    broken.backbone.layers[1].mixer.out_proj.weight.data.fill_(3e38)
    broken.save_pretrained(model)


def other_model(model: Path, _: Path) -> None:
    (model / "config.json").write_text('{"model_type": "gpt2"}')


def short_text(_: Path, text: Path) -> None:
    text.write_text("short")


def empty_text(_: Path, text: Path) -> None:
    text.write_text("")


def binary_text(_: Path, text: Path) -> None:
    text.write_bytes(b"\0" * 1000)


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        (break_weights, "truncated"),
        (drop_tokenizer, "no tokenizer"),
        (wrong_shape, "(80, 1, 4) in model.safetensors, but the config implies (96, 1, 4)"),
        (not_finite, "backbone.layers.0.mixer.D"),
        (overflowing, "backbone.layers.1.mixer"),
        (other_model, "'gpt2'"),
        (short_text, "fewer than one window of 64"),
        (empty_text, "empty"),
        (binary_text, "binary"),
    ],
)
def test_bad_input_ends_in_one_line_and_nothing_written(
    run: Run, small: Path, text_file: Path, tmp_path: Path, breakage: Callable[[Path, Path], None], message: str
) -> None:
    breakage(small, text_file)
    before = sorted(path.name for path in tmp_path.iterdir())
    code, out, err = run(*prune_arguments(small, text_file, tmp_path / "out"))
    assert code == 2
    assert out == ""
    assert "error:" in err
    assert message in err
    assert "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("state_size", ["0", "17", "-3", "3.5", "many"])
def test_impossible_state_sizes(run: Run, small: Path, text_file: Path, tmp_path: Path, state_size: str) -> None:
    arguments = prune_arguments(small, text_file, tmp_path / "out")
    arguments[arguments.index("--state-size") + 1] = state_size
    code, _, err = run(*arguments)
    assert code == 2
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_an_output_folder_with_something_in_it(run: Run, small: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    code, _, err = run(*prune_arguments(small, text_file, tmp_path / "out"))
    assert code == 2
    assert "--overwrite" in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


@pytest.mark.parametrize("device", ["meta:x", "nonsense", "cuda:99"])
def test_a_device_that_is_not_there(run: Run, small: Path, text_file: Path, device: str) -> None:
    code, _, err = run("evaluate", small, "--text", text_file, "--window-length", 64, "--device", device)
    assert code == 2
    assert repr(device) in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("prune m --state-size 4 --output o --text-windows 3", "--text-windows works with --evaluate only"),
        ("prune m --state-size 4 --output o --batch 1", "--batch works with --report only"),
        ("prune m --state-size 4 --output o --private", "--private works with --push-to-hub only"),
        (
            "prune m --state-size 4 --output o --multiple 4",
            "--multiple works with --per-layer, --max-excess-loss or --state-bytes",
        ),
        ("compare m --state-size 4 --overwrite", "--overwrite works with --report only"),
        ("compare m --state-size 4 --methods ghost,random", "separated by spaces: --methods ghost random"),
        ("reproduce --output o --methods ghost,random", "separated by spaces: --methods ghost random"),
        ("inspect m --memory 80GiB,24GiB", "separated by spaces: --memory 80GiB 24GiB"),
        ("evaluate m --limit 3", "--limit works with --tasks or --last-words only"),
        ("evaluate m --tasks piqa --text a.txt", "--text has no effect with --tasks"),
        ("evaluate m --last-words a.txt --window-length 64", "--window-length has no effect with --last-words"),
    ],
)
def test_options_that_nothing_would_read(run: Run, arguments: str, message: str) -> None:
    code, _, err = run(*arguments.split())
    assert code == 2
    assert message in " ".join(err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("prune m --state-size 4 --output --json", "--output has no value: --json follows it."),
        ("prune m --state-size 4 --baselines --output o", "--baselines has no value: --output follows it."),
        ("compare m --state-size 4 --methods -h", "--methods has no value: -h follows it."),
    ],
)
def test_an_option_in_place_of_a_value(run: Run, arguments: str, message: str) -> None:
    code, _, err = run(*arguments.split())
    assert code == 2
    assert message in " ".join(err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune", "m", "--state-size", "4", "--output", ""], "--output is empty; expected a name"),
        (["export", "m", "--output", ""], "--output is empty; expected a name"),
        (["compare", "m", "--state-size", "4", "--report", ""], "--report is empty; expected a name"),
        (["export", "m", "--output", "folder/"], "folder is a folder; expected the name of a file to write"),
        (["prune", "m", "--state-size", "4", "--output", "o", "--calibration", "none.txt"], "goes into a .txt file."),
    ],
)
def test_names_of_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    code, _, err = run(*arguments)
    assert code == 2
    assert message in " ".join(err.split())
    assert "Python" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("prune", "m", "--method", "gost", "--state-size", "4", "--output", "o"),
        ("prune", "m", "--groups", "some", "--state-size", "4", "--output", "o"),
        ("compare", "m"),
        ("nonsense",),
    ],
)
def test_bad_usage(run: Run, arguments: tuple[str, ...]) -> None:
    code, _, err = run(*arguments)
    assert code == 2
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", 2**70], "--seed"),
        (["--seed", -1], "--seed"),
        (["--device", "meta"], "The device 'meta' can't be used"),
        (["--max-excess-loss", 0.1, "--multiple", 32], "--state-size and --max-excess-loss each say how much to keep"),
    ],
)
def test_options_out_of_range(
    run: Run, small: Path, text_file: Path, tmp_path: Path, options: list[object], message: str
) -> None:
    code, _, err = run(*prune_arguments(small, text_file, tmp_path / "out"), *options)
    assert code == 2
    assert message in err


def test_no_size_is_such_a_multiple(run: Run, small: Path, text_file: Path, tmp_path: Path) -> None:
    texts = ["--calibration", text_file, "--windows", 4, "--window-length", 64]
    bound = ["--max-excess-loss", 9, "--method", "random", "--output", tmp_path / "out"]
    code, _, err = run("prune", small, *bound, "--multiple", 200, *texts)
    assert code == 2
    assert "is a multiple of 200" in err
    code, _, err = run("prune", small, *bound, "--multiple", 4, "--engine", "transformers-cpu", *texts)
    assert code == 0, err
    assert ghostssm.describe(str(tmp_path / "out")).layout.state_size == 4


def test_a_prompt_that_is_not_utf8(run: Run, small: Path) -> None:
    code, _, err = run("generate", small, "--prompt", os.fsdecode(b"a\xff\xfe"))
    assert code == 2
    assert "The prompt is not UTF-8" in err


@pytest.mark.parametrize("name", ["./nothere", "/nothere", "../not/here", "a/b/c"])
def test_a_path_is_never_taken_for_a_hub_id(run: Run, name: str) -> None:
    code, _, err = run("inspect", name)
    assert code == 2
    assert f"error: There is no folder {name!r}; " in err
