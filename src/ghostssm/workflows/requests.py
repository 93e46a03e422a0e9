"""The requests of all use cases: the only list of options, for Python and for the command.

A field with an `Option` is an option of the command as well; its entry under ``Attributes`` is its text in the help.
Nothing here imports PyTorch; no more do the checks that need nothing but a request (`request_checks`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from ghostssm.choices import DEFAULT_RECIPE, DEFAULT_SEED, DISTILL_STEPS, Groups, Rounding, Trained
from ghostssm.units import text_name
from ghostssm.values import Value
from ghostssm.workflows.options import Option, Usual

_NOT_IN_RESULT = frozenset(
    {"output", "stream", "overwrite", "offload", "resume", "push_to_hub", "private", "device"}
    | {"teacher_device", "save_minutes", "log_to", "checkpointing"}
)
_PLACES = frozenset({"model", "student", "teacher", "calibration", "evaluate", "text", "tokenizer"})
"""Fields that name a model or a text: a folder's path says less than a name."""


def _text_of(given: Mapping[str, Any]) -> str:
    """The built-in model was trained on code, which every machine has; the paper calibrates others on wikitext2."""
    reads_text = not (given.get("tasks") or given.get("last_words"))
    is_built_in = "reference" in (given.get("model"), given.get("against"))
    return "stdlib" if is_built_in and reads_text else "wikitext2"


MODEL = Option("MODEL", positional=True)
SEED = Option("NUMBER", "Other options", least=0, most=2**63 - 1)
TOKENIZER, DEVICE = Option("PLACE", "Other options"), Option("DEVICE", "Other options")
STATE_DTYPE, ROUNDING = Option("DTYPE", "How", flag="--state-dtype"), Option("HOW", "How")
GROUPS = Option("HOW", "How")
TEXT = Option("TEXT", "Text", usual=Usual("wikitext2; stdlib for 'reference'", _text_of))


@dataclass(frozen=True, kw_only=True)
class Request:
    """How models are opened, and what losses are measured on.

    Attributes:
        window_length: tokens per window.
        text_windows: how many windows to measure the loss on. All of the text if not given.
        tokenizer: folder or hub id of the tokenizer, if the model has none.
        device: where to compute: cpu, cuda, cuda:1 ...
    """

    window_length: Annotated[int, Option("TOKENS", "Text", least=2)] = 2048
    text_windows: Annotated[int | None, Option("COUNT", "Text", least=1)] = None
    tokenizer: Annotated[str | None, TOKENIZER] = None
    device: Annotated[str, DEVICE] = "cpu"

    def as_json(self) -> dict[str, Any]:
        """The fields that decide the result, as JSON values; texts and models by their names, without their folders."""
        return {each.name: self._json(each.name) for each in fields(self) if each.name not in _NOT_IN_RESULT}

    def _json(self, name: str) -> Any:
        value = getattr(self, name)
        if isinstance(value, tuple):
            return [text_name(each) for each in value] if name in _PLACES else list(value)
        return text_name(value) if name in _PLACES and value is not None else value

    def differs(self, name: str) -> bool:
        """Whether an option has another value than its default."""
        return any(each.name == name and getattr(self, name) != each.default for each in fields(self))


@dataclass(frozen=True, kw_only=True)
class CalibratingRequest(Request):
    """The same, and what methods see of a text.

    Attributes:
        calibration: text to calibrate on.
        windows: how many windows of the text to calibrate on. They are drawn at random.
        seed: the same number draws the same windows and makes the same random choices.
    """

    calibration: Annotated[str, TEXT] = "wikitext2"
    windows: Annotated[int, Option("COUNT", "Text", least=1)] = 128
    seed: Annotated[int, SEED] = DEFAULT_SEED


