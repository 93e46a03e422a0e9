"""lm-evaluation-harness (the package ``lm_eval``) on every model that ghostssm loads.

Importing this module registers the harness's model ``ghostssm``. The harness looks for no plugins, so that its own
command knows the model only when started from here:

    python -m ghostssm.workflows.harness --model ghostssm --model_args pretrained=FOLDER --tasks lambada_openai
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.api.group import Group
from lm_eval.api.registry import register_model
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import get_dtype
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerBase

from ghostssm.checkpoint.loading import Checkpoint, load
from ghostssm.errors import InputError, ModelError, TextError, did_you_mean
from ghostssm.models.forward import accelerate


@dataclass(frozen=True)
class Score:
    """One number of the harness.

    Attributes:
        task: or a group of tasks.
        metric, filter: as the harness names them; the filter is ``none`` unless the task has several.
        standard_error: None where the harness gives none.
        higher_is_better: None where the task doesn't say.
        shots: examples before each question; None for a group.
        documents: how many the number is over; None for a group whose tasks the harness doesn't add up.
        version: the task's, as its file says.
    """

    task: str
    metric: str
    filter: str
    value: float
    standard_error: float | None
    higher_is_better: bool | None
    shots: int | None
    documents: int | None
    version: str


@register_model("ghostssm")
class GhostLM(HFLM):  # type: ignore[misc]
    """The harness's model for transformers, with ghostssm's loading in place of its own.

    It takes both dialects, ``reference`` and projected models, checks them as `ghostssm.load` does, and on a CPU
    runs ghostssm's forward pass.

    Args:
        pretrained: a MODEL.
        tokenizer: a folder or hub id to take the tokenizer from instead.
        dtype: of the weights; ``auto`` for the stored one.
        device: as the harness has it, the CPU where torch finds no CUDA.
        options: all else that the harness's model ``hf`` takes, such as ``batch_size`` and ``max_length``.

    Raises:
        InputError, ModelError, NumericalError: see `ghostssm.load`; or the model has no tokenizer.
    """

    def __init__(
        self,
        pretrained: str,
        tokenizer: str | None = None,
        dtype: str | torch.dtype = "float32",
        device: str = "cuda",
        **options: Any,
    ):
        # The harness's command asks for cuda:0 unless it is told otherwise.
        place = "cpu" if device.startswith("cuda") and not torch.cuda.is_available() else device
        checkpoint = load(
            pretrained, dtype=None if dtype == "auto" else get_dtype(dtype), device=place, tokenizer=tokenizer
        )
        if checkpoint.model.device.type == "cpu":
            accelerate(checkpoint.model)
        options = {"backend": "causal"} | options  # it knows no name of our own class
        super().__init__(pretrained=checkpoint.model, tokenizer=_with_end_of_text(checkpoint), **options)


def _with_end_of_text(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """A checkpoint's tokenizer; if it names no token for the end of text, it gets that of the model's config.

    The harness pads with such a token, and puts it before a text without a context.

    Raises:
        ModelError: there is no tokenizer, or neither it nor the config names any such token.
    """
    tokenizer = checkpoint.require_tokenizer()
    if tokenizer.eos_token_id is None:
        end = checkpoint.model.config.eos_token_id
        first = end[0] if isinstance(end, list) and end else end
        token = tokenizer.convert_ids_to_tokens(first) if isinstance(first, int) else None
        if token is not None:
            tokenizer.eos_token = token
        elif tokenizer.bos_token_id is None:
            raise ModelError(
                f"Neither the tokenizer of {checkpoint.source.name} nor its config.json names a token that ends a text "
                "(eos_token, eos_token_id), which tasks need; expected one in tokenizer_config.json."
            )
    return tokenizer


def load_tasks(names: Sequence[str], include_path: str | Path | None = None) -> list[Task | Group]:
    """The harness's tasks with their data.

    Args:
        names: of tasks, groups and tags, patterns such as ``mmlu_*``, or paths of task files.
        include_path: a folder of task files, which come before the harness's own of the same name.

    Raises:
        InputError: a name that is unknown, a task named twice, or no such folder.
        TextError: a task's data can't be loaded.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise InputError(f"No folder at {str(include_path)!r}; expected one with task files (YAML) of the harness.")
    manager = TaskManager(include_path=include_path)
    tasks: dict[str, Task | Group] = {}
    for name in dict.fromkeys(known for asked in names for known in _known(manager, asked)):
        try:
            loaded = manager.load([name])
        except Exception as error:  # what fetches or prepares a task's data may raise anything
            reason = next(iter(str(error).splitlines()), "")
            raise TextError(
                f"The data of the task {name!r} could not be loaded ({type(error).__name__}: {reason}). Most tasks "
                "fetch it from the hub at first use; expected a network, or a task file whose data_files are here."
            ) from error
        groups = loaded["groups"]
        tasks |= {name: groups[name]} if name in groups else loaded["tasks"]
    try:
        manager.load(list(tasks.values()))
    except ValueError as error:
        raise InputError(f"{error}; expected every task once, alone or in a group.") from None
    return list(tasks.values())


def _known(manager: TaskManager, name: str) -> list[str]:
    """The names that a name or pattern stands for."""
    matching: list[str] = manager.match_tasks([name])
    if matching:
        return matching
    if Path(name).is_file():
        return [name]
    raise InputError(
        f"The harness knows no task {name!r}.{did_you_mean(name, manager.all_tasks, 3)} Expected a name that "
        "`lm-eval ls tasks` lists, the path of a task file, or a task in the folder that --include-path names."
    )


def run_tasks(model: GhostLM, tasks: Sequence[Task | Group], limit: int | None = None) -> list[Score]:
    """Evaluate a model on tasks, each with the examples and metrics that its file asks for.

    Args:
        limit: the first so many documents of every task; None for all.
    """
    none_to_find = TaskManager(include_defaults=False)  # else it would look for all task files again, for seconds
    results = lm_eval.simple_evaluate(
        model=model, tasks=list(tasks), limit=limit, log_samples=False, task_manager=none_to_find
    )
    return [score for task in results["results"] for score in _scores(results, task)]


def _scores(results: dict[str, Any], task: str) -> list[Score]:
    values = results["results"][task]
    scores = []
    for key, value in values.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr") or isinstance(value, str):
            continue
        error = values.get(f"{metric}_stderr,{filter_name}")
        scores.append(
            Score(
                task=task,
                metric=metric,
                filter=filter_name,
                value=float(value),
                standard_error=None if error is None or isinstance(error, str) else float(error),
                higher_is_better=results["higher_is_better"].get(task, {}).get(metric),
                shots=results["n-shot"].get(task),
                documents=values.get("sample_len"),
                version=str(results["versions"].get(task, "")),
            )
        )
    return scores


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
