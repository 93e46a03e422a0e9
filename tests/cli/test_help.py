"""What the terminal shows before and beside the results: help, completion, progress, errors."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import rich.console
from typer.main import get_command
from typer.testing import CliRunner

import ghostssm
from ghostssm.cli import completion, console
from ghostssm.cli.main import _VERBS, app
from ghostssm.ops.state_format import FORMATS, TIERS
from ghostssm.recovery import step_names
from ghostssm.workflows import paper_tables

GROUP: Any = get_command(app)
VERBS = list(GROUP.commands)
LONGEST_LINE = 80


def help_text(*arguments: str) -> str:
    result = CliRunner().invoke(app, [*arguments, "--help"], env={"COLUMNS": str(LONGEST_LINE), "TERM": "dumb"})
    assert result.exit_code == 0
    return result.output


def test_the_guide_names_every_verb_by_task() -> None:
    text = help_text()
    places = [text.index(f" {title} ") for title in _VERBS]
    assert places == sorted(places), "the shortest way comes first"
    assert text.index("ghostssm prune reference") < places[0]
    assert all(re.search(rf"^│ {verb} ", text, re.MULTILINE) for verb in VERBS)


@pytest.mark.parametrize(("verb", "extra"), [("prune", "report"), ("compare", "report"), ("evaluate", "lm-eval")])
def test_an_extra_package_is_named_whole(verb: str, extra: str) -> None:
    text = " ".join(help_text(verb).replace("│", " ").split())
    assert f"pip install 'ghostssm[{extra}]'" in text  # unescaped brackets would be taken for markup


def test_the_seed_of_generate_draws_no_windows() -> None:
    text = " ".join(help_text("generate").replace("│", " ").split())
    assert "the same number gives the same text" in text
    assert "calibration" not in text


def test_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"{ghostssm.__version__}\n"


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_is_readable_at_80_columns_and_plain_when_piped(verb: str) -> None:
    text = help_text(*([verb] if verb else []))
    assert "\x1b" not in text
    assert "\b" not in text
    assert max(map(len, text.splitlines())) <= LONGEST_LINE
    described = [line for line in text.splitlines() if re.match(r"│ [* ]*--[a-z-]+", line)]
    assert described
    assert all("…" not in line for line in described), "names of options are whole"
    assert not re.search(r"<\w+>|x[<>]=|<=x", text), "types and ranges are the parser's own words"
    assert not re.search(r"(?<![\w'])R(?![\w'])", text), "N and N' are the letters of the state size"


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_examples_parse_and_fit_on_a_line(verb: str) -> None:
    text = re.sub(r"\\ *\n", " ", help_text(*([verb] if verb else [])))  # a line that goes on
    examples = [shlex.split(line.strip()[2:])[1:] for line in text.splitlines() if line.startswith(" $ ghostssm ")]
    assert len(examples) == (2 if verb else 3)
    for name, *rest in examples:
        assert not verb or name == verb
        with GROUP.commands[name].make_context(name, rest):
            pass


def test_names_for_completion_are_the_registered_ones() -> None:
    assert sorted(completion.METHODS) == list(ghostssm.method_names())
    assert step_names() == completion.STEPS
    assert ghostssm.engine_names() == completion.ENGINES
    assert (*FORMATS, TIERS.name) == completion.STATE_DTYPES
    assert paper_tables.table_names() == completion.TABLES
    assert paper_tables.published_models() == completion.PUBLISHED_MODELS


def completed(*words: str) -> list[str]:
    """What bash is offered for the last word."""
    environment = {
        "_GHOSTSSM_COMPLETE": "complete_bash",
        "COMP_WORDS": shlex.join(["ghostssm", *words]),
        "COMP_CWORD": str(len(words)),
    }
    return CliRunner().invoke(app, [], env=environment, prog_name="ghostssm").output.split()


def test_completion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("models", ".hidden"):
        (tmp_path / folder).mkdir()
    for file in ("manual.txt", "picture.png"):
        (tmp_path / file).touch()
    assert completed("pr") == ["prune"]
    assert completed("inspect", "ref") == ["reference"]
    assert completed("inspect", "state-spaces/mamba2-1") == ["state-spaces/mamba2-130m", "state-spaces/mamba2-1.3b"]
    assert completed("inspect", "m") == ["models"]
    assert completed("prune", "m", "--method", "bal") == ["balanced"]
    assert completed("compare", "m", "--methods", "ghost", "rand") == ["random"]
    assert completed("compare", "m", "--methods", "ghost", "--state-s") == ["--state-size"]
    assert completed("compare", "m", "--state-dtype", "int8", "bf") == ["bfloat16"]
    assert completed("compare", "m", "--methods", "random", "ghost+") == [
        "ghost+repair",
        "ghost+refit100+repair",
        "ghost+per-layer",
    ]
    assert completed("prune", "m", "--engine", "vl") == ["vllm"]
    assert completed("evaluate", "m", "--text", "wi") == ["wikitext2"]
    assert completed("evaluate", "m", "--text", "m") == ["manual.txt", "models"]
    assert completed("reproduce", "--table", "si") == ["size"]


def test_help_and_completion_load_neither_pytorch_nor_transformers(tmp_path: Path) -> None:
    script = (
        "import os, sys\nfrom ghostssm.cli import main\n"
        "completion = {'_GHOSTSSM_COMPLETE': 'complete_bash', 'COMP_WORDS': 'ghostssm inspect r', 'COMP_CWORD': '2'}\n"
        "for sys.argv, extra in ((['ghostssm', 'prune', '--help'], {}), (['ghostssm'], completion)):\n"
        "    os.environ |= extra\n"
        "    try:\n        main()\n    except SystemExit:\n        pass\n"
        "    assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n    print('light')"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines.count("light") == 2
    assert lines[-2:] == ["reference", "light"]


WRONG = {
    "prune m --method gost --output o": "No method is called 'gost'; .* Did you mean 'ghost'\\?",
    "prune m --method ghost+refi100 --output o": "No recovery step is called 'refi'; .* Did you mean 'refit'\\?",
    "compare m --state-size 4 --methods ghost outptu": "No method is called 'outptu'; .* 'output'\\?",
    "inspect m --engine vlm": "No engine is called 'vlm'; .* Did you mean 'vllm'\\?",
    "bench m --state-dtype int7": "No state dtype is called 'int7'; expected one of: float32, ",
    "reproduce --output o --table sizes": "No table is called 'sizes'; .* Did you mean 'size'\\?",
    "prune m --dialect mamba-ssm --output o": "'mamba-ssm' is not one of .* Did you mean 'mamba_ssm'\\?",
    "prune m --state-size many --output o": "'--state-size': 'many' was given, expected a whole number",
    "prune m --budget 50% --output o": "'--budget': '50%' was given, expected a number",
    "prune m --state-bytes much --output o": "--state-bytes is 'much'; expected a share of .* or a size with its unit",
    "prune m --state-bytes 6TTB --output o": "--state-bytes is '6TTB'; expected a share of .* or a size with its unit",
    "distill s --teacher t --text x.txt --output o --learning-rate 0": "--learning-rate is 0; expected a number above",
    "distill s --teacher t --text x.txt --output o --learning-rate -1": "--learning-rate is -1; expected a number",
    "distill s --teacher s --text x.txt --output o": "Student and teacher are both s; expected a pruned checkpoint",
    "prune m --seed -1 --output o": "--seed is -1; expected from 0 to",
    "prune m": "Missing option '--output'",
    "prune m --output o": "give one of --state-size, --budget, --max-excess-loss, --state-bytes",
    "prune m --state-size 64 --state-bytes 1/4 --output o": "--state-size and --state-bytes each say how much",
    "prune m --state-size 0 --output o": "--state-size is 0; expected 1 or more",
    "prune m --budget 1.5 --output o": "--budget is 1.5; expected a share of the state above 0, up to 1",
    "prune m --state-bytes a/4 --output o": "--state-bytes is 'a/4'; expected a share of the dense float32 state",
    "prune m --state-bytes 1/4 --windows 3 --output o": "There are 3 calibration windows; a search needs at least 4",
    "prune m --state-bytes 1/4 --stream --output o": "--state-bytes tries several sizes on the whole model",
    "prune m --state-size 4 --multiple 4 --output o": "--multiple works with --per-layer, --max-excess-loss or",
    "prune m --state-size 4 --resume --output o": "--resume works with --stream only",
    "prune ./m --state-size 4 --output o": "There is no folder './m'",
    "prune reference --state-size 4 --output .": "\\. is in use and can't be replaced",
    "prune reference --state-size 4 --output o --calibration m.txt": "No text at 'm.txt'; expected a .txt",
    "compare m": "Say how much to keep: give --state-size or --state-bytes",
    "compare m --state-size 4 --state-bytes 1/4": "--state-size has no effect with --state-bytes",
    "compare m --state-size 4 --state-rounding up": "'up' is not one of 'nearest', 'stochastic'",
    "bench m --state-rounding stochastic": "A float32 state is not rounded",
    "evaluate m --copying --last-words w": "Give at most one of --last-words, --copying and --tasks",
    "evaluate reference --against ./m": "There is no folder './m'",
    "distill m --teacher m --text wikitext2 --output o --steps 0": "--steps is 0; expected 1 or more",
    "distill m --teacher m --text a --evaluate a --output o": "a is to be trained on and to be measured on",
    "export m --untie --output o": "--untie is for --format transformers",
    "generate ./m --prompt a": "There is no folder './m'",
    "generate reference --prompt a --state-dtype float32 --state-rounding stochastic": "float32 state is not rounded",
    "report m": "No folder at m; expected a folder that 'ghostssm prune --output DIR' wrote",
    "verify m": "m is no folder; expected a checkpoint that ghostssm wrote",
    "inspect m --context 4": "--context counts with --memory only",
    "inspect m --memory much": "The memory is 'much'; expected a size with its unit",
    "compare": "Missing argument 'MODEL'",
    "prnue m": "No such command 'prnue'",
}

FORKED = """
import os, sys, traceback
from ghostssm.cli import main
for number, line in enumerate(sys.argv[1:]):
    if os.fork():
        os.wait()
        continue
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{number}.{name}", os.O_CREAT | os.O_WRONLY), stream)
    sys.argv = ["ghostssm", *line.split()]
    try:
        main()
    except SystemExit as stop:
        print("late" if {"torch", "transformers"} & set(sys.modules) else stop.code)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(0)
"""


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """What each wrong command line prints, in a process of its own that has only the command imported."""
    place = tmp_path_factory.mktemp("wrong")
    subprocess.run([sys.executable, "-c", FORKED, *WRONG], cwd=place, check=True)
    names = ("out", "err")
    return {
        line: tuple((place / f"{number}.{name}").read_text() for name in names) for number, line in enumerate(WRONG)
    }


@pytest.mark.parametrize("line", WRONG)
def test_what_is_wrong_in_a_command_line_is_told_in_one_line_before_pytorch_is_imported(
    refusals: dict[str, tuple[str, str]], line: str
) -> None:
    out, err = refusals[line]
    assert out == "2\n", err
    assert re.fullmatch(rf"error: .*{WRONG[line]}.*\n", err)
    assert "Value error" not in err


def test_errors_are_coloured_on_a_terminal_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    console.print_error("No model at 'x'; expected [a folder].")
    assert capsys.readouterr().err == "error: No model at 'x'; expected [a folder].\n"
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(rich.console.Console, "is_terminal", property(lambda self: True))
    console.print_error("No model at 'x'; expected [a folder].")
    err = capsys.readouterr().err
    assert "\x1b[" in err
    assert "expected [a folder]." in err
