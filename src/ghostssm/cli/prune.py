"""``ghostssm prune``: one model, one method, one size, to a checkpoint."""

from __future__ import annotations

import time
from typing import Annotated, Literal

import typer

from ghostssm.cli import arguments
from ghostssm.cli.console import bytes_text, note, print_facts, print_json, progress_reporter


def prune(
    model: arguments.Model,
    state_size: Annotated[int, typer.Option("--state-size", metavar="R", help="The state size N' to prune to.")],
    output: Annotated[str, typer.Option("--output", metavar="DIR", help="Folder for the checkpoint and the plan.")],
    method: Annotated[str, typer.Option("--method", help="How channels are scored.")] = "ghost",
    calibration: arguments.CalibrationText = "wikitext2",
    windows: arguments.CalibrationWindows = 128,
    window_length: arguments.WindowLength = 2048,
    groups: arguments.Groups = "equal",
    seed: arguments.Seed = 42,
    dialect: Annotated[
        Literal["transformers", "mamba_ssm"],
        typer.Option("--dialect", help="Of the output: transformers or mamba_ssm."),
    ] = "transformers",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output folder that is not empty.")] = False,
    tokenizer: arguments.Tokenizer = None,
    device: arguments.Device = "cpu",
    as_json: arguments.AsJson = False,
) -> None:
    """Prune a model's state and write a checkpoint that loads like the original.

    ghostssm prune state-spaces/mamba2-130m --state-size 64 --output mamba2-130m-n64
    """
    import ghostssm
    from ghostssm.pruning import check_state_size

    begun = time.perf_counter()
    folder = ghostssm.OutputFolder(output, overwrite)
    ghostssm.method_named(method)
    check_state_size(state_size, ghostssm.describe(model).layout.state_size)

    checkpoint = ghostssm.load(model, device=device, tokenizer=tokenizer)
    text = ghostssm.read_text(calibration, "calibration")
    cut = ghostssm.cut_windows(text, checkpoint.require_tokenizer(), window_length, windows, seed)
    note(f"calibrating on {len(cut)} windows of {cut.length} tokens of {cut.text_name}")
    with progress_reporter() as progress:
        plan = ghostssm.Calibration(checkpoint.model, cut).plan(
            method, state_size, groups=groups, seed=seed, progress=progress
        )
    ghostssm.apply_plan(checkpoint.model, plan)
    written = ghostssm.save(checkpoint, plan, folder, dialect=dialect)

    found = ghostssm.describe(str(written))
    before = found.layers * found.layout.with_state_size(plan.state_size).state_numbers * 4
    seconds = time.perf_counter() - begun
    if as_json:
        print_json(
            {
                "output": str(written),
                "method": method,
                "state_size": {"before": plan.state_size, "after": plan.kept_state_size},
                "state_bytes": {"before": before, "after": found.state_bytes()},
                "seconds": seconds,
            }
        )
        return
    print_facts(
        [
            ("written", str(written)),
            ("state size", f"{plan.state_size} -> {plan.kept_state_size}"),
            ("state per sequence, fp32", f"{bytes_text(before)} -> {bytes_text(found.state_bytes())}"),
            ("time", f"{seconds:.0f} s"),
        ]
    )
