"""``ghostssm compare``: methods and state sizes side by side."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from ghostssm.cli.console import print_json, print_table
from ghostssm.cli.parsing import AsJson, asks_for
from ghostssm.errors import InputError
from ghostssm.extras import check_drawable
from ghostssm.files.outputs import OutputFile
from ghostssm.report.screen import carried_out, note
from ghostssm.workflows.options import Option
from ghostssm.workflows.requests import CompareRequest


def _amended(
    request: CompareRequest,
    page: Annotated[str | None, Option("FILE", "Output", flag="--report")] = None,
    overwrite: Annotated[bool, Option(panel="Output")] = False,
) -> CompareRequest:
    """The request that also measures what a page shows, which may be written.

    Args:
        page: also write an HTML page; pip install 'ghostssm[report]' first.
        overwrite: replace FILE if it is there.
    """
    if page is not None:
        check_drawable()
        OutputFile(page, overwrite)
    elif overwrite:
        raise InputError("--overwrite works with --report only; add that, or leave out --overwrite.")
    return dataclasses.replace(request, report=page is not None)


@asks_for(CompareRequest, amended=_amended)
def compare(request: CompareRequest, page: str | None = None, overwrite: bool = False, as_json: AsJson = False) -> None:
    """Prune by several methods to several state sizes, in memory, and print one table of loss, state and speed.

    ghostssm compare MODEL --state-size 96 64 32 --methods ghost output+repair
    ghostssm compare MODEL --state-bytes 1/4 1/8 --engine vllm
    """
    import ghostssm
    from ghostssm.workflows.compare import compare as use_case
    from ghostssm.workflows.compare_result import comparison_cells

    result = carried_out(use_case, request)
    if page is not None:
        note(f"report: {ghostssm.write_report(result, page, overwrite)}")
    for row in result.rows:
        if row.distilled_tokens:
            note(
                f"{row.method} saw gradients through the whole model, on {row.distilled_tokens:,} tokens "
                f"(N' = {row.state_size})"
            )
    if as_json:
        print_json([dataclasses.asdict(row) for row in result.rows])
        return
    print_table(*comparison_cells(result.rows))
    if request.batches:
        note("tok/s: measured once per state size and model class; ± is half of the range over the rounds")
    if any(row.stored_state_size != row.state_size for row in result.rows):
        note("(in brackets: the state size stored, padded to the widest group and layer, or whole)")
