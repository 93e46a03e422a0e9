"""What does it cost to make a plan, next to GHOST's own on the same windows?

    python benchmarks/planning.py                                     # the built-in model, 8 windows of 1024 tokens
    python benchmarks/planning.py --model 130m --windows 2 --rounds 1 # random weights in the sizes of mamba2-130m
    python benchmarks/planning.py --profile output                    # where the seconds of a recipe go

The recipes take turns in one process. With one thread the clock counts this process's own time, which other work on the
machine disturbs less; with more it is the wall's. Memory is the growth of the process's peak while planning.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
from collections.abc import Callable

import torch
from interleaved import model_130m, print_machine, seconds_by_side
from transformers import PreTrainedModel

import ghostssm
from ghostssm.evaluation.speed import peak_bytes, reset_peak
from ghostssm.text.windows import Windows

RECIPES = ("ghost", "output", "balanced", "output+refit100+repair", "balanced+per-layer")
_LINES = 25


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["reference", "130m"], default="reference")
    parser.add_argument("--layers", type=int, default=24, help="of 130m")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window-length", type=int, default=1024)
    parser.add_argument("--state-size", type=int, default=32)
    parser.add_argument("--recipes", nargs="+", default=RECIPES, help="the others are compared with the first")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--profile", metavar="RECIPE", help="the functions that take most of a recipe's time")
    return parser.parse_args()


def model_and_windows(args: argparse.Namespace) -> tuple[PreTrainedModel, Windows]:
    if args.model == "130m":
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(0, 50000, (args.windows, args.window_length), generator=draw)
        return model_130m(layers=args.layers), Windows(ids, "random", "", 1.0, None)
    checkpoint = ghostssm.load("reference", dtype=torch.float32)
    text = ghostssm.read_text("stdlib", "calibration")
    windows = ghostssm.cut_windows(text, checkpoint.require_tokenizer(), args.window_length, args.windows, seed=42)
    return checkpoint.model, windows


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    print_machine()
    model, windows = model_and_windows(args)

    def planning(recipe: str) -> Callable[[], object]:
        return lambda: ghostssm.Calibration(model, windows).plan(recipe, args.state_size)

    # Loops are compiled, or fetched from numba's cache, before anything is timed.
    short = windows.part(slice(0, 1))
    for recipe in args.recipes if args.profile is None else [args.profile]:
        ghostssm.Calibration(model, short).plan(recipe, args.state_size)
    if args.profile is not None:
        profile = cProfile.Profile(clock)
        profile.runcall(planning(args.profile))
        pstats.Stats(profile).sort_stats("tottime").print_stats(_LINES)
        return

    memory = {}
    for recipe in args.recipes:
        reset_peak(model.device)
        before = peak_bytes(model.device)
        planning(recipe)()
        memory[recipe] = peak_bytes(model.device) - before
    seconds = seconds_by_side({recipe: planning(recipe) for recipe in args.recipes}, args.rounds, 0, clock)
    print(f"{len(windows)} x {windows.length} tokens, N' = {args.state_size}, {args.threads} threads")
    print(f"{'':34}{'median s':>10}{'min':>8}{'max':>8}{'ratio':>8}{'MB':>8}")
    base = statistics.median(seconds[args.recipes[0]])
    for recipe, times in seconds.items():
        median = statistics.median(times)
        cells = f"{median:10.2f}{min(times):8.2f}{max(times):8.2f}{median / base:8.2f}{memory[recipe] / 1e6:8.0f}"
        print(f"{recipe:34}{cells}")


if __name__ == "__main__":
    main()
