"""The engine advisor: rules of the table, and the choice of a size, over sizes that models have and that none has."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import FalconH1Config, GraniteMoeHybridConfig, Mamba2Config, NemotronHConfig, PreTrainedConfig

from ghostssm.engines import ENGINES, advise, engine_names, good_state_sizes, nearest_state_size
from ghostssm.engines.verdicts import Verdicts
from ghostssm.errors import InputError
from ghostssm.models.families import family_of
from ghostssm.models.layout import SSDLayout

MODEL_TYPES = ("mamba2", "bamba", "zamba2", "falcon_h1", "granitemoehybrid", "nemotron_h")
layouts = st.builds(
    lambda groups, per_group, head_dim, state: SSDLayout(64, groups * per_group, head_dim, groups, state, 4),
    st.sampled_from([1, 2, 8]),
    st.sampled_from([1, 3, 4, 16]),
    st.sampled_from([8, 16, 64, 80]),
    st.sampled_from([16, 64, 100, 128, 256]),
)
engines = st.lists(st.sampled_from(engine_names()), min_size=1, max_size=3, unique=True)
# mamba2-130m, and Codestral's.
SMALL = SSDLayout(768, 24, 64, 1, 128, 4)
CODESTRAL = SSDLayout(4096, 128, 64, 8, 128, 4)


def level(layout: SSDLayout, state_size: int, engine: str, model_type: str = "mamba2") -> str:
    (advice,) = advise(layout.with_state_size(state_size), model_type, engines=[engine])
    return advice.level


@pytest.mark.parametrize(
    ("engine", "layout", "expected"),
    [
        ("transformers-cpu", SMALL, {1: "runs", 7: "runs", 64: "runs"}),
        ("transformers-cuda", SMALL, {2: "no", 4: "runs", 30: "no", 32: "runs", 48: "runs"}),
        ("transformers-cuda", CODESTRAL, {1: "runs", 7: "runs"}),
        ("mamba_ssm", SMALL, {30: "no", 96: "runs"}),
        ("vllm", SMALL, {7: "runs", 96: "runs"}),
        ("sglang", SMALL, {7: "runs", 96: "runs"}),
        ("llama.cpp-cpu", SMALL, {16: "slow", 32: "runs", 48: "slow", 96: "runs"}),
        ("llama.cpp-cuda", SMALL, {64: "slow", 96: "slow", 128: "runs"}),
        ("llama.cpp-cuda", CODESTRAL, {64: "slow", 96: "runs", 128: "runs"}),
        ("llama.cpp-vulkan", CODESTRAL, {96: "slow", 128: "runs"}),
        ("llama.cpp-opencl", SMALL, {96: "slow", 64: "runs", 1: "runs"}),
        ("llama.cpp-metal", SMALL, {12: "slow", 40: "runs"}),
        ("mlx-lm", SMALL, {48: "no", 32: "runs", 96: "runs"}),
        ("mlx-lm", CODESTRAL, {32: "no"}),
    ],
)
def test_published_sizes(engine: str, layout: SSDLayout, expected: dict[int, str]) -> None:
    assert {size: level(layout, size, engine) for size in expected} == expected


def test_heads_count_where_kernels_are_made_for_some() -> None:
    assert level(SSDLayout(64, 16, 8, 8, 128, 4), 96, "llama.cpp-cuda") == "slow"
    assert level(SSDLayout(64, 2, 32, 1, 128, 4), 32, "llama.cpp-metal") == "slow"
    assert level(SSDLayout(64, 9, 64, 1, 128, 4), 64, "transformers-cuda") == "no"


@given(layouts, engines, st.sampled_from(MODEL_TYPES), st.data())
def test_the_chosen_size_suits_every_engine_and_none_that_is_nearer_does(
    layout: SSDLayout, names: list[str], model_type: str, data: st.DataObject
) -> None:
    wanted = data.draw(st.integers(1, layout.state_size))

    def suits(size: int) -> bool:
        return all(level(layout, size, name, model_type) == "runs" for name in names)

    try:
        chosen = nearest_state_size(wanted, layout, model_type, names)
    except InputError:
        assert not any(suits(size) for size in range(1, layout.state_size))
        assert not suits(wanted)
        return
    assert suits(chosen)
    distance = abs(chosen - wanted)
    assert not any(suits(size) for size in range(1, layout.state_size) if abs(size - wanted) < distance)
    larger = wanted + distance
    assert chosen == larger or larger >= layout.state_size or not suits(larger)


@given(layouts, st.sampled_from(MODEL_TYPES), st.booleans())
def test_all_but_a_plain_yes_comes_with_a_reason(layout: SSDLayout, model_type: str, own_class: bool) -> None:
    for advice in advise(layout, model_type, own_class=own_class):
        assert advice.reason or advice.level == "runs"
        assert "{" not in advice.reason


@given(layouts, engines)
def test_good_sizes_are_below_the_models_own(layout: SSDLayout, names: list[str]) -> None:
    try:
        sizes = good_state_sizes(layout, "mamba2", names)
    except InputError:
        return
    assert list(sizes) == sorted(set(sizes))
    assert sizes[-1] < layout.state_size


def test_a_refusal_states_the_rule() -> None:
    with pytest.raises(InputError, match=r"llama\.cpp-cuda: N' is 96, 128 or 256 .* multiple of 128"):
        nearest_state_size(64, SMALL, "mamba2", ["llama.cpp-cuda"])
    with pytest.raises(InputError, match="vllm: has no class for model type 'bamba'"):
        nearest_state_size(64, SMALL, "bamba", ["vllm"])


def test_an_unknown_engine() -> None:
    with pytest.raises(InputError, match=r"'llama\.cpp'; expected one of: transformers-cpu.*llama\.cpp-cuda"):
        advise(SMALL, "mamba2", engines=["llama.cpp"])


def test_projected_states_run_in_transformers_only() -> None:
    found = {advice.engine: advice.level for advice in advise(SMALL, "ghost_mamba2", own_class=True)}
    assert found.pop("transformers-cpu") == "runs"
    assert found.pop("transformers-cuda") == "slow"
    assert set(found.values()) == {"no"}


def test_a_tied_head_matters_where_it_is_not_known() -> None:
    found = {advice.engine: advice for advice in advise(SMALL, "mamba2", tied_head=True)}
    assert {name for name, advice in found.items() if advice.level == "no"} == {"sglang"}
    assert "--untie" in found["sglang"].reason
    with pytest.raises(InputError, match="sglang: knows no tied head"):
        nearest_state_size(64, SMALL, "mamba2", ["sglang"], tied_head=True)
    assert nearest_state_size(64, SMALL, "mamba2", ["sglang"]) == 64


def test_files_in_another_dialect_are_not_read() -> None:
    for dialect, other in (("transformers", "mamba_ssm"), ("mamba_ssm", "transformers")):
        whole = advise(SMALL, "mamba2")
        for engine, found, at_best in zip(ENGINES, advise(SMALL, "mamba2", dialect=dialect), whole, strict=True):
            if engine.dialect == other:
                assert (found.level, found.export) == ("no", f"--format {other}")
                assert f"reads the {other} dialect" in found.reason
            else:
                assert found.level == at_best.level
                assert "--dialect" not in found.reason
                assert found.export == ("" if engine.dialect else "--format gguf")


def test_no_export_is_named_that_would_not_help() -> None:
    (found,) = advise(SMALL.with_state_size(30), "mamba2", engines=["mamba_ssm"], dialect="transformers")
    assert (found.level, found.export) == ("no", "")
    assert "no multiple of 8" in found.reason
    for dialect in ("transformers", "mamba_ssm"):
        (found,) = advise(SMALL, "mamba2", engines=["sglang"], dialect=dialect, tied_head=True)
        assert (found.level, found.export) == ("no", "--format transformers --untie")


@pytest.mark.parametrize(
    ("config", "refusing"),
    [
        (FalconH1Config(), set()),
        (FalconH1Config(key_multiplier=0.4), {"mlx-lm"}),
        (FalconH1Config(attention_in_multiplier=0.9), {"mlx-lm"}),
        (FalconH1Config(mamba_rms_norm=True, mamba_norm_before_gate=False), set()),
        (FalconH1Config(mamba_rms_norm=True, mamba_norm_before_gate=True), {"llama.cpp-cpu", "vllm", "sglang"}),
        (FalconH1Config(mamba_rms_norm=True, mamba_norm_before_gate=False, mamba_n_groups=2), {"mlx-lm"}),
        (FalconH1Config(mamba_proj_bias=True, projectors_bias=True), {"llama.cpp-cpu", "mlx-lm"}),
        (FalconH1Config(projectors_bias=True), {"llama.cpp-cpu", "vllm", "sglang", "mlx-lm"}),
        (FalconH1Config(mlp_bias=True), {"llama.cpp-cpu", "vllm", "sglang", "mlx-lm"}),
        (FalconH1Config(time_step_limit=(0.0, 0.1)), {"llama.cpp-cpu", "vllm", "sglang", "mlx-lm"}),
        (GraniteMoeHybridConfig(), set()),
        (GraniteMoeHybridConfig(mamba_n_groups=2), {"mlx-lm"}),
        (GraniteMoeHybridConfig(time_step_limit=[0.001, 0.1]), {"llama.cpp-cpu", "vllm", "sglang"}),
        (GraniteMoeHybridConfig(mamba_proj_bias=True), {"llama.cpp-cpu"}),
        (GraniteMoeHybridConfig(hidden_act="gelu"), {"llama.cpp-cpu"}),
        (
            GraniteMoeHybridConfig(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
            {"llama.cpp-cpu"},
        ),
        (NemotronHConfig(layers_block_type=["mamba", "moe"]), set()),
        (NemotronHConfig(layers_block_type=["mamba", "moe", "mlp"]), {"llama.cpp-cpu"}),
        (NemotronHConfig(layers_block_type=["mamba", "mlp"], mlp_hidden_act="silu"), {"llama.cpp-cpu"}),
        (Mamba2Config(n_groups=1), set()),
        (Mamba2Config(n_groups=1, layer_norm_epsilon=1e-6), {"mlx-lm"}),
        (Mamba2Config(n_groups=1, time_step_limit=[0.0, 0.1]), {"llama.cpp-cpu", "vllm", "sglang"}),
    ],
)
def test_what_an_engine_does_not_heed_in_a_config(config: PreTrainedConfig, refusing: set[str]) -> None:
    names = ["vllm", "sglang", "llama.cpp-cpu", "mlx-lm"]
    layout = family_of(config).layout(config)
    found = {advice.engine: advice for advice in advise(layout, config.model_type, engines=names, config=config)}
    assert {name for name, advice in found.items() if advice.level == "no"} == refusing
    for name in refusing:
        assert found[name].reason
        with pytest.raises(InputError, match=rf"{name}: "):
            nearest_state_size(64, layout, config.model_type, [name], config=config)


def test_verdicts_tell_a_remedy_in_the_cell_and_a_reason_once() -> None:
    names = ["mamba_ssm", "sglang", "vllm", "llama.cpp-cpu"]
    whole, cut = SMALL, SMALL.with_state_size(30)
    told = Verdicts.of(
        {
            "N": advise(whole, "mamba2", engines=names, dialect="transformers", tied_head=True),
            "N'": advise(cut, "mamba2", engines=names, dialect="transformers", tied_head=True),
        }
    )
    cells = {name: found for name, *found in told.rows}
    assert cells["mamba_ssm"] == ["after --format mamba_ssm", "no"]
    assert cells["sglang"] == ["after --untie", "after --untie"]
    assert cells["llama.cpp-cpu"] == ["runs", "slow"]
    reasons = dict(told.reasons)
    assert "no multiple of 8" in reasons["mamba_ssm (N')"]
    assert not any("tied head" in reason or "dialect" in reason for reason in reasons.values())
    assert len(reasons) == len({reason for _, reason in told.reasons})
    assert len(told.notes) == 2


def test_every_engine_has_a_source() -> None:
    assert all(engine.source and engine.version for engine in ENGINES)
    assert len(set(engine_names())) == len(ENGINES)
