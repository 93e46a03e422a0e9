"""Verbs and the requests that they build: the same options with the same defaults, and a JSON that is an identity."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import pytest
from typer.main import get_command

import ghostssm
from ghostssm.cli.main import app
from ghostssm.cli.parsing import requested
from ghostssm.streaming.run_folder import RunFolder
from ghostssm.workflows.options import Option, options_of
from ghostssm.workflows.request_checks import check_request
from ghostssm.workflows.requests import (
    BenchRequest,
    CompareRequest,
    DistillRequest,
    EvaluateRequest,
    ExportRequest,
    InspectRequest,
    PruneRequest,
    ReproduceRequest,
)

GROUP: Any = get_command(app)


def asked(kind: type[Any], line: str) -> Any:
    """The request that a command line is parsed to."""
    verb, *rest = line.split()
    with GROUP.commands[verb].make_context(verb, rest) as context:
        known = {each.name for each in fields(kind)}
        return requested(kind, {name: value for name, value in context.params.items() if name in known})


@pytest.mark.parametrize(
    ("line", "request_"),
    [
        ("prune m --output o", PruneRequest("m", "o")),
        ("compare m --state-size 4", CompareRequest("m", (4,))),
        ("distill s --teacher t --text x --output o", DistillRequest("s", "t", "x", "o")),
        ("evaluate m", EvaluateRequest("m")),
        ("bench m", BenchRequest("m")),
        ("export m --output o", ExportRequest("m", "o")),
        ("inspect m", InspectRequest("m")),
        (
            "inspect m --state-size 4 2 --memory 80GiB --engine vllm --predict",
            InspectRequest("m", (4, 2), memories=("80GiB",), engines=("vllm",), predict=True),
        ),
        ("reproduce --output o", ReproduceRequest("o")),
        (
            "prune m --output o --state-size 4 --method ghost --engine vllm llama.cpp-cpu --report --batch 1 2 2 "
            "--public --stream --offload d --groups pooled --budget 0.5 --window-length 9 --device cuda --seed 7",
            PruneRequest(
                *("m", "o", 4, 0.5),
                recipe="ghost",
                engines=("vllm", "llama.cpp-cpu"),
                report=True,
                batches=(1, 2),
                private=False,
                stream=True,
                offload=Path("d"),
                groups="pooled",
                window_length=9,
                device="cuda",
                seed=7,
            ),
        ),
        (
            "distill s --teacher t --text x --output o --train small --window-length 64 --evaluate a b --log-to wandb",
            DistillRequest(
                *("s", "t", "x", "o"), trained="small", window_length=64, evaluate=("a", "b"), log_to="wandb"
            ),
        ),
        (
            "reproduce --output o --table size --state-size 4 2",
            ReproduceRequest("o", tables=("size",), state_sizes=(4, 2)),
        ),
        ("evaluate reference", EvaluateRequest("reference", "stdlib")),
        ("evaluate s --against reference", EvaluateRequest("s", "stdlib", against="reference")),
        ("evaluate reference --tasks piqa", EvaluateRequest("reference", tasks=("piqa",))),
        ("compare reference --state-size 4", CompareRequest("reference", (4,), text="stdlib", calibration="stdlib")),
        (
            "compare reference --state-size 4 --text a",
            CompareRequest("reference", (4,), text="a", calibration="stdlib"),
        ),
    ],
)
def test_a_command_line_is_a_request(line: str, request_: Any) -> None:
    """The same defaults, but for the texts of the built-in model; values of the same types, under the fields' names."""
    found = asked(type(request_), line)
    assert found == request_
    assert [type(each) for each in vars(found).values()] == [type(each) for each in vars(request_).values()]


def test_every_field_is_an_option_but_what_a_verb_decides() -> None:
    kinds = (
        PruneRequest,
        CompareRequest,
        DistillRequest,
        EvaluateRequest,
        BenchRequest,
        ExportRequest,
        InspectRequest,
        ReproduceRequest,
    )
    without = {
        (kind, each.name)
        for kind in kinds
        for each in fields(kind)
        if each.name not in {o.name for o in options_of(kind)}
    }
    assert without == {(CompareRequest, "report")}


