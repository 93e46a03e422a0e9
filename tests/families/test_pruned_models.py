"""Every family from a checkpoint to a pruned one: what the cut does, and that stock transformers runs the result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import ghostssm
from ghostssm.calibration.walk import LayerWalk
from ghostssm.checkpoint.weights import stored_tensors
from ghostssm.methods import method_names
from ghostssm.models.families import mixers_of
from tests.conftest import random_windows
from tests.families.test_stock_models import last_hidden_states, padding, tokens
from tests.families.tiny import CASES, float64_throughout, stepwise, tiny_hybrid
from tests.test_surgery import random_plan, zero_cut_channels

cases = pytest.mark.parametrize("case", CASES)
HYBRIDS = [case for case in CASES if case != "codestral-mamba"]
STATE_SIZE_KEYS = {"mamba2": "state_size", "nemotron_h": "ssm_state_size"}
"""Where it is not mamba_d_state."""


def logits_of(model: Any, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(input_ids=ids, use_cache=False).logits
        return found


def saved(model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> Path:
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


@cases
def test_sliced_saved_and_loaded_equals_masked(case: str, tmp_path: Path) -> None:
    """The dense model with the cut channels zeroed, against the pruned model as stock transformers loads it.

    Every second group keeps nothing and is padded.
    """
    checkpoint = ghostssm.load(str(saved(tiny_hybrid(case), tmp_path / "dense")))
    plan = random_plan(checkpoint.model, [5, 0])
    ghostssm.apply_plan(checkpoint.model, plan)
    folder = ghostssm.save(checkpoint, plan, tmp_path / "pruned")

    masked = tiny_hybrid(case)
    zero_cut_channels(masked, plan)
    pruned = AutoModelForCausalLM.from_pretrained(folder).eval()
    key = STATE_SIZE_KEYS.get(pruned.config.model_type, "mamba_d_state")
    assert getattr(AutoConfig.from_pretrained(folder), key) == 5
    assert json.loads((folder / "config.json").read_text())["architectures"] == [type(masked).__name__]

    ids, mask = tokens(2, 20), padding(0, 6, length=20)
    runs: list[Callable[[Any], Tensor]] = [
        lambda model: stepwise(model, ids, [20]),
        lambda model: stepwise(model, ids, [15, 1, 1, 1, 2]),
        lambda model: stepwise(model, ids, [17, 1, 1, 1], mask)[mask.bool()],
    ]
    with torch.inference_mode():
        assert torch.equal(logits_of(pruned, ids), logits_of(checkpoint.model, ids))
        for model in (masked, pruned):
            model.double().config._experts_implementation = "eager"
        with float64_throughout():
            dense = runs[0](tiny_hybrid(case).double())
            for run in runs:
                expected = run(masked)
                torch.testing.assert_close(run(pruned), expected, rtol=0, atol=1e-10)
            assert (runs[0](masked) - dense).abs().max() > 1e-2
    arguments = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False}
    with float64_throughout():
        expected = masked.generate(ids, **arguments)
        assert torch.equal(pruned.generate(ids, **arguments), expected)
    ghostssm.accelerate(checkpoint.model)
    assert torch.equal(checkpoint.model.generate(ids, **arguments), expected)


@cases
def test_from_bfloat16_checkpoint_to_checkpoint(case: str, tmp_path: Path) -> None:
    before = saved(tiny_hybrid(case).to(torch.bfloat16), tmp_path / "dense")
    checkpoint = ghostssm.load(str(before))
    model, windows = checkpoint.model, random_windows(9, 40)
    assert model.dtype == torch.bfloat16
    dense = logits_of(model, windows.ids)
    assert torch.equal(dense, logits_of(AutoModelForCausalLM.from_pretrained(before).eval(), windows.ids))
    plan = ghostssm.Calibration(model, windows).plan("output+refit5+repair", 5)
    with ghostssm.pruned(model, plan) as smaller:
        inside = logits_of(smaller, windows.ids)
        assert not torch.equal(inside, dense)
    assert torch.equal(logits_of(model, windows.ids), dense)

    ghostssm.apply_plan(model, plan)
    folder = ghostssm.save(checkpoint, plan, tmp_path / "pruned")
    for again in (AutoModelForCausalLM.from_pretrained(folder).eval(), ghostssm.load(str(folder)).model):
        assert again.dtype == torch.bfloat16
        assert torch.equal(logits_of(again, windows.ids), inside)
    found = ghostssm.describe(str(folder))
    assert (found.family, found.layout.state_size) == (model.config.model_type, 5)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.layers == len(mixers_of(model))
    assert set(stored_tensors(folder)) == set(stored_tensors(before))


@pytest.mark.parametrize(("case", "groups"), [("falcon_h1-norm-first", "equal"), ("nemotron_h", "pooled")])
def test_every_method(case: str, groups: Any) -> None:
    model, windows = tiny_hybrid(case), random_windows(2, 30)
    dense = logits_of(model, windows.ids)
    calibration = ghostssm.Calibration(model, windows)
    for method in method_names():
        plan = calibration.plan(method, 4, groups=groups)
        assert set(plan.selections) == {mixer.name for mixer in mixers_of(model)}
        with ghostssm.pruned(model, plan) as smaller:
            assert not torch.equal(logits_of(smaller, windows.ids), dense)
        assert torch.equal(logits_of(model, windows.ids), dense)


@pytest.mark.parametrize("case", HYBRIDS)
def test_a_pruned_walk_ends_where_the_pruned_model_ends(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the next mixer is scored on what attention, experts and MLPs make of the pruned ones before it."""
    monkeypatch.setattr("ghostssm.text.windows._TOKENS_PER_BATCH", 80)
    model, windows = tiny_hybrid(case).double(), random_windows(5, 40)
    plan = random_plan(model, [3, 2])
    with float64_throughout():
        walk = LayerWalk(model, windows)
        for block in walk.blocks():
            (block.prune(plan.decisions[block.mixer.name]) if block.mixer else block).advance()
        with ghostssm.pruned(model, plan) as smaller:
            expected = last_hidden_states(smaller, windows.ids)
    assert (walk.hidden - expected).abs().max() < 1e-10 * expected.abs().max()