@dataclass(frozen=True, repr=False)
class PruneRequest(Value, CalibratingRequest):
    """Everything that can be asked of a pruning run.

    Exactly one of ``state_size``, ``budget``, ``max_excess_loss`` and ``state_bytes`` is given. Without ``output``,
    which the command needs, the result stays in memory.

    Attributes:
        model: hub id, local folder, or 'reference'.
        output: folder for the checkpoint and the plan.
        state_size: prune to this state size, from 1 to below the model's own size N.
        budget: or: keep this share of the state, such as 0.5.
        max_excess_loss: or: find the state size and dtype of the fewest bytes that raise the loss by at most so many
            nats per token. Some of the calibration windows are kept apart to measure that.
        state_bytes: or: find the state size and dtype that lose least within so many bytes per sequence: 1/8 of the
            dense float32 state, say, or 6MiB. Measured as with --max-excess-loss.
        recipe: the method that decides what stays, such as ghost, or a recipe: a method with recovery steps, such as
            ghost+repair, output+refit100+repair or balanced+per-layer. The default loses least among those whose
            result loads in the model's own class.
        state_dtype: measure the pruned model with its state kept in this dtype, in which it is to be served: float32,
            bfloat16, float16, int8, fp8 or int4. Later verbs keep to it, and --max-excess-loss tries no other.
        multiple: with --per-layer, --max-excess-loss or --state-bytes: try multiples of this number as sizes; 8 if not
            given.
        engines: engines that are to run the result, such as vllm or llama.cpp-cuda; the nearest size that suits them
            is taken. 'ghostssm inspect reference' lists all of them.
        groups: 'equal': every group of heads keeps N' channels. 'pooled': groups may keep different numbers; the
            smaller ones are padded with zeros.
        evaluate: also measure the loss on TEXT before and after, and write it into the model card.
        baselines: with --evaluate: prune by these methods or recipes too, to the same size or within the same bytes,
            and show what they lose beside the result: ghost magnitude random, say. Their models are not kept.
        dialect: format of the output: transformers or mamba_ssm.
        untie: store the output head as a weight of its own even if it equals the embeddings; SGLang needs that.
        report: also measure what the state does and how fast the model decodes, for a page that the command writes to
            DIR/report.html; with --stream nothing is decoded. It takes the extra package: pip install
            'ghostssm[report]'.
        batches: with --report: batch sizes to decode at; 1, 8 and 32 if not given.
        push_to_hub: upload what was written to the hub.
        private: with --push-to-hub: who sees a new repository; private if not given.
        stream: hold one layer's weights in memory at a time. The result is the same, in more files. Until the end, what
            is done is kept in DIR.run, so that --resume can go on with it.
        offload: with --stream: keep there, in files, what grows with the number of windows. It takes less memory.
        resume: with --stream: go on with the run in DIR.run, whatever ended it. Without one, start anew.
        overwrite: replace an output folder that is not empty.
    """

    model: Annotated[str, MODEL]
    output: Annotated[str | None, Option("DIR", required=True)] = None
    state_size: Annotated[int | None, Option("N'", least=1)] = None
    budget: Annotated[float | None, Option("SHARE")] = None
    max_excess_loss: Annotated[float | None, Option("NATS", least=0)] = None
    state_bytes: Annotated[str | None, Option("SHARE|SIZE")] = None
    recipe: Annotated[str, Option("RECIPE", flag="--method")] = DEFAULT_RECIPE
    state_dtype: Annotated[str | None, STATE_DTYPE] = None
    multiple: Annotated[int | None, Option("NUMBER", "How", least=1)] = None
    engines: Annotated[tuple[str, ...], Option("ENGINE", flag="--engine")] = ()
    groups: Annotated[Groups, GROUPS] = "equal"
    evaluate: Annotated[str | None, Option("TEXT", "Output")] = None
    baselines: Annotated[tuple[str, ...], Option("RECIPE", "Output")] = ()
    dialect: Annotated[Literal["transformers", "mamba_ssm"], Option("NAME", "Output")] = "transformers"
    untie: Annotated[bool, Option(panel="Output")] = False
    report: Annotated[bool, Option(panel="Output")] = False
    batches: Annotated[tuple[int, ...] | None, Option("SIZE", "Output", flag="--batch", least=1)] = None
    push_to_hub: Annotated[str | None, Option("ORG/NAME", "Output")] = None
    private: Annotated[bool | None, Option(panel="Output", flag="--private/--public")] = None
    stream: Annotated[bool, Option(panel="Larger than memory")] = False
    offload: Annotated[Path | None, Option("FOLDER", "Larger than memory")] = None
    resume: Annotated[bool, Option(panel="Larger than memory")] = False
    overwrite: Annotated[bool, Option(panel="Output")] = False


