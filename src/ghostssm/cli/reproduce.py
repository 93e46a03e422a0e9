"""``ghostssm reproduce``: the paper's tables, published and measured."""

from __future__ import annotations

from ghostssm.cli.console import print_json, print_table
from ghostssm.cli.parsing import AsJson, asks_for
from ghostssm.errors import GhostError
from ghostssm.report.screen import carried_out
from ghostssm.workflows.requests import ReproduceRequest


@asks_for(ReproduceRequest)
def reproduce(request: ReproduceRequest, as_json: AsJson = False) -> None:
    """Measure the paper's two tables on the published checkpoints, beside the published numbers.

    ghostssm reproduce --output reproduction --device cuda
    ghostssm reproduce --output quick --models mamba2-130m --windows 32
    """
    from ghostssm.workflows.paper_tables import source
    from ghostssm.workflows.reproduce import reproduce as use_case

    outcome = carried_out(use_case, request)
    if as_json:
        print_json({"output": request.output, **outcome.as_json()})
    else:
        for one in outcome.tables:
            print(one.title)
            print_table(one.headers, one.rows, text_columns=2)
            print()
        print(f"published: {source()}")
        print(f"written: {', '.join(map(str, outcome.written))}")
    if outcome.failures:
        listed = "".join(f"\n  - {' '.join(map(str, key))}: {reason}" for key, reason in outcome.failures.items())
        raise GhostError(
            f"{len(outcome.failures)} cells could not be measured; the same command tries them again:{listed}"
        )