def test_shared_blocks_stay_shared() -> None:
    model, windows = tiny_hybrid("zamba2"), random_windows(2, 30)

    def shared() -> list[int]:
        layers: Any = model.model.layers
        return [id(layers[index].shared_transformer.feed_forward.down_proj.weight) for index in (1, 3, 5)]

    before = shared()
    assert before[0] == before[2] != before[1]
    plan = ghostssm.Calibration(model, windows).plan("output+repair", 4)
    with ghostssm.pruned(model, plan):
        assert shared() == before
    ghostssm.apply_plan(model, plan)
    assert shared() == before


def test_one_shared_block_is_stored_once(tmp_path: Path) -> None:
    model = tiny_hybrid("zamba2", num_mem_blocks=1)
    folder = saved(model, tmp_path / "dense")
    found = ghostssm.load(str(folder)).model
    ids = tokens(2, 20)
    assert torch.equal(logits_of(found, ids), logits_of(model, ids))
    assert ghostssm.describe(str(folder)).parameters == sum(value.numel() for value in model.parameters())


def test_refit_values_come_with_multipliers(tmp_path: Path) -> None:
    """Falcon-H1's vector is no parameter: it must fit the new sizes in memory as after loading."""
    model = tiny_hybrid("falcon_h1")
    ghostssm.apply_plan(model, random_plan(model, [3, 6]))
    again = AutoModelForCausalLM.from_pretrained(saved(model, tmp_path / "pruned"))
    for mixer, loaded in zip(mixers_of(model), mixers_of(again), strict=True):
        assert mixer.row_multipliers is not None
        assert torch.equal(mixer.row_multipliers, loaded.row_multipliers)
        assert len(mixer.row_multipliers) == mixer.layout.in_proj_rows == 2 * 64 + 2 * 2 * 6 + 8


def test_published_names_of_nemotron_h(tmp_path: Path) -> None:
    """Its checkpoints say ``backbone``, store experts one by one, and may have layers that transformers ignores."""
    model = tiny_hybrid("nemotron_h")
    folder = saved(model, tmp_path / "dense")
    with safetensors.safe_open(folder / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no dictionary)
    assert "backbone.layers.0.mixer.in_proj.weight" in tensors
    assert "backbone.layers.4.mixer.experts.3.up_proj.weight" in tensors
    extra = {"mtp.layers.0.norm.weight": torch.ones(32)}
    safetensors.torch.save_file(tensors | extra, folder / "model.safetensors")
    ids = tokens(1, 12)
    torch.testing.assert_close(logits_of(ghostssm.load(str(folder)).model, ids), logits_of(model, ids))
    plain = dict(model.state_dict())
    safetensors.torch.save_file(plain, folder / "model.safetensors")
    torch.testing.assert_close(logits_of(ghostssm.load(str(folder)).model, ids), logits_of(model, ids))
    tensors.pop("backbone.layers.4.mixer.experts.3.up_proj.weight")
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ghostssm.ModelError, match=r"experts\.3\.up_proj\.weight .* is missing"):
        ghostssm.load(str(folder))


