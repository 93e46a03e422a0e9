"""Whole-model decoding: transformers dense, ours dense, ours at smaller state sizes; the sides take turns.

    python benchmarks/model_decode.py --batch 64

The model has the sizes of mamba2-130m and random weights. A step is one token for every sequence of the batch.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from dataclasses import replace

import torch
from interleaved import model_130m, print_machine

import ghostssm
from ghostssm.evaluation.speed import first_channels
from ghostssm.plan.decision import Projection
from ghostssm.plan.plan import Plan
from ghostssm.plan.surgery import pruned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--state-size", type=int, nargs="+", default=[64, 32, 16])
    parser.add_argument("--state-dtype", nargs="+", default=["int8"], help="measured beside float32; also tiers")
    parser.add_argument("--projected", action="store_true", help="also states that all N channels are projected onto")
    parser.add_argument("--ours-only", action="store_true", help="without transformers, whose prompts take minutes")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--bfloat16", action="store_true", help="weights in bfloat16")
    args = parser.parse_args()

    print_machine()
    model = model_130m(dtype=torch.bfloat16 if args.bfloat16 else torch.float32, layers=args.layers)
    narrow = [dtype for dtype in args.state_dtype if dtype != "float32"]
    whole, plans = first_channels(model, 128), {size: first_channels(model, size) for size in args.state_size}
    sides: dict[str, tuple[str | None, Plan]] = {} if args.ours_only else {"transformers, N = 128": (None, whole)}
    sides["ours, N = 128"] = "float32", whole
    sides |= {f"ours, N' = {size}": ("float32", plan) for size, plan in plans.items()}
    if args.projected:
        sides |= {f"ours, N' = {size}, projected": ("float32", projected(whole, size)) for size in plans}
    for size, plan in {128: whole, **plans}.items():
        for dtype in narrow:
            sides[f"ours, N' = {size}, {dtype}"] = (
                dtype,
                in_tiers(whole, size, model.config.num_heads) if dtype == "tiers" else plan,
            )
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    tokens: dict[str, torch.Tensor] = {}
    for _ in range(args.rounds):
        for name, (dtype, plan) in sides.items():
            with contextlib.ExitStack() as stack:
                smaller = stack.enter_context(pruned(model, plan))
                if dtype:
                    ghostssm.accelerate(smaller, state_dtype=dtype)
                    stack.callback(ghostssm.restore, smaller)
                tokens[name] = decode(smaller, args.batch, args.steps, seconds[name])

    print(f"batch {args.batch}, {model.dtype}")
    median = {name: statistics.median(times) for name, times in seconds.items()}
    for name, step in median.items():
        beside = [
            f"x{median[other] / step:6.2f} {other}"
            for other in ("transformers, N = 128", "ours, N = 128")
            if other in median
        ]
        print(
            f"{name:30}{args.batch / step:10,.1f} tokens/s  {'  '.join(beside)}   step "
            f"{min(seconds[name]) * 1e3:.0f} to {max(seconds[name]) * 1e3:.0f} ms"
        )
    if not args.ours_only:
        same = torch.equal(tokens["transformers, N = 128"], tokens["ours, N = 128"])
        print(f"greedy tokens of ours and transformers identical: {same}")


def projected(whole: Plan, size: int) -> Plan:
    """All channels onto a smaller state; which maps do it has no influence on speed."""
    decisions = {
        name: replace(decision, projection=Projection(*(torch.randn(whole.n_groups, 128, size) / 11 for _ in "BC")))
        for name, decision in whole.decisions.items()
    }
    return replace(whole, decisions=decisions)


def in_tiers(whole: Plan, size: int, heads: int) -> Plan:
    """A projected state of which an eighth of the channels have 8 bits, and three eighths 4."""
    plan = projected(whole, size)
    tiers = ((size // 8, 3 * size // 8),) * heads
    return replace(plan, decisions={name: replace(each, tiers=tiers) for name, each in plan.decisions.items()})


def decode(model: torch.nn.Module, batch: int, steps: int, seconds: list[float]) -> torch.Tensor:
    """Greedy tokens (batch, steps) after a prompt of distinct short sequences; wall times of the steps are appended."""
    ids = torch.randint(0, 50000, (batch, 8), generator=torch.Generator().manual_seed(1))
    chosen = []
    with torch.inference_mode():
        output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        for _ in range(steps):
            begun = time.perf_counter()
            chosen.append(output.logits[:, -1:].argmax(-1))
            output = model(input_ids=chosen[-1], cache_params=output.cache_params, use_cache=True)
            seconds.append(time.perf_counter() - begun)
    return torch.cat(chosen, dim=1)


if __name__ == "__main__":
    main()
