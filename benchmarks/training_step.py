"""A training step, forward and backward of the language model's loss, with and without `ghostssm.accelerate`.

Both sides share one model with random weights and the sizes of mamba2-130m, and take turns. transformers keeps far
more for the backward pass than fits many machines: ``--layers 4`` needs a sixth of it. The products with weight
matrices and the loss over the vocabulary are the same on both sides; they are timed alone as a third.

python benchmarks/training_step.py --layers 4
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
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

    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]

    def shared() -> None:
        model.zero_grad(set_to_none=True)
        for layer in layers:
            given = torch.randn(args.batch * args.length, layer.in_features, requires_grad=True)
            out = layer(given)
            if layer is model.lm_head:
                F.cross_entropy(out, ids.flatten()).backward()
            else:
                out.backward(out.detach())

    sides = {"transformers": step, "accelerated": accelerated, "products and loss alone": shared}
    print_sides(seconds_by_side(sides, args.rounds), "transformers")


if __name__ == "__main__":
    main()
