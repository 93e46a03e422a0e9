"""``ghostssm inspect``: what a checkpoint is, without loading its weights."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from ghostssm.cli import arguments
from ghostssm.cli.console import bytes_text, print_facts, print_json, print_table


def inspect(
    model: arguments.Model,
    state_size: Annotated[
        list[int] | None, typer.Option("--state-size", metavar="R ...", help="Also say what these state sizes save.")
    ] = None,
    as_json: arguments.AsJson = False,
) -> None:
    """Show a model's sizes and the state it keeps per sequence; weights are not loaded.

    ghostssm inspect state-spaces/mamba2-1.3b --state-size 64 32
    """
    from ghostssm import describe
    from ghostssm.pruning import check_state_size

    found = describe(model)
    layout = found.layout
    sizes = [layout.state_size, *(state_size or [])]
    for size in sizes:
        check_state_size(size, layout.state_size)
    cuts = [
        {
            "state_size": size,
            "state_bytes_float32": found.state_bytes(size),
            "state_bytes_bfloat16": found.state_bytes(size, bytes_per_number=2),
            "saved_fraction": 1 - size / layout.state_size,
            "parameters": found.parameters - found.removed_parameters(size),
        }
        for size in sizes
    ]
    if as_json:
        print_json(dataclasses.asdict(found) | {"cuts": cuts})
        return
    print_facts(
        [
            ("model", found.name),
            ("family", f"{found.family}, {found.dialect} dialect"),
            ("layers", str(found.layers)),
            ("heads", f"{layout.num_heads} of {layout.head_dim}"),
            ("groups", str(layout.n_groups)),
            ("state size N", str(layout.state_size)),
            ("hidden size", str(layout.hidden_size)),
            ("vocabulary", str(found.vocab_size)),
            ("parameters", f"{found.parameters:,}"),
        ]
    )
    print()
    print_table(
        ("N'", "state per sequence, fp32", "bf16", "saved", "parameters"),
        [
            (
                str(cut["state_size"]),
                bytes_text(cut["state_bytes_float32"]),
                bytes_text(cut["state_bytes_bfloat16"]),
                f"{cut['saved_fraction']:.0%}",
                f"{cut['parameters']:,}",
            )
            for cut in cuts
        ],
    )