@dataclass(frozen=True, repr=False)
class CompareRequest(Value, CalibratingRequest):
    """Everything that can be asked of a comparison.

    Either ``state_sizes`` or ``state_bytes`` are given.

    Attributes:
        model: hub id, local folder, or 'reference'.
        state_sizes: state sizes N' to prune to, one or several.
        methods: methods or recipes to compare, such as ghost, output+repair or balanced+per-layer. A recipe is a method
            with recovery steps. If not given: all methods that the model can take, without steps.
        text: text to measure the loss on.
        groups: 'equal': every group of heads keeps N' channels. 'pooled': groups may keep different numbers; the
            smaller ones are padded with zeros.
        batches: batch sizes to measure decoding at.
        report: also measure what a report shows.
        state_dtypes: of the recurrent state, one or several: float32, bfloat16, float16, int8, fp8, int4.
        state_rounding: of a state narrower than float32: nearest or stochastic.
        state_bytes: or: for every method, the state size and dtype that lose least within so many bytes per sequence,
            as prune --state-bytes chooses them: 1/4 1/8, say, or 6MiB. Measured on every fourth calibration window.
        engines: with --state-bytes: engines that are to run what is chosen, such as vllm: of the sizes and dtypes only
            those that all of them run. 'ghostssm inspect reference' lists all of them.
    """

    model: Annotated[str, MODEL]
    state_sizes: Annotated[tuple[int, ...], Option("N'", flag="--state-size", least=1)] = ()
    methods: Annotated[tuple[str, ...], Option("RECIPE")] = ()
    text: Annotated[str, TEXT] = "wikitext2"
    groups: Annotated[Groups, GROUPS] = "equal"
    batches: Annotated[tuple[int, ...], Option("SIZE", flag="--batch", least=1)] = (1, 32)
    report: bool = False
    state_dtypes: Annotated[tuple[str, ...], STATE_DTYPE] = ("float32",)
    state_rounding: Annotated[Rounding, ROUNDING] = "nearest"
    state_bytes: Annotated[tuple[str, ...], Option("SHARE|SIZE")] = ()
    engines: Annotated[tuple[str, ...], Option("ENGINE", flag="--engine")] = ()


@dataclass(frozen=True)
class InspectRequest:
    """Everything that can be asked about a checkpoint.

    Attributes:
        model: hub id, local folder, or 'reference'.
        state_sizes: also say what a cut to state sizes N' saves.
        state_bytes: also list the state sizes and dtypes that take at most so many bytes per sequence, from which prune
            --state-bytes chooses: 1/4 1/8 of the dense float32 state, say, or 6MiB.
        batches: also predict the decode speed on this machine, at these batch sizes.
        state_dtypes: also say how to serve it with such a state: float32, bfloat16, float16, int8, fp8 or int4;
            tiers for a model that was pruned to them.
        memories: also say how many sequences engines take in 80GiB, say.
        context: with --memory: tokens of a sequence; 8192 if not given.
        predict: also predict the time and memory that a prune with GHOST on 128 windows of 2048 tokens takes here.
        engines: engines, such as vllm or llama.cpp-cuda. 'ghostssm inspect reference' lists all of them.
    """

    model: Annotated[str, MODEL]
    state_sizes: Annotated[tuple[int, ...], Option("N'", flag="--state-size", least=1)] = ()
    state_bytes: Annotated[tuple[str, ...], Option("SHARE|SIZE")] = ()
    batches: Annotated[tuple[int, ...], Option("SIZE", flag="--batch", least=1)] = ()
    state_dtypes: Annotated[tuple[str, ...], Option("DTYPE", flag="--state-dtype")] = ()
    memories: Annotated[tuple[str, ...], Option("SIZE", flag="--memory")] = ()
    context: Annotated[int | None, Option("TOKENS", least=1)] = None
    predict: Annotated[bool, Option()] = False
    engines: Annotated[tuple[str, ...], Option("ENGINE", flag="--engine")] = ()