def test_an_option_of_a_function_or_a_request_takes_its_text_from_the_docstring() -> None:
    def call(
        place: Annotated[str, Option("DIR")], *, plain: int = 3, many: Annotated[bool, Option(flag="--all")] = False
    ) -> None:
        """Do.

        Args:
            place: where it goes, in
                two lines: these.
            plain: no option. many: hidden.
            many: all of them.
        """

    place, many = options_of(call)
    assert place == ("place", str, inspect.Parameter.empty, Option("DIR"), "where it goes, in two lines: these.")
    assert (many.flag, many.default, many.text) == ("--all", False, "all of them.")
    call.__doc__ = "Do."
    with pytest.raises(KeyError, match="place"):
        options_of.__wrapped__(call)


def test_the_json_says_what_is_asked_for_and_not_where_it_lies() -> None:
    request = PruneRequest("/home/me/model", "/home/me/out", 4, calibration="/home/me/a.txt", engines=("vllm",))
    found = request.as_json()
    assert json.loads(json.dumps(found)) == found
    assert "/home" not in json.dumps(found)
    assert (found["model"], found["calibration"], found["engines"]) == ("model", "a.txt", ["vllm"])
    assert found != PruneRequest("/home/me/model", "x", 5, calibration="/home/me/a.txt").as_json()
    assert hash(request)


class _Died(BaseException):
    """What no handler catches."""


def test_a_run_goes_on_for_the_same_request_only(
    folder_of: Callable[..., Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first option that differs is named, with both values; where model and text lie makes no difference."""

    def request_of(**options: Any) -> PruneRequest:
        known = {"state_size": 4, "recipe": "ghost", "windows": 3, "window_length": 64, "stream": True}
        texts = {"calibration": str(text_file), "model": str(folder), "output": str(tmp_path / "out")}
        return PruneRequest(**{**known, **texts, **options})

    def died(*_: Any) -> None:
        raise _Died

    folder = folder_of()
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "assemble", died)
        with pytest.raises(_Died):
            ghostssm.prune(request_of())
    for options, message in (
        ({"seed": 7}, "differs in seed: it was 42, now it is 7"),
        ({"groups": "pooled"}, "differs in groups: it was 'equal', now it is 'pooled'"),
        ({"recipe": "ghost+repair"}, r"differs in method: it was 'ghost', now it is 'ghost\+repair'"),
        ({"state_size": None, "budget": 0.25}, "differs in state_size: it was 4, now it is None"),
        ({"windows": 2}, "differs in windows: it was 3, now it is 2"),
    ):
        with pytest.raises(ghostssm.OutputError, match=message):
            ghostssm.prune(request_of(resume=True, **options))
    moved = tmp_path / "moved.txt"
    text_file.rename(moved)
    folder = folder.rename(tmp_path / "elsewhere")
    outcome = ghostssm.prune(request_of(resume=True, calibration=str(moved)))
    assert outcome.plan.kept_state_size == 4
    again = ghostssm.prune(request_of(resume=True, calibration=str(moved)))  # is finished
    assert again.plan.selections == outcome.plan.selections


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (PruneRequest("m", budget="0.5"), "--budget is '0.5'; expected a number"),  # type: ignore[arg-type]
        (PruneRequest("m", state_size=8, windows=2.5), "--windows is 2.5; expected a whole"),  # type: ignore[arg-type]
        (PruneRequest("m", state_size=8, groups="some"), "--groups is 'some'; expected equal or pooled"),  # type: ignore[arg-type]
        (BenchRequest("m", 8), r"--state-size is 8; expected several values, or one as \(8,\)"),  # type: ignore[arg-type]
        (BenchRequest("m", batches=(1, 0)), "--batch is 0; expected 1 or more"),
        (CompareRequest("m", state_bytes=("1/4", "5/4")), "--state-bytes is '5/4'; expected a share .* below 1"),
        (DistillRequest("s", "t", "x", "o", batch=3, accumulate=2), "A batch of 3 windows can't be divided into 2"),
        (ExportRequest("m", "o", dtype="f23"), "--dtype is 'f23'; .* Did you mean 'f32'?"),  # type: ignore[arg-type]
    ],
)
def test_a_request_that_python_makes_is_checked_as_the_command_checks_its_own(request_: Any, message: str) -> None:
    with pytest.raises(ghostssm.InputError, match=message):
        check_request(request_)