class TestRefusals:
    def test_the_mamba_ssm_dialect(self, tmp_path: Path) -> None:
        checkpoint = ghostssm.load(str(saved(tiny_hybrid("granite"), tmp_path / "dense")))
        plan = random_plan(checkpoint.model, [4])
        ghostssm.apply_plan(checkpoint.model, plan)
        with pytest.raises(ghostssm.InputError, match="mamba_ssm dialect has no granitemoehybrid models"):
            ghostssm.save(checkpoint, plan, tmp_path / "pruned", dialect="mamba_ssm")
        assert not (tmp_path / "pruned").exists()

    @pytest.mark.parametrize(
        ("case", "changes"),
        [
            ("bamba", {"attn_layer_indices": [0, 1, 2, 3]}),
            ("granite", {"layer_types": ["full_attention"] * 4}),
            ("nemotron_h", {"layers_block_type": ["full_attention", "mlp", "moe"]}),
        ],
    )
    def test_patterns_without_mamba_layers(self, case: str, changes: dict[str, Any], tmp_path: Path) -> None:
        folder = saved(tiny_hybrid(case), tmp_path / "dense")
        edit_config(folder, **changes)
        for work in (ghostssm.describe, ghostssm.load):
            with pytest.raises(ghostssm.ModelError, match=r"None of the [34] layers .* is a Mamba-2 layer"):
                work(str(folder))

    @pytest.mark.parametrize(
        ("case", "changes", "message"),
        [
            ("bamba", {"mamba_n_groups": 3}, "n_groups = 3 does not divide"),
            ("bamba", {"mamba_d_state": 0}, "state_size is 0"),
            ("bamba", {"time_step_limit": None}, r"time_step_limit of model\.layers\.0\.mamba is None"),
            ("falcon_h1", {"ssm_multipliers": [1.0]}, "can't build a falcon_h1 model"),
            ("falcon_h1", {"hidden_act": "gelu"}, r"activation of model\.layers\.0\.mamba is 'gelu'"),
            ("nemotron_h", {"mamba_hidden_act": "gelu"}, r"activation of model\.layers\.0\.mixer is 'gelu'"),
            ("zamba2", {"n_mamba_heads": 6}, r"model\.layers\.0\.mamba has .* rows"),
            ("zamba2", {"mamba_d_state": 8}, r"contradict its config\.json"),
            ("granite", {"quantization_config": {"quant_method": "fp8"}}, "fp8.*then quantise"),
        ],
    )
    def test_configs(self, case: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
        folder = saved(tiny_hybrid(case), tmp_path / "dense")
        edit_config(folder, **changes)
        with pytest.raises(ghostssm.InputError, match=message):
            ghostssm.load(str(folder))

    @pytest.mark.parametrize("part", ["ssm_state_size", "time_step_limit", "norm.variance_epsilon"])
    def test_mixers_of_an_unknown_version(self, part: str) -> None:
        model = tiny_hybrid("bamba")
        owner, _, name = f"model.layers.2.mamba.{part}".rpartition(".")
        delattr(model.get_submodule(owner), name)
        with pytest.raises(
            ghostssm.ModelError, match=rf"has no .*{name}.*transformers 5\.23.*installed is transformers"
        ):
            ghostssm.Calibration(model, random_windows(1, 20))

    def test_configs_and_models_of_an_unknown_version(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny_hybrid("falcon_h1")
        del model.config.mamba_d_conv
        monkeypatch.delattr(type(model.config), "mamba_d_conv", raising=False)
        with pytest.raises(ghostssm.ModelError, match=r"config has no mamba_d_conv.*installed is transformers"):
            ghostssm.Calibration(model, random_windows(1, 20)).plan("ghost", 4)
        with pytest.raises(ghostssm.ModelError, match=r"FalconH1Model has no blocks at model\.layers"):
            mixers_of(model.model)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
