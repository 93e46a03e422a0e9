"""Does a prune take what ``ghostssm inspect --predict`` says?

    python benchmarks/prediction.py
    python benchmarks/prediction.py --models FOLDER FOLDER

The built-in model and one of random weights, or those that are named, each pruned in a process of its own, in memory
and with ``--stream``. The prediction is made right before each run. Besides the seconds on the wall there are those of
the processor, which other work on the machine disturbs less. Memory is the process's peak resident set.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
from pathlib import Path

import torch
from interleaved import print_machine
from streaming import run, write_model

import ghostssm
from ghostssm.pruning.forecast import forecast, product_rate


def processor_seconds() -> float:
    """Of all child processes so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[], help="in place of the built-in and the random one")
    parser.add_argument("--layers", type=int, default=12, help="of the random one")
    parser.add_argument("--hidden-size", type=int, default=1024, help="of the random one")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window-length", type=int, default=1024)
    args = parser.parse_args()
    print_machine()
    tokens = args.windows * args.window_length
    cells = ("s predicted", "s measured", "s of CPU", "MB predicted", "MB measured")
    print(f"{f'{tokens} tokens':28}" + "".join(f"{cell:>14}" for cell in cells))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not args.models:
            write_model(folder / "random", args.layers, args.hidden_size, torch.float32)
        for model in args.models or ("reference", str(folder / "random")):
            for stream in ([], ["--stream"]):
                described = ghostssm.describe(model)
                size = described.layout.state_size // 2
                predicted = forecast(described, size, tokens, product_rate())
                output = folder / f"{Path(model).name}-{len(stream)}"
                prune = ["prune", model, "--output", str(output), "--state-size", str(size), "--method", "ghost"]
                prune += ["--windows", str(args.windows), "--window-length", str(args.window_length)]
                before = processor_seconds()
                code, seconds, peak, errors = run([*prune, "--calibration", "stdlib", *stream])
                if code:
                    raise SystemExit(errors)
                memory = predicted.streamed_memory if stream else predicted.memory
                found = (predicted.seconds, seconds, processor_seconds() - before, memory / 1e6, peak)
                print(
                    f"{' '.join([Path(model).name, *stream]):28}" + "".join(f"{cell:14.0f}" for cell in found),
                    flush=True,
                )


if __name__ == "__main__":
    main()
