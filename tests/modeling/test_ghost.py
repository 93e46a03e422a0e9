"""The projected model against the stock one, against a brute force, and through saving, caches and generation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Mamba2Config, Mamba2ForCausalLM

import ghostssm
from ghostssm.errors import ModelError
from ghostssm.models.layout import SSDLayout
from ghostssm.models.own_class.configuration_ghost import GhostMamba2Config
from ghostssm.models.own_class.modeling_ghost import GhostMamba2ForCausalLM, GhostMamba2Model
from tests.conftest import VOCABULARY, draw_weights, tiny_model
from tests.programs import in_process

LAYERS = 3
GROUPS: list[dict[str, Any]] = [{}, {"n_groups": 2, "use_bias": True}, {"n_groups": 4, "use_conv_bias": False}]
MIXED: dict[str, Any] = {
    "n_groups": 2,
    "state_sizes": [16, 5, 9],
    "projected_state_sizes": [3, 0, 9],
}
SHAPES: list[dict[str, Any]] = [
    {"projected_state_sizes": [4] * LAYERS},
    MIXED,
]
PIECES = [[23], [12, 1, 1, 4, 1, 4], [1, 1, 21], [2, 20, 1]]

Projections = list[tuple[Tensor, Tensor]]


def tokens(*shape: int, seed: int = 3) -> Tensor:
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def config_of(stock: Mamba2Config, **fields: Any) -> GhostMamba2Config:
    values = {name: value for name, value in stock.to_dict().items() if name not in ("model_type", "architectures")}
    return GhostMamba2Config(**values | fields)


def ghost_of(stock: Mamba2ForCausalLM, projections: Projections, **fields: Any) -> GhostMamba2ForCausalLM:
    """The stock model with B and C projected by one pair of matrices per layer."""
    sizes = [B.shape[-1] for B, _ in projections]
    model = GhostMamba2ForCausalLM(config_of(stock.config, projected_state_sizes=sizes, **fields))
    weights = dict(stock.state_dict())
    for layer, (B, C) in enumerate(projections):
        weights[f"backbone.layers.{layer}.mixer.B_projection"] = B
        weights[f"backbone.layers.{layer}.mixer.C_projection"] = C
    model.load_state_dict(weights)
    return model.eval()


def tiny_ghost(seed: int = 0, **fields: Any) -> GhostMamba2ForCausalLM:
    """A model with random weights, every one of them drawn, the projections too."""
    model = GhostMamba2ForCausalLM(config_of(tiny_model().config, **fields))
    torch.manual_seed(seed)
    draw_weights(model)
    for name, parameter in model.named_parameters():
        if name.endswith(("B_projection", "C_projection")):
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def through_cache(model: Any, ids: Tensor, pieces: list[int]) -> Tensor:
    """Logits when the ids arrive in pieces, through one cache."""
    logits, cache, start = [], None, 0
    with torch.inference_mode():
        for piece in pieces:
            output = model(input_ids=ids[:, start : start + piece], cache_params=cache, use_cache=True)
            logits.append(output.logits)
            cache, start = output.cache_params, start + piece
    return torch.cat(logits, dim=1)


def assert_same(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("shape", GROUPS)
def test_identity_projections_change_nothing(shape: dict[str, Any], pieces: list[int]) -> None:
    stock, ids = tiny_model(**shape), tokens(2, 23)
    identity = torch.eye(16).repeat(stock.config.n_groups, 1, 1)
    model = ghost_of(stock, [(identity, identity)] * LAYERS)
    assert_same(through_cache(model, ids, pieces), through_cache(stock, ids, pieces))


def test_without_new_fields_it_is_the_stock_model() -> None:
    stock, ids = tiny_model(n_groups=2), tokens(2, 23)
    model = GhostMamba2ForCausalLM(config_of(stock.config)).eval()
    model.load_state_dict(stock.state_dict())
    for pieces in PIECES:
        assert torch.equal(through_cache(model, ids, pieces), through_cache(stock, ids, pieces))


@pytest.mark.parametrize("pieces", PIECES)
def test_one_hot_projections_select_channels(pieces: list[int]) -> None:
    stock, ids = tiny_model(n_groups=2, use_bias=True), tokens(2, 23)
    kept = [[3, 0, 11, 7], [15, 2, 5, 8]]
    one_hot = torch.stack([F.one_hot(torch.tensor(channels), 16).float().T for channels in kept])
    model = ghost_of(stock, [(one_hot, one_hot)] * LAYERS)

    sliced = Mamba2ForCausalLM(Mamba2Config(**stock.config.to_dict() | {"state_size": 4})).eval()
    layout = SSDLayout(32, 8, 8, 2, 16, 4)
    weights = dict(stock.state_dict())
    for name, weight in weights.items():
        if ".in_proj." in name:
            weights[name] = weight[layout.in_proj_index(kept)]
        elif ".conv1d." in name:
            weights[name] = weight[layout.conv_index(kept)]
    sliced.load_state_dict(weights)
    assert_same(through_cache(model, ids, pieces), through_cache(sliced, ids, pieces))


def brute_force(mixer: Any, hidden: Tensor) -> Tensor:
    """The mixer in float64, token by token and head by head, with nothing of transformers in it."""
    h, p, g, n = mixer.num_heads, mixer.head_dim, mixer.n_groups, mixer.ssm_state_size
    w = {name: value.double() for name, value in mixer.state_dict().items()}
    z, xBC, dt = (hidden.double() @ w["in_proj.weight"].T).split([h * p, h * p + 2 * g * n, h], dim=-1)
    b, length, channels = xBC.shape
    kernel = w["conv1d.weight"].shape[-1]
    padded = torch.cat([xBC.new_zeros(b, kernel - 1, channels), xBC], dim=1)
    taps = (padded[:, k : k + length] * w["conv1d.weight"][:, 0, k] for k in range(kernel))
    xBC = F.silu(torch.stack(list(taps)).sum(0) + w["conv1d.bias"])
    x, B, C = xBC.split([h * p, g * n, g * n], dim=-1)
    dt = F.softplus(dt + w["dt_bias"])
    y = torch.zeros(b, length, h, p, dtype=torch.float64)
    for head in range(h):
        group = head // (h // g)
        span, channel = slice(group * n, (group + 1) * n), slice(head * p, (head + 1) * p)
        state = torch.zeros(b, p, w["B_projection"].shape[-1], dtype=torch.float64)
        for t in range(length):
            small_B, small_C = B[:, t, span] @ w["B_projection"][group], C[:, t, span] @ w["C_projection"][group]
            decay = torch.exp(-w["A_log"][head].exp() * dt[:, t, head])
            u = dt[:, t, head, None] * x[:, t, channel]
            state = decay[:, None, None] * state + u[:, :, None] * small_B[:, None, :]
            y[:, t, head] = (state * small_C[:, None, :]).sum(-1) + w["D"][head] * x[:, t, channel]
    gated = y.flatten(-2) * F.silu(z)
    by_group = gated.unflatten(-1, (g, -1))
    normed = by_group * torch.rsqrt(by_group.square().mean(-1, keepdim=True) + mixer.norm.variance_epsilon)
    return (normed.flatten(-2) * w["norm.weight"]) @ w["out_proj.weight"].T


def test_chunks_and_steps_against_brute_force() -> None:
    fields = {"state_sizes": [16, 7, 9], "projected_state_sizes": [3, 7, 1]}
    model = tiny_ghost(n_groups=2, **fields)
    hidden = torch.randn(2, 37, 32, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        for layer, block in enumerate(model.backbone.layers):
            expected = brute_force(block.mixer, hidden)
            assert_same(block.mixer(hidden).double(), expected)
            cache = model(input_ids=tokens(2, 1), use_cache=True).cache_params
            cache.reset()
            pieces = hidden.split([30, 1, 1, 4, 1], dim=1)
            stepwise = torch.cat([block.mixer(piece, cache_params=cache) for piece in pieces], dim=1)
            assert_same(stepwise.double(), expected)
            r = fields["projected_state_sizes"][layer]
            assert cache.get_recurrent_state(layer).shape == (2, 8, 8, r)


def test_a_fresh_model_keeps_the_first_channels() -> None:
    model = GhostMamba2ForCausalLM(config_of(tiny_model().config, **MIXED))
    mixers = [block.mixer for block in model.backbone.layers]
    assert torch.equal(mixers[0].B_projection, torch.eye(16, 3).expand(2, -1, -1))
    assert torch.equal(mixers[2].C_projection, torch.eye(9).expand(2, -1, -1))
    assert mixers[1].B_projection is None
    assert [mixer.in_proj.out_features for mixer in mixers] == [64 + 64 + 8 + 4 * n for n in (16, 5, 9)]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_cache_holds_the_small_state(shape: dict[str, Any]) -> None:
    model = tiny_ghost(**shape)
    cache = model(input_ids=tokens(2, 5), use_cache=True).cache_params
    for layer in range(LAYERS):
        r = model.config.recurrent_state_size_of(layer)
        assert cache.get_recurrent_state(layer).shape == (2, 8, 8, r)
        assert cache.get_conv_state(layer).shape == (2, model.backbone.layers[layer].mixer.conv_dim, 4)


@pytest.mark.parametrize("pieces", PIECES[1:])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_through_a_cache(shape: dict[str, Any], pieces: list[int]) -> None:
    model, ids = tiny_ghost(**shape), tokens(2, 23)
    assert_same(through_cache(model, ids, pieces), through_cache(model, ids, [23]))


@pytest.mark.parametrize("shape", SHAPES)
def test_generate_with_a_cache_and_without(shape: dict[str, Any]) -> None:
    model, ids = tiny_ghost(**shape), tokens(2, 9)
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 10, "do_sample": False}
    assert torch.equal(model.generate(ids, **arguments), model.generate(ids, use_cache=False, **arguments))


@pytest.mark.parametrize("shape", SHAPES)
def test_left_padding(shape: dict[str, Any]) -> None:
    model, ids = tiny_ghost(**shape), tokens(1, 12)
    padded = torch.cat([tokens(1, 7, seed=9), ids], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :7] = 0
    with torch.inference_mode():
        assert_same(model(padded, attention_mask=mask).logits[:, 7:], model(ids).logits)
        output = model(padded, attention_mask=mask, use_cache=True)
        following = model(tokens(1, 1, seed=11), cache_params=output.cache_params, use_cache=True).logits
        expected = model(torch.cat([ids, tokens(1, 1, seed=11)], dim=1)).logits[:, -1:]
    assert_same(following, expected)
    arguments = {"max_new_tokens": 8, "do_sample": False}
    together = model.generate(padded, attention_mask=mask, **arguments)
    assert torch.equal(together[:, 19:], model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)[:, 12:])


@pytest.mark.parametrize("beams", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beam_search(beams: dict[str, int]) -> None:
    stock, ids = tiny_model(n_groups=2), tokens(2, 9)
    identity = torch.eye(16).repeat(2, 1, 1)
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False} | beams
    expected = stock.generate(ids, **arguments)
    assert torch.equal(ghost_of(stock, [(identity, identity)] * LAYERS).generate(ids, **arguments), expected)
    mixed = tiny_ghost(**MIXED)
    cached = mixed.generate(ids, **arguments)
    assert torch.equal(cached, mixed.generate(ids, use_cache=False, **arguments))


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_checkpointing(shape: dict[str, Any]) -> None:
    model, ids = tiny_ghost(**shape).train(), tokens(2, 20)
    model(input_ids=ids, labels=ids).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    assert any("B_projection" in name for name in expected)
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    model.zero_grad()
    model.activation_checkpointing_enable()
    calls: list[int] = []
    model.backbone.layers[0].mixer.in_proj.register_forward_hook(lambda *_: calls.append(1))
    model(input_ids=ids, labels=ids).loss.backward()
    assert len(calls) == 2  # the second time in the backward pass
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_hidden_states_and_base_model() -> None:
    model, ids = tiny_ghost(**MIXED), tokens(2, 6)
    with torch.inference_mode():
        output = model(ids, output_hidden_states=True)
        assert len(output.hidden_states) == LAYERS + 1
        assert torch.equal(model.backbone(ids).last_hidden_state, output.hidden_states[-1])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_save_and_load(shape: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    model, ids = tiny_ghost(tie_word_embeddings=tied, **shape), tokens(2, 12)
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        expected = model(ids).logits
        for trusted in ({}, {"trust_remote_code": True}):
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **trusted)
            assert type(loaded) is GhostMamba2ForCausalLM
            assert torch.equal(loaded(ids).logits, expected)
        assert torch.equal(AutoModel.from_pretrained(tmp_path)(ids)[0], model.backbone(ids)[0])
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is GhostMamba2Config
    for name in ("state_sizes", "projected_state_sizes"):
        assert getattr(config, name) == getattr(model.config, name)
    assert isinstance(AutoModelForCausalLM.from_config(config), GhostMamba2ForCausalLM)


def test_missing_projections_are_initialised() -> None:
    """A stock checkpoint under a projecting config starts as the truncation to the first channels."""
    stock = tiny_model()
    model, info = GhostMamba2ForCausalLM.from_pretrained(
        None,
        config=config_of(stock.config, projected_state_sizes=[4] * LAYERS),
        state_dict=dict(stock.state_dict()),
        output_loading_info=True,
    )
    assert {name.rsplit(".", 1)[1] for name in info["missing_keys"]} == {"B_projection", "C_projection"}
    truncated = torch.eye(16, 4)[None]
    expected = ghost_of(stock, [(truncated, truncated)] * LAYERS)
    assert_same(through_cache(model.eval(), tokens(1, 9), [9]), through_cache(expected, tokens(1, 9), [9]))


def test_bfloat16(tmp_path: Path) -> None:
    """A projected model loses no more than the stock one does."""
    stock, ids = tiny_model(n_groups=2).bfloat16(), tokens(2, 20)
    identity = torch.eye(16).repeat(2, 1, 1)
    ghost_of(stock.float(), [(identity, identity)] * LAYERS).save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    expected = through_cache(stock, ids, [20])
    stock.bfloat16()
    for pieces in ([20], [10] + [1] * 10):
        own, stocks = ((through_cache(model, ids, pieces) - expected).square().mean() for model in (half, stock))
        assert own < 1.1**2 * stocks


REMOTE = """
import sys
sys.modules["ghostssm"] = None  # an import of it now fails
import torch
from transformers import AutoModel, AutoModelForCausalLM
folder, ids, logits, resaved = sys.argv[1], *(torch.load(path) for path in sys.argv[2:4]), sys.argv[4]
for _ in range(2):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, logits)
        backbone = AutoModel.from_pretrained(folder, trust_remote_code=True)
        torch.testing.assert_close(backbone(ids)[0], model.backbone(ids)[0])
    assert model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False).shape[1] == 15
    model.save_pretrained(resaved)
    folder = resaved
