"""How much a plan's loss depends on which directions of the output are drawn, and on how many per sample.

    python benchmarks/sampling.py --directions 8 256 --seeds 42 1 2 3

Directions beyond the output's size count as all of them: then nothing is drawn but the positions.
"""

from __future__ import annotations

import argparse
import copy
from functools import partial

import torch

import ghostssm
from ghostssm.calibration import open_block
from ghostssm.calibration.samples import sample_outputs


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    checkpoint = ghostssm.load(options.model)
    model, vocabulary = checkpoint.model.float(), checkpoint.require_tokenizer()
    calibration = ghostssm.read_text(options.text, "calibration")
    windows = ghostssm.cut_windows(calibration, vocabulary, options.window_length, options.windows, 42)
    held_out = ghostssm.read_text(options.text, "evaluation")
    evaluation = ghostssm.evaluation_windows(held_out, vocabulary, options.window_length, options.text_windows)
    dense = ghostssm.evaluate(model, evaluation)
    for directions in options.directions:
        open_block.sample_outputs = partial(sample_outputs, directions=directions)
        known = ghostssm.Calibration(model, windows)
        for seed in options.seeds:
            plan = known.plan(options.recipe, options.state_size, seed=seed)
            pruned = ghostssm.apply_plan(copy.deepcopy(model), plan)
            excess = ghostssm.evaluate(pruned, evaluation).excess_over(dense)
            print(
                f"{directions:4} directions  seed {seed:<4} {excess.mean:.4f} ± {excess.standard_error:.4f}", flush=True
            )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--text", default="stdlib", help="to calibrate on, and on its other side to measure")
    parser.add_argument("--recipe", default="output+repair")
    parser.add_argument("--state-size", type=int, default=64)
    parser.add_argument("--directions", nargs="+", type=int, default=[8])
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 1, 2, 3])
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--window-length", type=int, default=512)
    parser.add_argument("--text-windows", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
