"""Our own class of every family: it equals the stock one where it can, and a reference where the stock one can't."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

import ghostssm
from ghostssm.models.families import mixers_of
from ghostssm.models.forward import replaced_forward
from ghostssm.models.mixer import Mixer, Projection, mixer_forward
from ghostssm.models.own_class.classes import OWN_CLASSES, GhostMixer
from ghostssm.plan.decision import Decision, Selection
from ghostssm.plan.plan import Plan
from tests.conftest import random_windows
from tests.families.test_pruned_models import logits_of, saved
from tests.families.test_stock_models import padding, tokens
from tests.families.tiny import CASES, float64_throughout, stepwise, tiny_hybrid
from tests.programs import in_process

cases = pytest.mark.parametrize("case", CASES)
PIECES = [[20], [15, 1, 1, 1, 2], [1, 1, 18]]
UNLIMITED = {"Zamba2": {"time_step_min": 1e-9}, "NemotronH": {"time_step_min": 1e-9}}
"""transformers' step knows no limits of dt, as its scan does, so that pieces would differ from the whole."""


def plan_with(model: PreTrainedModel, decide: Callable[[int, Mixer], Decision]) -> Plan:
    mixers = mixers_of(model)
    decisions = {mixer.name: decide(place, mixer) for place, mixer in enumerate(mixers)}
    layout = mixers[0].layout
    sizes = (layout.n_groups, layout.state_size)
    return Plan("balanced", model.config.model_type, *sizes, decisions, per_layer=True)


def projections(place: int, mixer: Mixer) -> Decision:
    """Random maps to a size of its own."""
    layout, draw = mixer.layout, torch.Generator().manual_seed(place)
    shape = (layout.n_groups, layout.state_size, 5 + place)
    return Decision(Selection.whole(layout), Projection(*(0.3 * torch.randn(shape, generator=draw) for _ in "BC")))


def sizes_per_layer(place: int, mixer: Mixer) -> Decision:
    kept = tuple(range(place, place + 4 + place % 3))
    return Decision(Selection((kept,) * mixer.layout.n_groups))


@cases
def test_whole_sizes_are_the_stock_model(case: str) -> None:
    stock = tiny_hybrid(case)
    own = ghostssm.apply_plan(stock, plan_with(stock, lambda place, mixer: identity(mixer)))
    assert type(own) is OWN_CLASSES[stock.config.model_type]
    ids = tokens(2, 20)
    for pieces in PIECES:
        torch.testing.assert_close(stepwise(own, ids, pieces), stepwise(stock, ids, pieces), rtol=1e-5, atol=1e-5)


def identity(mixer: Mixer) -> Decision:
    eye = torch.eye(mixer.layout.state_size).repeat(mixer.layout.n_groups, 1, 1)
    return Decision(Selection.whole(mixer.layout), Projection(eye, eye))


