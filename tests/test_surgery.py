"""Slicing: the pruned model computes what the dense model computes with the cut channels zeroed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Mamba2ForCausalLM, PreTrainedModel

from ghostssm.errors import PlanError
from ghostssm.models.families import mixers_of
from ghostssm.plan.decision import Decision, Selection
from ghostssm.plan.plan import Plan
from ghostssm.plan.surgery import apply_plan, pruned
from tests.conftest import VOCABULARY, tiny_model

SHAPES: list[dict[str, Any]] = [
    {},
    {"n_groups": 2, "use_bias": True, "use_conv_bias": False},
    {"n_groups": 4, "conv_kernel": 3, "use_bias": True},
    {"n_groups": 8, "num_heads": 16, "head_dim": 4, "time_step_limit": (0.05, 0.4)},
    {"state_size": 33, "tie_word_embeddings": False, "residual_in_fp32": True, "conv_kernel": 2},
]


def random_plan(model: PreTrainedModel, counts: list[int]) -> Plan:
    """Random channels; group g of every mixer keeps ``counts[g % len(counts)]`` of them."""
    draw = torch.Generator().manual_seed(7)
    decisions = {}
    for mixer in mixers_of(model):
        groups, n = mixer.layout.n_groups, mixer.layout.state_size
        kept = [sorted(torch.randperm(n, generator=draw)[: counts[g % len(counts)]].tolist()) for g in range(groups)]
        decisions[mixer.name] = Decision(Selection(tuple(map(tuple, kept))))
    return Plan("random", model.config.model_type, groups, n, decisions)


def zero_cut_channels(model: PreTrainedModel, plan: Plan) -> None:
    """The mask: every weight that makes a cut channel's B or C becomes zero. Written without the layout's help."""
    for name, selection in plan.selections.items():
        mixer: Any = model.get_submodule(name)
        inner, n, groups = mixer.num_heads * mixer.head_dim, mixer.ssm_state_size, mixer.n_groups
        for group in range(groups):
            for channel in set(range(n)) - set(selection.kept[group]):
                for offset in (0, groups * n):
                    row = inner + offset + group * n + channel
                    mixer.conv1d.weight.data[row] = 0
                    mixer.in_proj.weight.data[inner + row] = 0
                    for module, index in ((mixer.conv1d, row), (mixer.in_proj, inner + row)):
                        if module.bias is not None:
                            module.bias.data[index] = 0


def decoded_logits(model: Mamba2ForCausalLM, ids: Tensor, prompt: int) -> Tensor:
    """Logits of a prefill and then of one token at a time, through the cache."""
    output = model(input_ids=ids[:, :prompt], use_cache=True)
    logits = [output.logits]
    for position in range(prompt, ids.shape[1]):
        output = model(input_ids=ids[:, position : position + 1], cache_params=output.cache_params, use_cache=True)
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("counts", [[5], [3, 7], [1], [0, 4]])
@pytest.mark.parametrize("shape", SHAPES)
def test_sliced_equals_masked(shape: dict[str, Any], counts: list[int]) -> None:
    if counts == [0, 4] and shape.get("n_groups", 1) == 1:
        pytest.skip("a mixer's only group keeps at least one channel")
    model, masked = tiny_model(**shape), tiny_model(**shape)
    plan = random_plan(model, counts)
    apply_plan(model, plan)
    zero_cut_channels(masked, plan)
    ids = torch.randint(1, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert_close(model(ids).logits, masked(ids).logits)
        assert_close(decoded_logits(model, ids, 9), decoded_logits(masked, ids, 9))
    kept = max(counts[: model.config.n_groups])
    assert model.config.state_size == kept
    assert model.backbone.layers[0].mixer.conv1d.weight.shape[0] == model.backbone.layers[0].mixer.conv_dim


def test_pruned_restores_the_model() -> None:
    model = tiny_model(n_groups=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.arange(1, 20)[None]
    with torch.inference_mode():
        dense = model(ids).logits
        with pruned(model, random_plan(model, [4])):
            assert model.config.state_size == 4
            assert not torch.equal(model(ids).logits, dense)
        assert model.config.state_size == 16
        assert torch.equal(model(ids).logits, dense)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_plan_for_another_model_changes_nothing() -> None:
    model = tiny_model()
    plan = random_plan(tiny_model(n_groups=2, num_hidden_layers=2), [4])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(PlanError) as caught:
        apply_plan(model, plan)
    assert "n_groups" in str(caught.value)
    assert "2 mixers, the model has 3" in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_half_precision_weights_are_copied_bit_by_bit() -> None:
    model = tiny_model().to(torch.bfloat16)
    plan = random_plan(model, [16])
    before = model.backbone.layers[1].mixer.in_proj.weight.clone()
    apply_plan(model, plan)
    after = model.backbone.layers[1].mixer.in_proj.weight
    assert after.dtype == torch.bfloat16
    assert torch.equal(after, before)