@dataclass(frozen=True)
class DistillRequest(Request):
    """Everything that can be asked of a distillation.

    Attributes:
        student: a pruned checkpoint: folder or hub id.
        teacher: the model that it was pruned from.
        text: text to learn on, read as it is needed; also ORG/NAME of a dataset on the hub.
        output: folder for the checkpoint.
        steps: steps to take, of Adam.
        batch: windows per step, over all processes and accumulated parts.
        window_length: tokens per window.
        learning_rate: the largest one, after a warmup; it falls along a cosine. If not given: 0.002 times the root of
            how far the student is from its teacher at first (their divergence, nats per token).
        trained: parameters that move: 'mixers', 'small' (no large matrix) or 'all'.
        state_dtype: train with the student's state rounded to this dtype after every token, in which it is to be
            served: float32, bfloat16, float16, int8, fp8 or int4. If not given, int4 for a student that was pruned for
            int4, else float32. Later verbs keep to it.
        hidden_weight: also learn the hidden states after every block, with this weight beside the divergence.
        accumulate: compute a batch in N parts, one after the other; memory holds the activations of one.
        checkpointing: keep the inputs of blocks only, and compute their insides twice.
        bfloat16: compute in bfloat16; weights, gradients and Adam's moments stay float32.
        seed: the same number draws the same windows and makes the same random choices.
        evaluate: measure the loss on these texts, before and after; the first one's goes into the model card.
        teacher_device: where the teacher computes, if not where the student does.
        save_minutes: keep the state in DIR.run every so many minutes.
        resume: go on with the run whose state DIR.run holds, whatever ended it; from the beginning where there is none.
        overwrite: replace an output folder that is not empty.
        log_to: also log to tensorboard or wandb.
    """

    student: Annotated[str, Option("STUDENT", positional=True)]
    teacher: Annotated[str, Option("MODEL")]
    text: Annotated[str, Option("TEXT")]
    output: Annotated[str, Option("DIR")]
    steps: Annotated[int, Option("N", least=1)] = DISTILL_STEPS
    batch: Annotated[int, Option("B", least=1)] = 8
    window_length: Annotated[int, Option("TOKENS", "Text", least=2)] = field(default=512, kw_only=True)
    learning_rate: Annotated[float | None, Option("X", "How")] = None
    trained: Annotated[Trained, Option("WHICH", "How", flag="--train")] = "mixers"
    state_dtype: Annotated[str | None, STATE_DTYPE] = None
    hidden_weight: Annotated[float, Option("X", "How", least=0)] = 0.0
    accumulate: Annotated[int, Option("N", "Scale", least=1)] = 1
    checkpointing: Annotated[bool, Option(panel="Scale")] = False
    bfloat16: Annotated[bool, Option(panel="Scale")] = False
    seed: Annotated[int, SEED] = DEFAULT_SEED
    evaluate: Annotated[tuple[str, ...], Option("TEXT", "Output")] = ()
    teacher_device: Annotated[str | None, Option("DEVICE", "Scale")] = None
    save_minutes: Annotated[float, Option("X", "Output", least=0)] = 10.0
    resume: Annotated[bool, Option(panel="Output")] = False
    overwrite: Annotated[bool, Option(panel="Output")] = False
    log_to: Annotated[Literal["tensorboard", "wandb"] | None, Option("NAME", "Output")] = None


@dataclass(frozen=True)
class EvaluateRequest(Request):
    """Everything that can be asked of an evaluation.

    Attributes:
        model: hub id, local folder, or 'reference'.
        text: text to measure the loss on.
        against: also measure BASE, the model that MODEL was pruned from, and the difference.
        last_words: instead: how well the last word of every line or row of TEXT is guessed, as in LAMBADA.
        copying: instead: how well text is repeated that was read 256 or more tokens before.
        tasks: instead: tasks of lm-evaluation-harness; pip install 'ghostssm[lm-eval]' first.
        include_path: with --tasks: more task files.
        limit: with --tasks or --last-words: measure at most so many documents.
        stream: hold one layer's weights in memory at a time.
        offload: with --stream: keep there, in files, what grows with the number of windows. It takes less memory.
        state_dtype: of the recurrent state, rounded after every token: float32, bfloat16, float16, int8, fp8 or int4;
            tiers for a model that was pruned to them. If not given, that which it was pruned for, else float32. That of
            BASE is float32.
        state_rounding: of a state narrower than float32: nearest or stochastic.
    """

    model: Annotated[str, MODEL]
    text: Annotated[str, TEXT] = "wikitext2"
    against: Annotated[str | None, Option("BASE")] = None
    last_words: Annotated[str | None, Option("TEXT")] = None
    copying: Annotated[bool, Option()] = False
    tasks: Annotated[tuple[str, ...], Option("TASK")] = ()
    include_path: Annotated[str | None, Option("FOLDER")] = None
    limit: Annotated[int | None, Option("COUNT", least=1)] = None
    stream: Annotated[bool, Option(panel="Larger than memory")] = False
    offload: Annotated[Path | None, Option("FOLDER", "Larger than memory")] = None
    state_dtype: Annotated[str | None, STATE_DTYPE] = None
    state_rounding: Annotated[Rounding, ROUNDING] = "nearest"