@cases
@pytest.mark.parametrize("decide", [projections, sizes_per_layer])
def test_pieces_masks_and_files(case: str, decide: Callable[..., Decision], tmp_path: Path) -> None:
    """Through caches and files the model computes what our ops compute of whole sequences, in float64."""
    limits = UNLIMITED.get(CASES[case][0], {"time_step_limit": (0.0, float("inf"))})
    checkpoint = ghostssm.load(str(saved(tiny_hybrid(case, **limits), tmp_path / "dense")))
    plan = plan_with(checkpoint.model, decide)
    own = ghostssm.apply_plan(checkpoint.model, plan)
    folder = ghostssm.save(replace(checkpoint, model=own), plan, tmp_path / "own")
    assert ghostssm.verify(folder).passed
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(loaded) is type(own)
    ids, mask = tokens(2, 20), padding(0, 6, length=20)
    assert torch.equal(logits_of(loaded, ids), logits_of(own, ids))
    assert tuple(ghostssm.describe(str(folder)).state_sizes) == plan.state_sizes

    loaded.double().config._experts_implementation = "eager"
    with float64_throughout(), torch.inference_mode():
        with replaced_forward(mixers_of(loaded), lambda mixer, hidden_states, **_: mixer_forward(mixer, hidden_states)):
            expected = logits_of(loaded, ids)
            alone = logits_of(loaded, ids[1:, 6:])
        for pieces in PIECES:
            torch.testing.assert_close(stepwise(loaded, ids, pieces), expected, rtol=0, atol=1e-10)
        padded = stepwise(loaded, ids, [17, 1, 1, 1], mask)[1:, 6:]
        if loaded.config.model_type == "ghost_mamba2":  # elsewhere attention's positions differ
            torch.testing.assert_close(padded, alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", ["zamba2", "granite"])
def test_a_head_of_its_own_values_stays(case: str, tmp_path: Path) -> None:
    """Of a config that ties heads; Zamba2's also ties its shared blocks."""
    stock = tiny_hybrid(case)
    file = saved(stock, tmp_path / "dense") / "model.safetensors"
    head = torch.randn_like(stock.get_output_embeddings().weight)
    save_file(load_file(file) | {"lm_head.weight": head}, file, {"format": "pt"})
    checkpoint = ghostssm.load(str(tmp_path / "dense"))
    plan = plan_with(checkpoint.model, projections)
    own = ghostssm.apply_plan(checkpoint.model, plan)
    assert torch.equal(own.get_output_embeddings().weight, head)
    folder = ghostssm.save(replace(checkpoint, model=own), plan, tmp_path / "own")
    assert torch.equal(logits_of(ghostssm.load(str(folder)).model, tokens(1, 9)), logits_of(own, tokens(1, 9)))


@cases
def test_calibrated_generated_and_accelerated(case: str) -> None:
    stock, windows = tiny_hybrid(case), random_windows(6, 24)
    plan = ghostssm.Calibration(stock, windows).plan("balanced+per-layer", 6, multiple=2)
    own, ids = ghostssm.apply_plan(stock, plan), tokens(2, 12)
    options: dict[str, Any] = {"max_new_tokens": 6, "num_beams": 2, "do_sample": False}
    expected = own.generate(ids, **options)
    ghostssm.accelerate(own)
    assert torch.equal(own.generate(ids, **options), expected)


@cases
def test_gradients_with_and_without_checkpointing(case: str) -> None:
    stock = tiny_hybrid(case)
    own = ghostssm.apply_plan(stock, plan_with(stock, projections)).train()
    ids = tokens(2, 9)

    def gradients() -> list[Tensor]:
        own.zero_grad()
        own(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        mixers = [module for module in own.modules() if isinstance(module, GhostMixer)]
        assert mixers[0].B_projection.grad is not None
        return [parameter.grad.clone() for parameter in own.parameters() if parameter.grad is not None]

    plain = gradients()
    own.activation_checkpointing_enable({"use_reentrant": False})
    for again, before in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(again, before)


@cases
def test_new_models_have_random_weights_and_first_channels(case: str) -> None:
    stock = tiny_hybrid(case)
    config = ghostssm.apply_plan(stock, plan_with(stock, projections)).config
    for model in (AutoModelForCausalLM.from_config(config), AutoModel.from_config(config)):
        mixer = next(module for module in model.modules() if isinstance(module, GhostMixer))
        assert torch.equal(mixer.B_projection[0], torch.eye(16, 5))
        assert torch.isfinite(model(input_ids=tokens(1, 5))[0]).all()


def test_files_load_without_ghostssm(tmp_path: Path) -> None:
    """Only transformers, which runs the code in the folder."""
    for case in CASES:
        own = ghostssm.apply_plan(stock := tiny_hybrid(case), plan_with(stock, projections))
        own.save_pretrained(tmp_path / case)
        torch.save(logits_of(own, tokens(1, 7)), tmp_path / case / "logits.pt")
    code = f"""
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
sys.modules["ghostssm"] = None
for folder in map(Path, {[str(tmp_path / case) for case in CASES]}):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor({tokens(1, 7).tolist()}), use_cache=False).logits
    torch.testing.assert_close(logits, torch.load(folder / "logits.pt"))
"""
    done = in_process(code, environment={"HF_HOME": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path / "modules")})
    assert done.returncode == 0, done.stderr


def test_a_mixer_without_a_state_size_is_refused() -> None:
    stock = tiny_hybrid("bamba")
    config = ghostssm.apply_plan(stock, plan_with(stock, sizes_per_layer)).config
    assert config.state_sizes[1] == 0  # attention
    config.state_sizes[0] = 0
    with pytest.raises(ValueError, match=r"state_sizes\[0\] is 0, but layer 0 has a Mamba-2 mixer"):
        AutoModelForCausalLM.from_config(config)
    assert AutoConfig.for_model("ghost_bamba").state_sizes is None
