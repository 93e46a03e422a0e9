"""What distillation gives back, against the tokens that it takes: starts x parameters x learning rates x steps x seeds.

    python benchmarks/distillation.py --state-size 64 --starts ghost output+repair --steps 75 300 600 --seeds 0 1 2
    python benchmarks/distillation.py --state-size 64 --starts output+repair --state-dtype int4 --rounded float32 int4
    PYTHONPATH=tools python benchmarks/distillation.py --model RECALL_MODEL --recall 64 --windows 128

Each line is one training, measured on text that nothing was trained on: excess loss over the dense model with its
paired standard error, and as a share of what GHOST's choice loses without distillation. Losses are of the weights as
they would be stored, in the model's own dtype, with the state in --state-dtype. --rounded says what the state is
rounded to in training; a line after those of all but the first has the paired difference to the first. Lines of several
seeds are followed by their mean and spread. --recall takes a model of ``tools/train_recall.py`` and this many pairs:
it is calibrated and trained on new sequences of the task, and measured by the share of answers that are lost.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time

import torch
from transformers import PreTrainedModel

import ghostssm
from ghostssm.evaluation.perplexity import Evaluation, evaluate
from ghostssm.ops.state_format import FORMATS, StateStorage
from ghostssm.plan.surgery import apply_plan, change_parameters
from ghostssm.recovery.distill.batches import MOST_HELD_OUT, Batches, HeldWindows, Source
from ghostssm.recovery.distill.training import Settings, distill
from ghostssm.text.streams import StreamedText


class OnText:
    """A model and the text that it is calibrated, trained and measured on: nats per token."""

    def __init__(self, options: argparse.Namespace):
        checkpoint = ghostssm.load(options.model)
        self._vocabulary, self._options = checkpoint.require_tokenizer(), options
        self._stored, self.model = checkpoint.model.dtype, checkpoint.model.float()
        calibration = ghostssm.read_text(options.text, "calibration")
        evaluation = ghostssm.read_text(options.evaluate or options.text, "evaluation")
        length = options.window_length
        self.windows = ghostssm.cut_windows(calibration, self._vocabulary, length, options.windows, 42)
        self._held_out = ghostssm.evaluation_windows(evaluation, self._vocabulary, length, options.text_windows)

    def source(self, steps: int) -> Source:
        """What to train on."""
        return StreamedText(self._options.text, self._vocabulary, self._options.window_length)

    def dense(self) -> Evaluation:
        """What the teacher loses in every window."""
        return evaluate(self.model, self._held_out)

    def measured(self, student: PreTrainedModel) -> Evaluation:
        """What a student loses in every window, its weights as they would be stored."""
        as_stored = copy.deepcopy(student).to(self._stored).float()
        return evaluate(as_stored, self._held_out, storage=StateStorage.of(self._options.state_dtype))


class OnRecall:
    """A model of associative recall: the share of wrong answers."""

    def __init__(self, options: argparse.Namespace):
        self.model = ghostssm.load(options.model, dtype=torch.float32).model
        self._options, self._draw = options, torch.Generator().manual_seed(7)
        self.windows = self._sequences(options.windows)
        self._held_out = self._drawn(options.text_windows)

    def _drawn(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        from associative_recall import associative_recall  # from tools/

        keys = self.model.config.vocab_size // 2
        return associative_recall(count, self._options.recall, keys, keys, self._draw)

    def _sequences(self, count: int) -> ghostssm.Windows:
        return ghostssm.Windows(self._drawn(count)[0], "associative recall", "", 1.0, 7)

    def source(self, steps: int) -> Source:
        """New sequences, enough for all steps, and to hold some out."""
        return HeldWindows(self._sequences(steps * self._options.batch + MOST_HELD_OUT))

    def dense(self) -> Evaluation:
        return self.wrong_answers(self.model, StateStorage())

    def measured(self, student: PreTrainedModel) -> Evaluation:
        return self.wrong_answers(student, StateStorage.of(self._options.state_dtype))

    def wrong_answers(self, model: PreTrainedModel, storage: StateStorage) -> Evaluation:
        """Their share in every sequence."""
        from associative_recall import recall_of  # from tools/

        wrong = ~recall_of(model, *self._held_out, storage=storage).correct
        return Evaluation(wrong.double().view(len(self._held_out[0]), -1).mean(1), 1.0)


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    task = OnRecall(options) if options.recall else OnText(options)
    model, measured = task.model, task.measured
    calibration, dense = ghostssm.Calibration(model, task.windows), task.dense()

    def student_of(recipe: str) -> PreTrainedModel:
        return apply_plan(copy.deepcopy(model), plans[recipe])

    plans = {name: calibration.plan(name, options.state_size) for name in dict.fromkeys(["ghost", *options.starts])}
    before = {name: measured(student_of(name)).excess_over(dense) for name in plans}
    ghost = before["ghost"].mean
    for name, lost in before.items():
        _print(name, "", 0, 0, 0, lost, ghost, 0.0)
    cells = itertools.product(options.starts, options.trained, options.rates, options.steps, options.rounded)
    first: dict[int, Evaluation] = {}
    for start, trained, rate, steps, rounded in cells:
        found = []
        for seed in options.seeds:
            batches = Batches(task.source(steps), options.batch, seed)
            settings = Settings(
                steps, options.batch, rate, trained, options.hidden_weight, seed=seed, state_dtype=rounded
            )
            begun = time.perf_counter()
            result = distill(student_of(start), model, batches, settings)
            seconds = time.perf_counter() - begun
            student = student_of(start)
            change_parameters(student, result.changes)
            student.tie_weights()
            losses = measured(student)
            found.append(losses.excess_over(dense))
            _print(start, trained, result.record.learning_rate, seed, result.record.tokens, found[-1], ghost, seconds)
            if rounded == options.rounded[0]:
                first[seed] = losses
            else:
                more = losses.excess_over(first[seed]).text
                print(f"    rounded to {rounded} in training: {more} over {options.rounded[0]}", flush=True)
        if len(found) > 1:
            means = [each.mean for each in found]
            mean, spread = statistics.mean(means), statistics.stdev(means)
            print(f"    mean of {len(means)} seeds {mean:.4f}, spread {spread:.4f}, {mean / ghost:.3f} of GHOST's")


def _print(
    start: str,
    trained: str,
    rate: float,
    seed: int,
    tokens: int,
    found: ghostssm.Difference,
    ghost: float,
    seconds: float,
) -> None:
    print(
        f"{start:24} {trained:7} rate {rate:<7.2g} seed {seed} {tokens:>10,} tokens  "
        f"{found.mean:.4f} ± {found.standard_error:.4f}  {found.mean / ghost:.3f} of GHOST's  {seconds:.0f} s",
        flush=True,
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--text", default="stdlib", help="to calibrate and train on")
    parser.add_argument("--evaluate", help="to measure on; the other side of --text if not given")
    parser.add_argument("--recall", type=int, metavar="PAIRS", help="associative recall instead of text")
    parser.add_argument("--state-size", type=int, default=64)
    parser.add_argument("--starts", nargs="+", default=["ghost", "output+repair", "output+refit100+repair"])
    parser.add_argument("--trained", nargs="+", default=["mixers"], choices=["mixers", "small", "all"])
    parser.add_argument(
        "--rates", nargs="+", type=float, default=[None], help="that which suits the start if not given"
    )
    parser.add_argument("--steps", nargs="+", type=int, default=[75, 300, 600])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--window-length", type=int, default=512)
    parser.add_argument("--state-dtype", default="float32", help="that the losses are measured in")
    parser.add_argument("--rounded", nargs="+", default=["float32"], choices=FORMATS, help="to these in training")
    parser.add_argument("--hidden-weight", type=float, default=0.0)
    parser.add_argument("--windows", type=int, default=32, help="to calibrate on")
    parser.add_argument("--text-windows", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
