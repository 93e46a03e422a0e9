"""``ghostssm verify``: whether a checkpoint is what was written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ghostssm.checkpoint.place import written_folder
from ghostssm.cli.console import print_json, print_table
from ghostssm.cli.parsing import AsJson, verb
from ghostssm.report.screen import note
from ghostssm.workflows.options import Option


@verb
def verify(folder: Annotated[str, Option("DIR", positional=True)], as_json: AsJson = False) -> Callable[[], None]:
    """Check that a checkpoint is whole, and what 'ghostssm prune' wrote. The exit code is 1 if it is not.

    ghostssm verify mamba2-130m-n64
    ghostssm verify mamba2-130m-n64 --json

    Args:
        folder: a checkpoint that 'ghostssm prune' wrote.
    """
    return partial(_verify, written_folder(folder), as_json)


def _verify(folder: Path, as_json: bool) -> None:
    import ghostssm

    result = ghostssm.verify(folder)
    if as_json:
        print_json(dataclasses.asdict(result) | {"passed": result.passed})
    else:
        rows = [(check.name, "ok" if check.passed else "FAILED", check.detail) for check in result.checks]
        print_table(["check", "result", "found"], rows, text_columns=3)
        for remark in result.notes:
            note(f"({remark})")
    if not result.passed:
        raise typer.Exit(1)
