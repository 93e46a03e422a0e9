"""Situations of public bug reports, rebuilt small; docs/field-reports.md has the sources and what became of each."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import ghostssm
from ghostssm.errors import InputError, ModelError
from ghostssm.models.families import family_of, mixers_of
from tests.conftest import VOCABULARY, Run, random_windows, tiny_model
from tests.families.tiny import stepwise, tiny_hybrid

FolderOf = Callable[..., Path]
ROADS = pytest.mark.parametrize("road", [[], ["--stream"]], ids=["in memory", "streamed"])


def tokens(*shape: int) -> Tensor:
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(3))


def options(text_file: Path, output: Path) -> list[object]:
    windows = ["--calibration", text_file, "--windows", 2, "--window-length", 32]
    return ["--state-size", 8, *windows, "--refit", 0, "--output", output]


def edited_config(folder: Path, **values: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return folder


def logits_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=ids, return_dict=True).logits


def accelerated(model: PreTrainedModel) -> PreTrainedModel:
    ghostssm.accelerate(model)
    return model


class Adapted(nn.Module):
    """A layer with a low-rank adapter, built as peft builds it."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.base_layer = layer
        self.lora_A = nn.Linear(layer.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, layer.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    @property
    def in_features(self) -> int:
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        return self.base_layer.out_features

    def forward(self, hidden: Tensor) -> Tensor:
        return self.base_layer(hidden) + self.lora_B(self.lora_A(hidden))


class Quantised(nn.Linear):
    """As bitsandbytes has it: a linear layer by name, with packed weights."""

    def __init__(self, layer: nn.Linear):
        super().__init__(layer.in_features, layer.out_features, bias=False)
        self.weight = nn.Parameter(torch.zeros(layer.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)


def with_replaced(model: PreTrainedModel, part: str, kind: Callable[[Any], nn.Module]) -> PreTrainedModel:
    for mixer in mixers_of(model):
        setattr(mixer.module, part, kind(getattr(mixer.module, part)))
    return model


@ROADS
def test_what_a_trainer_leaves_beside_the_weights_is_not_read(
    run: Run, small: Path, text_file: Path, tmp_path: Path, road: list[object]
) -> None:
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (small / name).write_bytes(b"a pickle of classes that are not here")
    (small / "trainer_state.json").write_text('{"loss": NaN}')
    save_file({"base_model.model.x.lora_A.weight": torch.ones(1)}, small / "adapter_model.safetensors")
    code, _, err = run("prune", small, *options(text_file, tmp_path / "out"), *road)
    assert code == 0, err
    kinds = {path.suffix for path in (tmp_path / "out").iterdir()}
    assert kinds == {".json", ".md", ".safetensors", ".tensors"}
    assert run("verify", tmp_path / "out")[0] == 0


@pytest.mark.parametrize("verb", ["inspect", "prune", "stream", "evaluate", "export", "generate"])
def test_a_folder_with_an_adapter_alone_is_told_apart(run: Run, text_file: Path, tmp_path: Path, verb: str) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    save_file({"base_model.model.x.lora_A.weight": torch.ones(1)}, folder / "adapter_model.safetensors")
    code, out, err = run(*call_of(verb, folder, text_file, tmp_path))
    assert (code, out) == (2, "")
    assert "holds an adapter of 'org/base'" in err
    assert "merge_and_unload" in err


def call_of(verb: str, model: Path, text_file: Path, tmp_path: Path) -> list[object]:
    return {
        "inspect": ["inspect", model],
        "prune": ["prune", model, *options(text_file, tmp_path / "out")],
        "stream": ["prune", model, *options(text_file, tmp_path / "out"), "--stream"],
        "evaluate": ["evaluate", model, "--text", text_file, "--text-windows", 2, "--window-length", 32],
        "export": ["export", model, "--output", tmp_path / "model.gguf"],
        "generate": ["generate", model, "--prompt", "the quick", "--max-new-tokens", 2],
    }[verb]


@pytest.mark.parametrize("adapter_first", [True, False])
def test_adapters_count_whenever_they_were_added(adapter_first: bool) -> None:
    model = tiny_model()
    steps = [lambda: with_replaced(model, "in_proj", Adapted), lambda: ghostssm.accelerate(model)]
    for step in steps if adapter_first else steps[::-1]:
        step()
    own, alone = logits_of(model, tokens(2, 12)), logits_of(tiny_model(), tokens(2, 12))
    ghostssm.restore(model)
    stock = logits_of(model, tokens(2, 12))
    torch.testing.assert_close(own, stock, rtol=1e-4, atol=1e-4)
    assert (own - alone).abs().max() > 0.1


def test_weights_that_are_swapped_later_count() -> None:
    model, other = accelerated(tiny_model()), tiny_model(seed=1)
    model.load_state_dict(other.state_dict(), assign=True)
    torch.testing.assert_close(logits_of(model, tokens(2, 12)), logits_of(other, tokens(2, 12)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("part", "kind", "message"),
    [
        ("in_proj", Adapted, r"mixer\.in_proj is a .*\.Adapted around another layer.*merge_and_unload"),
        ("in_proj", Quantised, r"mixer\.in_proj is a .*\.Quantised; expected torch's Linear.*unquantised"),
        ("out_proj", Quantised, r"mixer\.out_proj is a .*\.Quantised; expected torch's Linear.*unquantised"),
    ],
)
def test_layers_that_can_not_be_cut_are_refused_before_any_work(part: str, kind: Any, message: str) -> None:
    plan = ghostssm.Calibration(tiny_model(), random_windows(2, 16)).plan("magnitude", 8)
    model = with_replaced(tiny_model(), part, kind)
    before = {name: id(value) for name, value in model.named_parameters()}
    for work in (
        lambda: ghostssm.Calibration(model, random_windows(2, 16)),
        lambda: ghostssm.apply_plan(model, plan),
        lambda: ghostssm.pad_state(model, 32),
    ):
        with pytest.raises(ModelError, match=message):
            work()
    assert {name: id(value) for name, value in model.named_parameters()} == before


def test_a_model_in_the_wrapping_of_peft_is_refused_with_the_remedy() -> None:
    class PeftModel(nn.Module):
        def merge_and_unload(self) -> None: ...

    plan, model = ghostssm.Calibration(tiny_model(), random_windows(2, 16)).plan("magnitude", 8), PeftModel()
    for work in (
        lambda: ghostssm.Calibration(model, random_windows(2, 16)),  # type: ignore[arg-type]
        lambda: ghostssm.apply_plan(model, plan),  # type: ignore[arg-type]
        lambda: ghostssm.accelerate(model),  # type: ignore[arg-type]
    ):
        with pytest.raises(InputError, match=r"Found a PeftModel .* model = model\.merge_and_unload\(\)"):
            work()


@pytest.mark.parametrize("case", ["bamba", "zamba2", "falcon_h1", "granite", "nemotron_h"])
def test_packed_rows_are_left_to_transformers(case: str) -> None:
    """Without its kernels it refuses them; nothing runs one sequence's state into the next."""
    model, ids = tiny_hybrid(case), tokens(1, 12)
    sequences = torch.tensor([[0] * 5 + [1] * 7], dtype=torch.int32)
    for prepared in (model, accelerated(model)):
        with pytest.raises(ValueError, match="can't keep packed sequences apart"):
            prepared(input_ids=ids, seq_idx=sequences, use_cache=False)


@pytest.mark.parametrize("case", ["codestral-mamba", "zamba2", "nemotron_h"])
def test_padding_on_either_side(case: str) -> None:
    """Padding on the left is exact. On the right, transformers' cache is not; ours is the same, no better, no worse."""
    model, ids = tiny_hybrid(case), tokens(2, 10)
    cache_name = family_of(model.config).cache_argument
    right = torch.ones_like(ids)
    right[1, 6:] = 0

    def after_right_padding() -> Tensor:
        with torch.inference_mode():
            cache = model(input_ids=ids, attention_mask=right, use_cache=True)[cache_name]
            following = torch.cat([right, torch.ones(2, 1, dtype=torch.long)], 1)
            more = {} if case == "codestral-mamba" else {"position_ids": right.sum(1, keepdim=True)}
            step = {"input_ids": ids[:, :1], "attention_mask": following, cache_name: cache, "use_cache": True}
            return model(**step, **more).logits

    stock = after_right_padding()
    left = {"input_ids": ids, "attention_mask": right.flip(1), "max_new_tokens": 6, "do_sample": False}
    alone = model.generate(input_ids=ids[1:, 4:], max_new_tokens=6, do_sample=False)[0, 6:]
    ghostssm.accelerate(model)
    torch.testing.assert_close(after_right_padding(), stock, rtol=1e-3, atol=1e-4)
    assert torch.equal(model.generate(**left)[1, 10:], alone)


NO_LIMITS: dict[str, dict[str, Any]] = {  # which transformers knows in prefill only
    "codestral-mamba": {"time_step_limit": (0.0, float("inf"))},
    "zamba2": {"time_step_min": 1e-6},
    "nemotron_h": {"time_step_min": 1e-6},
}


def small_pruned(case: str) -> PreTrainedModel:
    """Pruned to sizes that differ between groups, so that some channels are padding."""
    model = tiny_hybrid(case, **NO_LIMITS.get(case, {}))
    return ghostssm.apply_plan(model, ghostssm.Calibration(model, random_windows(2, 16)).plan("ghost", 6, "pooled"))


@pytest.mark.parametrize("case", ["zamba2", "falcon_h1-norm", "granite", "nemotron_h"])
def test_pruned_hybrids_go_on_from_a_cache_with_several_tokens(case: str) -> None:
    model, ids = small_pruned(case), tokens(2, 20)
    with torch.inference_mode():
        whole = stepwise(model, ids, [20])
        for prepared in (model, accelerated(model)):
            found = stepwise(prepared, ids, [9, 4, 1, 6])
            assert (found - whole).abs().max() < 1e-4 * whole.abs().max()


@pytest.mark.parametrize("length", [16, 17, 32, 33])
def test_prompts_one_token_longer_than_whole_chunks(length: int) -> None:
    model, ids = tiny_model(chunk_size=16, n_groups=2), tokens(2, length + 3)
    with torch.inference_mode():
        expected = stepwise(model, ids, [length, 1, 1, 1])
        ghostssm.accelerate(model)
        for pieces in ([length, 1, 1, 1], [16, length - 16, 3], [length - 1, 1, 3]):
            found = stepwise(model, ids, [piece for piece in pieces if piece])
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["codestral-mamba", "zamba2", "granite"])
def test_beams_of_a_pruned_model_keep_their_own_states(case: str) -> None:
    """Against the beams of a model that has no cache and reads everything anew for each token."""
    model = small_pruned(case)
    arguments = {"input_ids": tokens(2, 7), "max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    expected = model.generate(**arguments, use_cache=False)
    assert torch.equal(model.generate(**arguments), expected)
    assert torch.equal(accelerated(model).generate(**arguments), expected)


@pytest.mark.parametrize("case", ["codestral-mamba", "granite"])
def test_a_decode_loop_that_records_gradients(case: str) -> None:
    model, ids = tiny_hybrid(case), tokens(2, 12)
    stock, own = stepwise(model, ids, [9, 1, 1, 1]), stepwise(accelerated(model), ids, [9, 1, 1, 1])
    assert stock.requires_grad
    assert own.requires_grad
    torch.testing.assert_close(own, stock, rtol=1e-3, atol=1e-4)


def test_a_copy_of_an_accelerated_model_is_its_own() -> None:
    model, ids = tiny_model(), tokens(2, 12)
    ghostssm.accelerate(model)
    before = logits_of(model, ids)
    twin, expected = copy.deepcopy(model), tiny_model()
    with torch.no_grad():
        for changed in (twin, expected):
            for parameter in changed.parameters():
                parameter.mul_(0.7)
    torch.testing.assert_close(logits_of(twin, ids), logits_of(expected, ids), rtol=1e-4, atol=1e-4)
    assert torch.equal(logits_of(model, ids), before)
    assert torch.equal(logits_of(pickle.loads(pickle.dumps(model)), ids), before)


@pytest.mark.parametrize("metadata", [None, {}, {"format": "mlx"}], ids=["none", "empty", "mlx"])
def test_weight_files_that_do_not_say_what_wrote_them(small: Path, metadata: dict[str, str] | None) -> None:
    file = small / "model.safetensors"
    save_file(load_file(file), file, metadata=metadata)
    model = ghostssm.load(str(small)).model
    assert torch.equal(logits_of(model, tokens(1, 8)), logits_of(tiny_model(), tokens(1, 8)))
    windows = random_windows(1, 8)
    assert ghostssm.evaluate(ghostssm.stream(str(small)).blocks, windows).loss == ghostssm.evaluate(model, windows).loss


@pytest.mark.parametrize("verb", ["inspect", "prune", "stream", "evaluate", "export", "generate"])
@pytest.mark.parametrize(
    ("key", "value", "how"),
    [
        ("quantization", {"group_size": 64, "bits": 4}, "4 bits"),
        ("quantization_config", {"group_size": 64, "bits": 4}, "4 bits"),
        ("compression_config", {"quant_method": "compressed-tensors"}, "compressed-tensors"),
    ],
)
def test_quantised_checkpoints_of_other_tools(
    run: Run, small: Path, text_file: Path, tmp_path: Path, verb: str, key: str, value: Any, how: str
) -> None:
    edited_config(small, **{key: value})
    code, out, err = run(*call_of(verb, small, text_file, tmp_path))
    assert (code, out) == (2, "")
    assert f"is quantised ({key} in config.json: {how}). Prune or distil the unquantised model" in err


@ROADS
def test_keys_that_only_a_server_reads_stay(
    run: Run, text_file: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, road: list[object]
) -> None:
    source = tmp_path / "model"
    tiny_hybrid("nemotron_h").save_pretrained(source)
    tokenizer.save_pretrained(source)
    edited_config(source, mamba_ssm_cache_dtype="float32", max_position_embeddings=2**18)
    code, _, err = run("prune", source, *options(text_file, tmp_path / "out"), *road)
    assert code == 0, err
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out"))
    changed = {key for key in before if after.get(key) != before[key]}
    assert changed == {
        "ssm_state_size",
        "layers_block_type",
        "mtp_layers_block_type",
    }  # kinds have their published names


def test_a_config_that_asks_for_tuples(run: Run, small: Path, text_file: Path, tmp_path: Path) -> None:
    edited_config(small, return_dict=False)
    for verb in ("prune", "stream", "evaluate", "generate"):
        code, _, err = run(*call_of(verb, small, text_file, tmp_path / verb))
        assert code == 0, (verb, err)


def test_a_model_in_memory_that_gives_tuples() -> None:
    model = tiny_model()
    model.config.return_dict = False
    windows = random_windows(2, 16)
    assert ghostssm.evaluate(model, windows).loss == ghostssm.evaluate(tiny_model(), windows).loss
    assert ghostssm.Calibration(model, windows).plan("taylor", 8) is not None


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("recipe", ["output+repair", "taylor", "balanced"])
def test_a_default_dtype_that_a_script_has_set(recipe: str) -> None:
    windows, ids = random_windows(2, 32), tokens(2, 12)
    model = tiny_model(n_groups=2)
    expected = ghostssm.Calibration(model, windows).plan(recipe, 8)
    with torch.no_grad():
        logits = stepwise(accelerated(model), ids, [9, 1, 1, 1])
    with default_dtype(torch.bfloat16):
        found = ghostssm.Calibration(model, windows).plan(recipe, 8)
        with torch.no_grad():
            assert torch.equal(stepwise(model, ids, [9, 1, 1, 1]), logits)
    assert found.selections == expected.selections


class TestHarness:
    @pytest.fixture
    def harness(self) -> Any:
        pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'ghostssm[lm-eval]'")
        from ghostssm.workflows import harness

        return harness

    def requests(self, kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        from lm_eval.api.instance import Instance

        return [Instance(kind, {}, given, index) for index, given in enumerate(arguments)]

    @pytest.mark.filterwarnings("ignore")
    def test_the_batch_changes_no_likelihood(self, harness: Any, small: Path) -> None:
        pairs = [("the quick", " brown"), ("", " empty"), ("a", " b" * 30), ("same", "x"), ("same", "x")]
        found = []
        for batch in (1, 3, "auto"):
            model = harness.GhostLM(str(small), device="cpu", batch_size=batch, max_length=64)
            scores = model.loglikelihood(self.requests("loglikelihood", pairs), disable_tqdm=True)
            found.append([value for value, _ in scores])
        assert found[1] == pytest.approx(found[0], rel=1e-5)
        assert found[2] == pytest.approx(found[0], rel=1e-5)

    @pytest.mark.filterwarnings("ignore")
    def test_a_tokenizer_that_names_no_special_token(
        self, harness: Any, small: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path / "nameless")
        plain, nameless = (
            harness.GhostLM(str(small), tokenizer=place, device="cpu", batch_size=2, max_length=64)
            for place in (None, str(tmp_path / "nameless"))
        )
        texts = self.requests("loglikelihood_rolling", [("abc def",), ("x",)])
        assert nameless.loglikelihood_rolling(texts, disable_tqdm=True) == plain.loglikelihood_rolling(
            texts, disable_tqdm=True
        )
        edited_config(small, bos_token_id=None, eos_token_id=None)
        with pytest.raises(ModelError, match="names a token that ends a text"):
            harness.GhostLM(str(small), tokenizer=str(tmp_path / "nameless"), device="cpu")


def test_sizes_of_falcon_h1_in_gguf(tmp_path: Path) -> None:
    """Its mixers are not ``expand`` times as wide as the model, and their heads are not those of attention."""
    gguf = pytest.importorskip("gguf", reason="needs gguf: pip install 'ghostssm[gguf]'")
    model = tiny_hybrid("falcon_h1-norm", mamba_d_ssm=96, mamba_n_heads=12, mamba_proj_bias=False)
    model.save_pretrained(tmp_path / "model")
    checkpoint = ghostssm.load(str(tmp_path / "model"))
    plan = ghostssm.Calibration(checkpoint.model, random_windows(2, 16)).plan("ghost", 8)
    ghostssm.apply_plan(checkpoint.model, plan)
    reader = gguf.GGUFReader(ghostssm.export_gguf(checkpoint, tmp_path / "model.gguf", with_tokenizer=False).path)
    names = ("inner_size", "group_count", "state_size", "time_step_rank")
    inner, groups, states, heads = (reader.fields[f"falcon-h1.ssm.{name}"].contents() for name in names)
    assert (inner, groups, states, heads) == (96, 2, 8, 12)
    projected = next(tensor for tensor in reader.tensors if tensor.name == "blk.0.ssm_in.weight")
    assert projected.data.shape[0] == 2 * inner + 2 * groups * states + heads