"""


@pytest.mark.slow
def test_a_saved_folder_needs_no_ghostssm(tmp_path: Path) -> None:
    model, ids = tiny_ghost(eos_token_id=None, **MIXED), tokens(2, 12)
    model.save_pretrained(tmp_path / "model")
    torch.save(ids, tmp_path / "ids.pt")
    with torch.inference_mode():
        torch.save(model(ids).logits.clone(), tmp_path / "logits.pt")
    paths = [str(tmp_path / name) for name in ("model", "ids.pt", "logits.pt", "resaved")]
    cache = {"HF_HOME": str(tmp_path / "cache"), "HF_MODULES_CACHE": str(tmp_path / "cache" / "modules")}
    done = in_process(REMOTE, *paths, environment=cache | {"HF_HUB_OFFLINE": "1"}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (tmp_path / "resaved").iterdir()}
    assert {"configuration_ghost.py", "modeling_ghost.py", "config.json"} <= names


@pytest.mark.parametrize(
    "imports",
    [
        "import ghostssm; assert 'transformers' not in sys.modules; from transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM; AutoModelForCausalLM.register; import ghostssm",
    ],
)
def test_importing_ghostssm_is_enough_for_the_auto_classes(imports: str, tmp_path: Path) -> None:
    tiny_ghost(**MIXED).save_pretrained(tmp_path)
    load = f"import sys; {imports}; model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}); print(type(model))"
    done = in_process(load)
    assert "ghostssm.models.own_class" in done.stdout, done.stderr


def test_weights_may_be_offloaded() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, ids = tiny_ghost(**MIXED), tokens(1, 6)
    expected = through_cache(model, ids, [4, 1, 1])
    accelerate.cpu_offload(model, execution_device="cpu")
    assert model.backbone.layers[0].mixer.B_projection.device.type == "meta"
    assert_same(through_cache(model, ids, [4, 1, 1]), expected)


def test_base_class_registration() -> None:
    config = config_of(tiny_model().config, **MIXED)
    assert isinstance(AutoModel.from_config(config), GhostMamba2Model)
    assert config.auto_map["AutoModelForCausalLM"] == "modeling_ghost.GhostMamba2ForCausalLM"
    upstream = {"AutoConfig": "someone/code--configuration_ghost.GhostMamba2Config"}
    assert config_of(tiny_model().config, auto_map=upstream).auto_map["AutoConfig"] == upstream["AutoConfig"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"state_sizes": [16, 16]}, "state_sizes has 2 entries; expected num_hidden_layers = 3"),
        ({"projected_state_sizes": [4] * 4}, "projected_state_sizes has 4 entries"),
        ({"state_sizes": [16, 0, 16]}, r"state_sizes\[1\] is 0; expected at least 1"),
        ({"state_size": 0}, "state_size is 0"),
        ({"projected_state_sizes": [4, -1, 4]}, r"projected_state_sizes\[1\] is -1; expected 1 to 16"),
        ({"state_sizes": [16, 8, 16], "projected_state_sizes": [4, 9, 4]}, r"projected_state_sizes\[1\] is 9"),
        ({"state_sizes": [0, 8, 8], "projected_state_sizes": [0, 9, 0]}, r"(?s)sizes\[0\] is 0.*sizes\[1\] is 9"),
        ({"state_sizes": [16, 8.5, 16]}, "state_sizes"),
        ({"state_sizes": 16}, "state_sizes"),
        ({"projected_state_sizes": [True] * 3}, "projected_state_sizes"),
        ({"state_tiers": [[[1, 1]] * 8] * 2}, "state_tiers has 2 entries"),
        ({"state_tiers": [[[1, 1]] * 7] * 3}, r"state_tiers\[0\] is of 7 heads; expected 8"),
        ({"state_tiers": [[[9, 8]] * 8] * 3}, r"state_tiers\[0\]\[0\] is \[9, 8\]; .* at most 16 together"),
        ({"state_tiers": [[[1]] * 8] * 3}, "expected two numbers of channels"),
        ({"state_tiers": [[["1", 1]] * 8] * 3}, "state_tiers"),
        ({"n_groups": 3}, "n_groups = 3 does not divide"),
        ({"head_dim": 5}, "hidden_size"),
    ],
)
def test_bad_configs(fields: dict[str, Any], message: str) -> None:
    stock = tiny_model().config
    with pytest.raises(StrictDataclassError, match=message):
        config_of(stock, **fields)


def test_configs_of_earlier_versions(tmp_path: Path) -> None:
    """They say whether projections are per head; no more than per group is left."""
    config = config_of(tiny_model().config, projection_heads=False, **MIXED)
    assert "projection_heads" not in config.to_dict()
    with pytest.raises(ValueError, match=r"projection_heads is True: .* expected false"):
        config_of(tiny_model().config, projection_heads=True, **MIXED)
    tiny_ghost(**MIXED).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    for by_head in (False, True):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"projection_heads": by_head}))
        if by_head:
            with pytest.raises(ModelError, match="projection_heads is True"):
                ghostssm.load(str(tmp_path))
        else:
            assert isinstance(ghostssm.load(str(tmp_path)).model, GhostMamba2ForCausalLM)


def test_a_config_is_checked_again_before_saving(tmp_path: Path) -> None:
    config = config_of(tiny_model().config, **MIXED)
    config.num_hidden_layers = 2
    with pytest.raises(StrictDataclassError, match="state_sizes has 3 entries"):
        config.save_pretrained(tmp_path)
