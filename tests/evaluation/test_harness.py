"""The harness's numbers on local tasks, against those computed from transformers' own logits."""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import ghostssm
import ghostssm.workflows
from tests.conftest import Run, random_windows

pytestmark = pytest.mark.filterwarnings("ignore")  # of the harness and what it imports

WORDS = ["the quick brown fox", "one two two", "a b a b a"]
QUESTIONS = [("abc", [" d", " abc", " x y"], 1), ("1 2 3", [" 4", " 44", " four"], 0), ("no", [" yes", " n", " o"], 2)]
PAGES = [" ".join(["the quick brown fox jumps"] * 9), "short"]
MAX_LENGTH = 100


@pytest.fixture(scope="module")
def harness() -> Iterator[Any]:
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'ghostssm[lm-eval]'")
    from ghostssm.workflows import harness

    with pytest.MonkeyPatch.context() as patch:
        # Without its own thousands of task files, which take seconds to find.
        patch.setattr(harness, "TaskManager", functools.partial(harness.TaskManager, include_defaults=False))
        yield harness


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    data: dict[str, list[dict[str, Any]]] = {
        "words": [{"text": text} for text in WORDS],
        "choices": [{"question": question, "choices": options, "gold": gold} for question, options, gold in QUESTIONS],
        "pages": [{"page": page} for page in PAGES],
        "absent": [],
    }
    tasks: dict[str, dict[str, Any]] = {
        "words": {
            "output_type": "loglikelihood",
            "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
            "doc_to_target": "{{' ' + text.split(' ')[-1]}}",
            "metric_list": [
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
                {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            ],
        },
        "choices": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "pages": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{page}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
        "absent": {"output_type": "loglikelihood", "doc_to_text": "", "doc_to_target": ""},
    }
    for name, task in tasks.items():
        rows = folder / f"{name}.jsonl"
        if data[name]:
            rows.write_text("".join(json.dumps(row) + "\n" for row in data[name]))
        common = {
            "task": f"local_{name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(rows)}, "cache_dir": str(tmp_path / "cache")},
            "test_split": "test",
            "target_delimiter": "",
        }
        (folder / f"{name}.yaml").write_text(json.dumps(common | task))  # JSON is YAML
    group = {"group": "local_group", "task": ["local_words", "local_choices"]}
    mean = {"metric": "acc", "aggregation": "mean", "weight_by_size": True}
    (folder / "group.yaml").write_text(json.dumps(group | {"aggregate_metric_list": [mean]}))
    return folder


def pruned_folder(source: Path, output: Path, recipe: str, dialect: Any = "transformers") -> Path:
    checkpoint = ghostssm.load(str(source))
    plan = ghostssm.Calibration(checkpoint.model, random_windows(8, 64)).plan(recipe, 8)
    smaller = ghostssm.Checkpoint(ghostssm.apply_plan(checkpoint.model, plan), checkpoint.tokenizer, checkpoint.source)
    return ghostssm.save(smaller, plan, output, dialect=dialect)


def summed_log_probability(model: PreTrainedModel, before: list[int], answer: list[int]) -> tuple[float, bool]:
    with torch.inference_mode():
        scores = model(input_ids=torch.tensor([before + answer])).logits[0, len(before) - 1 : -1].double()
    wanted = torch.tensor(answer)
    greedy = bool((scores.argmax(-1) == wanted).all())
    return scores.log_softmax(-1).gather(1, wanted[:, None]).sum().item(), greedy


def by_hand(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> dict[tuple[str, str], float]:
    def after(context: str, answer: str) -> tuple[float, bool]:
        return summed_log_probability(model, tokenizer(context)["input_ids"], tokenizer(answer)["input_ids"])

    words = [after(context, " " + word) for context, _, word in (text.rpartition(" ") for text in WORDS)]
    choices = [torch.tensor([after(question, option)[0] for option in options]) for question, options, _ in QUESTIONS]
    lengths = [torch.tensor([len(option) for option in options]) for _, options, _ in QUESTIONS]
    gold = [gold for _, _, gold in QUESTIONS]
    pages = 0.0
    for page in PAGES:  # the first window begins with the first special token, the others with the token before
        ids = [0, *tokenizer(page)["input_ids"]]
        for start in range(0, len(ids) - 1, MAX_LENGTH):
            if len(ids) - 1 - start >= MAX_LENGTH or start == 0:
                before, answer = ids[start : start + 1], ids[start + 1 : start + 1 + MAX_LENGTH]
            else:  # the last, shorter one sees as much as fits
                before, answer = ids[-MAX_LENGTH - 1 : start + 1], ids[start + 1 :]
            pages += summed_log_probability(model, before, answer)[0]
    return {
        ("local_words", "perplexity"): math.exp(-sum(loss for loss, _ in words) / len(words)),
        ("local_words", "acc"): sum(greedy for _, greedy in words) / len(words),
        ("local_choices", "acc"): sum(int(s.argmax()) == g for s, g in zip(choices, gold, strict=True)) / 3,
        ("local_choices", "acc_norm"): (
            sum(int((s / n).argmax()) == g for s, n, g in zip(choices, lengths, gold, strict=True)) / 3
        ),
        ("local_pages", "word_perplexity"): math.exp(-pages / sum(len(page.split()) for page in PAGES)),
        ("local_pages", "bits_per_byte"): -pages / math.log(2) / sum(len(page.encode()) for page in PAGES),
    }


TASKS = ["local_words", "local_choices", "local_pages"]


def scores_of(harness: Any, model: Any, folder: Path) -> dict[tuple[str, str], float]:
    scores = harness.run_tasks(model, harness.load_tasks(TASKS, folder))
    return {(score.task, score.metric): score.value for score in scores}


@pytest.mark.parametrize(
    ("recipe", "dialect", "kind"),
    [
        ("ghost", "transformers", "mamba2"),
        ("balanced", "transformers", "ghost_mamba2"),
        ("ghost", "mamba_ssm", "mamba2"),
    ],
)
def test_scores_equal_those_from_logits(
    harness: Any,
    folder_of: Callable[..., Path],
    task_folder: Path,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    recipe: str,
    dialect: str,
    kind: str,
) -> None:
    model = str(pruned_folder(folder_of(), tmp_path / "pruned", recipe, dialect))
    found = scores_of(harness, harness.GhostLM(model, device="cpu", batch_size=2, max_length=MAX_LENGTH), task_folder)
    plain = ghostssm.load(model, dtype=torch.float32).model
    assert plain.config.model_type == kind
    expected = by_hand(plain, tokenizer)
    assert found == pytest.approx(expected, rel=1e-5)
    assert found["local_choices", "acc"] > 0
    if dialect == "transformers":
        stock = harness.HFLM(model, device="cpu", dtype="float32", batch_size=2, max_length=MAX_LENGTH)
        assert scores_of(harness, stock, task_folder) == pytest.approx(expected, rel=1e-5)


def test_its_forward_pass_is_ours_and_generates_what_transformers_does(
    harness: Any, folder_of: Callable[..., Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    from lm_eval.api.instance import Instance

    folder = folder_of()
    model = harness.GhostLM(str(folder), batch_size=2)
    assert all("forward" in block.mixer.__dict__ for block in model.model.backbone.layers)
    prompts = ["the quick", "a much longer prompt"]  # the shorter one is padded on the left
    requests = [
        Instance("generate_until", {}, (prompt, {"until": [], "max_gen_toks": 6}), index)
        for index, prompt in enumerate(prompts)
    ]
    stock = AutoModelForCausalLM.from_pretrained(folder)
    for prompt, found in zip(prompts, model.generate_until(requests, disable_tqdm=True), strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        expected = stock.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        assert found == tokenizer.decode(expected, skip_special_tokens=True)


def test_evaluate_tasks(harness: Any, run: Run, folder_of: Callable[..., Path], task_folder: Path) -> None:
    small = folder_of()
    common = ["evaluate", small, "--include-path", task_folder, "--limit", 2]
    code, out, _ = run(*common, "--tasks", "local_words,local_choices", "--json")
    assert code == 0
    found = json.loads(out)
    assert [(row["task"], row["metric"]) for row in found] == [
        *(("local_words", "perplexity"), ("local_words", "acc")),
        *(("local_choices", "acc"), ("local_choices", "acc_norm")),
    ]
    assert {row["documents"] for row in found} == {2}
    code, out, _ = run(*common, "--tasks", task_folder / "words.yaml", "local_ch*")
    assert code == 0
    assert "perplexity (lower is better)" in out
    assert f"{found[0]['value']:.4f}" in out


def test_groups(harness: Any, folder_of: Callable[..., Path], task_folder: Path) -> None:
    tasks = harness.load_tasks(["local_group"], task_folder)
    scores = harness.run_tasks(harness.GhostLM(str(folder_of())), tasks)
    accuracy = {score.task: score.value for score in scores if score.metric == "acc"}
    assert accuracy.keys() == {"local_group", "local_words", "local_choices"}
    assert accuracy["local_group"] == pytest.approx((accuracy["local_words"] + accuracy["local_choices"]) / 2)
    with pytest.raises(ghostssm.InputError, match="every task once"):
        harness.load_tasks(["local_group", "local_words"], task_folder)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("local_wrods", "knows no task 'local_wrods'. Did you mean 'local_words'"),
        ("local_absent", "The data of the task 'local_absent' could not be loaded (FileNotFoundError"),
    ],
)
@pytest.mark.usefixtures("harness")
def test_tasks_that_can_not_be_run(
    run: Run, folder_of: Callable[..., Path], task_folder: Path, tasks: str, message: str
) -> None:
    code, out, err = run("evaluate", folder_of(), "--include-path", task_folder, "--tasks", tasks)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_data_out_of_reach(harness: Any, task_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'org/data' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(ghostssm.TextError, match=r"'local_words' could not be loaded \(ConnectionError.*network"):
        harness.load_tasks(["local_words"], task_folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "x", "--copying"], "at most one of"),
        (["--limit", 5], "works with --tasks or --last-words only"),
        (["--tasks", "x", "--limit", 0], "--limit is 0"),
        (["--tasks", "x", "--device", "cuda:99"], "'cuda:99'"),
    ],
)
def test_options_that_contradict(
    run: Run,
    folder_of: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    options: list[object],
    message: str,
) -> None:
    monkeypatch.setattr("ghostssm.extras.find_spec", lambda name: name)  # the package is there
    code, _, err = run("evaluate", folder_of(), *options)
    assert code == 2
    assert message in err


def test_a_model_that_is_not_there(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ghostssm.extras.find_spec", lambda name: name)  # the package is there
    code, _, err = run("evaluate", "nowhere", "--tasks", "x")
    assert code == 2
    assert "No model at 'nowhere'" in err


def test_without_the_package(run: Run, folder_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ghostssm.workflows, "harness", raising=False)
    monkeypatch.delitem(sys.modules, "ghostssm.workflows.harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, _, err = run("evaluate", folder_of(), "--tasks", "lambada_openai")
    assert code == 2
    assert "pip install 'ghostssm[lm-eval]'" in err


@pytest.mark.slow
@pytest.mark.usefixtures("harness")
def test_the_command_of_the_harness(folder_of: Callable[..., Path], task_folder: Path) -> None:
    options = ["--model", "ghostssm", "--model_args", f"pretrained={folder_of()}", "--include_path", str(task_folder)]
    done = subprocess.run(
        [sys.executable, "-m", "ghostssm.workflows.harness", *options, "--tasks", "local_choices"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "|local_choices|" in done.stdout