@dataclass(frozen=True)
class BenchRequest:
    """Everything that can be asked of a measurement of speed.

    Attributes:
        model: hub id, local folder, or 'reference'.
        state_sizes: state sizes N' to measure beside the model's own N; a half and a quarter of it if not given. A
            projected state, or one of a size per layer, is measured as it is.
        batches: sequences at a time.
        prompt_length: tokens per sequence to prefill.
        device: where to compute: cpu, cuda, cuda:1 ...
        state_dtypes: of the recurrent state, one or several: float32, bfloat16, float16, int8, fp8, int4; tiers for a
            model that was pruned to them.
        state_rounding: of a state narrower than float32: nearest or stochastic.
    """

    model: Annotated[str, MODEL]
    state_sizes: Annotated[tuple[int, ...], Option("N'", flag="--state-size", least=1)] = ()
    batches: Annotated[tuple[int, ...], Option("SIZE", flag="--batch", least=1)] = (1, 8, 32)
    prompt_length: Annotated[int, Option("TOKENS", least=1)] = 128
    device: Annotated[str, DEVICE] = "cpu"
    state_dtypes: Annotated[tuple[str, ...], STATE_DTYPE] = ("float32",)
    state_rounding: Annotated[Rounding, ROUNDING] = "nearest"


@dataclass(frozen=True)
class ExportRequest:
    """Everything that can be asked of an export.

    Attributes:
        model: hub id, local folder, or 'reference'.
        output: one file for gguf, else a folder.
        format: 'gguf': a file for llama.cpp. 'transformers', 'mamba_ssm': a checkpoint folder.
        dtype: number format of the large matrices: f32, f16, bf16, or q8_0 for gguf. If not given: as they are.
        pad_to: enlarge the state to this size with zeros, for an engine that needs it. Answers stay the same.
        untie: store the output head as a weight of its own even if it equals the embeddings; SGLang needs that.
        tokenizer: folder or hub id of the tokenizer, if the model has none.
        no_tokenizer: write no tokenizer.
        overwrite: replace what is there.
    """

    model: Annotated[str, MODEL]
    output: Annotated[str, Option("PATH")]
    format: Annotated[Literal["gguf", "transformers", "mamba_ssm"], Option("NAME")] = "gguf"
    dtype: Annotated[Literal["f32", "f16", "bf16", "q8_0"] | None, Option("NAME")] = None
    pad_to: Annotated[int | None, Option("SIZE", least=1)] = None
    untie: Annotated[bool, Option()] = False
    tokenizer: Annotated[str | None, TOKENIZER] = None
    no_tokenizer: Annotated[bool, Option(panel="Other options")] = False
    overwrite: Annotated[bool, Option(panel="Other options")] = False


@dataclass(frozen=True)
class ReproduceRequest(CalibratingRequest):
    """Everything that can be asked of a reproduction.

    Attributes:
        output: folder for results.json and results.md. A run that stopped goes on there.
        models: names from mamba2-130m to mamba2-2.7b are fetched from the hub. NAME=FOLDER takes a local one; a folder
            alone has folders of these names. If not given: all five from the hub.
        tables: 'sparsity': the 1.3b model cut by 10 to 90%. 'size': all models cut by half.
        methods: methods or recipes, as for compare. If not given: those of the paper.
        state_sizes: state sizes N' to prune to, in place of the paper's.
        text: text to measure the loss on.
    """

    output: Annotated[str, Option("DIR")]
    models: Annotated[tuple[str, ...], Option("CHECKPOINT")] = ()
    tables: Annotated[tuple[str, ...], Option("TABLE", flag="--table")] = ()
    methods: Annotated[tuple[str, ...], Option("RECIPE")] = ()
    state_sizes: Annotated[tuple[int, ...], Option("N'", flag="--state-size", least=1)] = ()
    text: Annotated[str, Option("TEXT", "Text")] = "wikitext2"
    calibration: Annotated[str, Option("TEXT", "Text")] = field(default="wikitext2", kw_only=True)

    @property
    def numbers(self) -> dict[str, int | None]:
        """The numbers that decide a result, besides model, method and texts."""
        names = ("windows", "text_windows", "window_length", "seed")
        return {name: getattr(self, name) for name in names}
