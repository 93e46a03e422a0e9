"""``ghostssm report``: a page that shows a pruned checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

from ghostssm.cli.console import print_facts, print_json
from ghostssm.cli.parsing import AsJson, verb
from ghostssm.errors import InputError
from ghostssm.extras import check_drawable
from ghostssm.files.outputs import PAGE_FILE, PLAN_FILE, OutputFile
from ghostssm.report.screen import note
from ghostssm.units import bytes_text
from ghostssm.workflows.options import Option
from ghostssm.workflows.requests import STATE_DTYPE


@verb
def report(
    folder: Annotated[str, Option("DIR", positional=True)],
    output: Annotated[str | None, Option("FILE")] = None,
    state_dtype: Annotated[str | None, STATE_DTYPE] = None,
    overwrite: Annotated[bool, Option()] = False,
    as_json: AsJson = False,
) -> Callable[[], None]:
    """Show a pruned checkpoint in one HTML file: what was removed, what it cost, what it bought.

    ghostssm report mamba2-130m-n64
    ghostssm report mamba2-130m-n64 --output n64.html --overwrite

    Args:
        folder: folder that 'ghostssm prune' wrote.
        output: the page; DIR/report.html if not given.
        state_dtype: of the recurrent state, rounded after every token: float32, bfloat16, float16, int8, fp8 or int4;
            tiers for a model that was pruned to them. If not given, that which it was pruned for, else float32.
        overwrite: replace the page if there is one.
    """
    where = Path(folder)
    if not (where / PLAN_FILE).is_file():
        fault = f"No {PLAN_FILE} in {folder}" if where.is_dir() else f"No folder at {folder}"
        raise InputError(f"{fault}; expected a folder that 'ghostssm prune --output DIR' wrote.")
    file = OutputFile(where / PAGE_FILE if output is None else output, overwrite)
    check_drawable()
    return partial(_report, where, file, state_dtype, as_json)


def _report(where: Path, file: OutputFile, state_dtype: str | None, as_json: bool) -> None:
    from ghostssm.report.building import checkpoint_report
    from ghostssm.report.page import write_page

    shown = checkpoint_report(where, state_dtype)
    write_page(file, shown)
    size, missing = file.path.stat().st_size, shown.missing
    if as_json:
        print_json(
            {
                "output": str(file.path),
                "bytes": size,
                "figures": [figure.name for figure in shown.figures],
                "missing": [{"missing": what, "command": command} for what, command in missing],
            }
        )
        return
    titles = ", ".join(figure.title for figure in shown.figures)
    print_facts([("written", f"{file.path} ({bytes_text(size)})"), ("figures", titles)])
    for what, command in missing:
        note(f"not shown: {what}; it comes with: {command}")
    if missing:
        note("(these commands name models and texts without their folders, and leave out options at their default)")
