"""Every family's mixers and blocks as this project runs them, against transformers' own forward pass."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from ghostssm import accelerate, restore
from ghostssm.calibration.gradients import gate_saliency
from ghostssm.calibration.walk import LayerWalk
from ghostssm.models.families import family_of, mixers_of
from ghostssm.models.forward import fast_forward
from ghostssm.models.mixer import mixer_forward
from ghostssm.ops import compiled
from ghostssm.recovery.refit import RefitData, refit
from tests.conftest import VOCABULARY, random_windows
from tests.families.tiny import CASES, float64_throughout, stepwise, tiny_hybrid

cases = pytest.mark.parametrize("case", CASES)


def tokens(*shape: int) -> Tensor:
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(3))


def padding(*lengths: int, length: int) -> Tensor:
    """(b, length): zeros on the left, as many as are named."""
    return torch.stack([(torch.arange(length) >= count).long() for count in lengths])


@cases
def test_mixers_are_those_of_transformers_in_float64(case: str) -> None:
    model = tiny_hybrid(case).double().requires_grad_(False)
    hidden = torch.randn(2, 37, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = padding(0, 9, length=37)
    for mixer in mixers_of(model):
        with float64_throughout():
            expected = mixer.module(hidden)
            expected_padded = mixer.module(hidden, attention_mask=mask)
        torch.testing.assert_close(mixer_forward(mixer, hidden), expected, rtol=0, atol=1e-11)
        padded = fast_forward(mixer, hidden, attention_mask=mask)
        torch.testing.assert_close(padded, expected_padded, rtol=0, atol=1e-11)
        assert (padded - expected)[0].abs().max() < 1e-11 < (padded - expected)[1].abs().max()


def test_limits_multipliers_and_norms_of_the_cases_matter() -> None:
    """So that the test above can fail: each of these terms is there and is not trivial."""
    mixers = {case: mixers_of(tiny_hybrid(case))[0] for case in CASES}
    assert mixers["nemotron_h"].dt_limit == mixers["zamba2"].dt_limit == (0.2, float("inf"))
    assert mixers["bamba"].dt_limit == mixers["codestral-mamba"].dt_limit == (0.05, 0.4)
    assert mixers["falcon_h1"].norm is None
    assert [mixers[f"falcon_h1-{name}"].norm.gate_first for name in ("norm", "norm-first")] == [True, False]
    assert mixers["falcon_h1"].input_multiplier == 1.25
    assert sorted(mixers["falcon_h1"].row_multipliers.unique().tolist()) == pytest.approx([0.7, 0.8, 0.9, 1.1, 1.3])
    assert all(mixer.norm is None or mixer.norm.weight.std() > 0.1 for mixer in mixers.values())
    assert {mixer.layout.n_groups for mixer in mixers.values()} == {1, 2, 4, 8}


def last_hidden_states(model: Any, ids: Tensor) -> Tensor:
    """What reaches the norm after the last block."""
    seen: list[Tensor] = []
    backbone = model.base_model
    names = ("norm_f", "final_layernorm", "norm")
    norm = next(getattr(backbone, name) for name in names if hasattr(backbone, name))
    handle = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.inference_mode():
        model(input_ids=ids, use_cache=False)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", [case for case in CASES if case != "codestral-mamba"])
def test_an_unpruned_walk_ends_where_the_model_ends(case: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_hybrid(case, attn_implementation=attention).double()
    monkeypatch.setattr("ghostssm.text.windows._TOKENS_PER_BATCH", 80)
    windows = random_windows(5, 40)  # two windows in a batch, one left over
    with float64_throughout():
        expected = last_hidden_states(model, windows.ids)
        walk = LayerWalk(model, windows)
        for block in walk.blocks():
            if block.mixer is not None:
                for streams in block.streams():
                    assert streams.x.dtype == torch.float64
            block.advance()
    error = (walk.hidden - expected).abs().max() / expected.abs().max()
    assert error < 1e-10


@cases
def test_the_walk_keeps_little_and_leaves_the_model_alone(case: str) -> None:
    model, windows = tiny_hybrid(case), random_windows(40, 200)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    identities = {name: id(value) for name, value in model.named_parameters(remove_duplicate=False)}
    walk = LayerWalk(model, windows)
    captured = {
        tensor.data_ptr(): tensor.nbytes
        for calls in walk._calls
        for call in calls
        for tensor in _tensors((call.args, call.kwargs))
    }
    once = walk.hidden.nbytes  # Zamba2's blocks also get the embeddings
    assert sum(captured.values()) <= (1.1 * once if case.startswith("zamba2") else 0.1 * once)
    for block in walk.blocks():
        block.advance()
    assert {name: id(value) for name, value in model.named_parameters(remove_duplicate=False)} == identities
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all("forward" not in block.__dict__ for block in family_of(model.config).blocks(model))


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    torch.utils._pytree.tree_map_only(Tensor, found.append, value)
    return found


@cases
@pytest.mark.parametrize("backend", ["compiled", "torch"])
def test_the_accelerated_model_through_its_cache(case: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "torch":
        monkeypatch.setattr(compiled, "kernels", None)
    elif not compiled.HAS_KERNELS:
        pytest.skip("numba is not installed")
    model, ids, mask = tiny_hybrid(case), tokens(3, 20), padding(0, 5, 11, length=20)
    run = partial(stepwise, model, ids)
    with torch.inference_mode():
        stock = [run([20]), run([12, 1, 1, 5, 1]), run([17, 1, 1, 1], mask)]
        accelerate(model)
        model.double().float()  # buffers are other tensors then
        own = [run([20]), run([12, 1, 1, 5, 1]), run([17, 1, 1, 1], mask)]
        restore(model)
        assert torch.equal(run([20]), stock[0])
    for found, expected in zip(own, stock, strict=True):
        real = mask.bool() if found is own[2] else torch.ones_like(mask, dtype=torch.bool)
        assert (found - expected)[real].abs().max() < 1e-4 * expected[real].abs().max()
    assert not torch.allclose(stock[1], stock[2], atol=1e-2)


@cases
def test_a_narrow_state_in_a_padded_batch(case: str) -> None:
    model, ids, mask = tiny_hybrid(case), tokens(2, 16), padding(0, 6, length=16)
    found = {}
    with torch.inference_mode():
        for dtype in ("float32", "int8"):
            accelerate(model, state_dtype=dtype)
            found[dtype] = stepwise(model, ids, [13, 1, 1, 1], mask)[mask.bool()]
    error = (found["int8"] - found["float32"]).abs().max() / found["float32"].abs().max()
    assert 0 < error < 0.3


@pytest.mark.parametrize(
    ("case", "options"),
    [*((case, {}) for case in CASES), *((case, {"num_beams": 3}) for case in ("zamba2", "falcon_h1"))],
)
def test_the_accelerated_model_generates_the_same(case: str, options: dict[str, Any]) -> None:
    model, ids = tiny_hybrid(case), tokens(2, 9)
    arguments = {"attention_mask": padding(0, 4, length=9), "max_new_tokens": 12, "do_sample": False} | options
    expected = model.generate(ids, **arguments)
    accelerate(model)
    assert torch.equal(model.generate(ids, **arguments), expected)


@cases
def test_half_precision_loses_no_more_than_in_the_stock_model(case: str) -> None:
    model, ids = tiny_hybrid(case).to(torch.bfloat16), tokens(4, 30)
    pieces = [20] + [1] * 10
    with torch.inference_mode():
        exact = stepwise(copy.deepcopy(model).float(), ids, pieces)
        stock_error = (stepwise(model, ids, pieces) - exact).square().mean().sqrt()
        accelerate(model)
        own_error = (stepwise(model, ids, pieces) - exact).square().mean().sqrt()
    assert own_error < 1.15 * stock_error


@pytest.mark.parametrize("case", ["falcon_h1", "falcon_h1-norm", "falcon_h1-norm-first", "zamba2", "nemotron_h"])
def test_refit_runs_the_same_mixer(case: str) -> None:
    """A mixer whose output is right has nothing to gain; a disturbed one has."""
    mixer = mixers_of(tiny_hybrid(case))[0]
    hidden = torch.randn(9, 48, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        target = mixer_forward(mixer, hidden)
    assert refit(mixer, RefitData.of(mixer, hidden, target), steps=20) == 1
    with torch.no_grad():
        rows = slice(mixer.layout.in_proj_B.start, mixer.layout.in_proj_C.stop)
        mixer.in_proj.weight[rows] += 0.1 * torch.randn(mixer.in_proj.weight[rows].shape)
    assert refit(mixer, RefitData.of(mixer, hidden, target), steps=40) < 0.97


@pytest.mark.parametrize("case", ["falcon_h1", "granite", "nemotron_h", "zamba2"])
def test_gate_gradients_are_slopes_of_the_loss(case: str) -> None:
    """Against a finite difference in the gate of one channel of the last mixer, in float64."""
    model, windows = tiny_hybrid(case), random_windows(1, 24)
    saliency = gate_saliency(model, windows.ids)
    model = model.double()
    name = mixers_of(model)[-1].name
    mixer: Any = model.get_submodule(name)
    group, channel, step = mixer.n_groups - 1, 3, 1e-5
    losses = []
    for sign in (1, -1):
        gate = torch.ones(mixer.n_groups, mixer.ssm_state_size, dtype=torch.float64)
        gate[group, channel] += sign * step

        def gated(hidden_states: Tensor, gate: Tensor = gate, **_: Any) -> Tensor:
            return mixer_forward(mixers_of(model)[-1], hidden_states, gate)

        mixer.forward = gated
        with torch.no_grad(), float64_throughout():
            logits = model(input_ids=windows.ids, use_cache=False).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, windows.ids[0, 1:]))
    slope = (losses[0] - losses[1]) / (2 * step)
    assert saliency[name][group, channel].item() == pytest.approx(slope.item() ** 2, rel=5e-3)
