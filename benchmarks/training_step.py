"""A training step, forward and backward of the language model's loss, with and without `ghostssm.accelerate`.

Both sides share one model with random weights and the sizes of mamba2-130m, and take turns. transformers keeps far
more for the backward pass than fits many machines: ``--layers 4`` needs a sixth of it.

python benchmarks/training_step.py --layers 4
"""

from __future__ import annotations

import argparse

import torch
from interleaved import model_130m, print_machine, print_sides, seconds_by_side

from ghostssm import accelerate, restore


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--state-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    print_machine()
    model = model_130m(args.state_size, layers=args.layers).train()
    ids = torch.randint(model.config.vocab_size, (args.batch, args.length))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    def accelerated() -> None:
        accelerate(model)
        step()
        restore(model)

    print_sides(seconds_by_side({"transformers": step, "accelerated": accelerated}, args.rounds), "transformers")


if __name__ == "__main__":
    main()
