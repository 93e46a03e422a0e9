"""What every method costs in loss: excess over dense with its paired standard error, seconds, and peak memory.

    python benchmarks/fidelity.py MODEL --calibration TEXT --text TEXT
    python benchmarks/fidelity.py MODEL --calibration TEXT --last-words PASSAGES
    python benchmarks/fidelity.py MODEL --calibration TEXT --text TEXT --copying 1024
    PYTHONPATH=tools python benchmarks/fidelity.py RECALL_MODEL --recall 64

The first form takes any two texts: of one kind, or, to see what calibration on other text costs, of two. The second
measures the loss of the last word of every passage (a text with one on each line), as LAMBADA does. The third measures,
in windows of this many tokens, the loss of tokens that repeat what was read 256 or more tokens before. The fourth takes
a model of ``tools/train_recall.py`` and this many pairs, and gives the accuracy of its answers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from interleaved import print_machine

import ghostssm
from ghostssm.evaluation.copying import copying, copying_in_reach
from ghostssm.evaluation.recall import Recall, last_words
from ghostssm.evaluation.speed import peak_bytes, reset_peak
from ghostssm.text.sources import read_passages
from ghostssm.workflows.compare import measure_cell

RECIPES = (
    "ghost",
    "random",
    "magnitude",
    "taylor-layer",
    "rrqr",
    "output-single",
    "output",
    "ghost+repair",
    "output+repair",
    "ghost+refit+repair",
    "output+refit+repair",
    "balanced",
    "output+refit+repair+per-layer",
    "balanced+per-layer",
    "balanced+refit+per-layer",
    "sparsegpt",
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", default="stdlib")
    parser.add_argument("--text", default="stdlib")
    parser.add_argument("--last-words", metavar="PASSAGES", help="the last words of passages instead of whole text")
    parser.add_argument("--passages", type=int, default=1000, help="at most so many of them")
    parser.add_argument("--copying", type=int, metavar="LENGTH", help="copied tokens, in windows of this many")
    parser.add_argument("--recall", type=int, metavar="PAIRS", help="associative recall instead of text")
    parser.add_argument("--state-size", type=int, nargs="+", default=[64, 32, 16])
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--window-length", type=int, default=512)
    parser.add_argument("--text-windows", type=int, default=64)
    parser.add_argument("--output", type=Path, help="also write the rows to this JSON file")
    return parser.parse_args()


class OnText:
    """Excess loss on windows of a text."""

    def __init__(self, args: argparse.Namespace):
        checkpoint = ghostssm.load(args.model, dtype=torch.float32)
        self.model, self.tokenizer, length = checkpoint.model, checkpoint.require_tokenizer(), args.window_length
        calibration = ghostssm.read_text(args.calibration, "calibration")
        self.windows = ghostssm.cut_windows(calibration, self.tokenizer, length, args.windows, seed=42)
        text = ghostssm.read_text(args.text, "evaluation")
        self.test = ghostssm.cut_windows(text, self.tokenizer, length, args.text_windows, seed=1)
        self.dense = ghostssm.evaluate(self.model, self.test)
        print(
            f"calibration: {len(self.windows)} x {length} tokens of {Path(args.calibration).name}; "
            f"test: {len(self.test)} x {length} of {Path(args.text).name}; dense perplexity {self.dense.perplexity:.3f}"
        )

    def cost(self, model: torch.nn.Module) -> tuple[float, float, str]:
        """What a model loses, its standard error, and a remark."""
        excess = ghostssm.evaluate(model, self.test).excess_over(self.dense)
        return excess.mean, excess.standard_error, ""


class OnLastWords(OnText):
    """Excess loss of the last words of passages, and the accuracy."""

    def __init__(self, args: argparse.Namespace):
        super().__init__(args)
        self.passages = read_passages(args.last_words)[: args.passages]
        self.words = last_words(self.model, self.tokenizer, self.passages)
        print(f"{len(self.passages)} passages: dense loss {self.words.loss:.3f}, accuracy {self.words.accuracy:.2%}")

    def cost(self, model: torch.nn.Module) -> tuple[float, float, str]:
        found = last_words(model, self.tokenizer, self.passages)
        excess = found.losses - self.words.losses
        return excess.mean().item(), (excess.std() / len(excess) ** 0.5).item(), f"accuracy {found.accuracy:.2%}"


class OnCopying(OnText):
    """Excess loss of copied tokens, that of all others, and what sight of the earlier occurrence still gains."""

    def __init__(self, args: argparse.Namespace):
        super().__init__(args)
        text = ghostssm.read_text(args.text, "evaluation")
        self.long = ghostssm.cut_windows(text, self.tokenizer, args.copying, args.text_windows, seed=1)
        self.whole, short = copying(self.model, self.long), copying_in_reach(self.model, self.long)
        for name in ("copied", "elsewhere"):
            losses = getattr(self.whole, name)
            gain = getattr(short, name).excess_over(losses)
            print(
                f"{name}: {int(losses.counts.sum())} tokens in {len(self.long)} windows of {args.copying}, dense loss "
                f"{losses.mean:.4f}, without sight of 256 tokens back {gain.mean:+.4f} ± {gain.standard_error:.4f}"
            )

    def cost(self, model: torch.nn.Module) -> tuple[float, float, str]:
        found, short = copying(model, self.long), copying_in_reach(model, self.long)
        copied = found.copied.excess_over(self.whole.copied)
        remarks = {
            "elsewhere": found.elsewhere.excess_over(self.whole.elsewhere),
            "gain copied": short.copied.excess_over(found.copied),
            "gain elsewhere": short.elsewhere.excess_over(found.elsewhere),
        }
        remark = ", ".join(f"{name} {value.mean:.4f} ± {value.standard_error:.4f}" for name, value in remarks.items())
        return copied.mean, copied.standard_error, remark


class OnRecall:
    """Accuracy lost on associative recall; the standard error is over sequences."""

    def __init__(self, args: argparse.Namespace):
        from associative_recall import associative_recall, recall_of  # from tools/

        self.recall_of = recall_of
        self.model = ghostssm.load(args.model, dtype=torch.float32).model
        values = self.model.config.vocab_size // 2
        draw = torch.Generator().manual_seed(7)
        ids, _ = associative_recall(args.windows, args.recall, values, values, draw)
        self.windows = ghostssm.Windows(ids, "associative recall", "", 1.0, 7)
        self.test = associative_recall(args.text_windows, args.recall, values, values, draw)
        self.dense = self.recall_of(self.model, *self.test)
        print(f"{args.recall} pairs, {args.text_windows} sequences; dense accuracy {self.dense.accuracy:.2%}")

    def cost(self, model: torch.nn.Module) -> tuple[float, float, str]:
        lost = self._by_sequence(self.dense) - self._by_sequence(self.recall_of(model, *self.test))
        return lost.mean().item(), (lost.std() / len(lost) ** 0.5).item(), ""

    def _by_sequence(self, recall: Recall) -> torch.Tensor:
        return recall.correct.double().view(len(self.test[0]), -1).mean(1)


def main() -> None:
    args = parse_args()
    print_machine()
    kind = OnRecall if args.recall else OnLastWords if args.last_words else OnCopying if args.copying else OnText
    task = kind(args)
    device = task.model.device
    calibration = ghostssm.Calibration(task.model, task.windows)
    recipes = [str(ghostssm.Recipe.parse(recipe)) for recipe in args.recipes]
    unit = "excess loss" if args.recall is None else "accuracy lost"
    print(f"{'recipe':28}{'N' + chr(39):>4}{unit:>20}  of ghost's  seconds  peak memory  state sizes")
    rows = []
    for size in args.state_size:
        first = None
        for recipe in recipes:
            reset_peak(device)
            outcome = measure_cell(calibration, (recipe, size), lambda model: (peak_bytes(device), *task.cost(model)))
            plan, seconds, (peak, mean, error, remark) = outcome.plan, outcome.seconds, outcome.measured
            first = mean if first is None else first
            sizes = " ".join(map(str, plan.state_sizes)) if plan.per_layer else f"{plan.mean_state_size:g}"
            print(
                f"{recipe:28}{size:4}{mean:11.5f} ± {error:.5f}{mean / first:11.3f}{seconds:9.1f}{peak / 1e6:10.0f} MB"
                f"  {sizes}  {remark}".rstrip(),
                flush=True,
            )
            rows.append(
                {
                    "recipe": recipe,
                    "state_size": size,
                    "mean": mean,
                    "error": error,
                    "remark": remark,
                    "seconds": seconds,
                    "peak_bytes": peak,
                    "state_sizes": plan.state_sizes,
                }
            )
    if args.output is not None:
        args.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
