"""Sequences per engine against what vLLM's own planning said of the same models, state sizes and dtypes."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from engine_capacity import RECORDS, cases
from published_models import published_configs, write_configs
from transformers import FalconH1Config, GraniteMoeHybridConfig, NemotronHConfig

from ghostssm.checkpoint.description import Description, describe
from ghostssm.engines import engines_named
from ghostssm.engines.capacity import Footprint, in_sglang, in_vllm
from ghostssm.engines.rules import ENGINES
from ghostssm.ops.state_format import FORMATS, StateFormat
from tests.conftest import Run

_RECORDS: dict[str, dict[str, Any]] = {engine: json.loads(path.read_text()) for engine, path in RECORDS.items()}
_PARAMETERS = {
    **{"mamba2-130m": 0.13, "mamba2-370m": 0.37, "mamba2-780m": 0.78, "mamba2-1.3b": 1.34, "mamba2-2.7b": 2.7},
    **{"Mamba-Codestral-7B": 7.29, "Bamba-9B": 9.78, "Zamba2-1.2B": 1.215, "Zamba2-2.7B": 2.66, "Zamba2-7B": 7.36},
    **{"Nemotron-H-4B": 4.49, "Nemotron-H-8B": 8.101, "Nemotron-H-47B": 46.8, "Nemotron-H-56B": 56.3},
    **{"Nemotron-3-Nano-30B-A3B": 31.58, "Nemotron-3-Super-120B-A12B": 120.7},
    **{"Granite-4.0-H-Micro": 3.19, "Granite-4.0-H-Tiny": 6.94, "Granite-4.0-H-Small": 32.2},
    **{"Falcon-H1-0.5B": 0.521, "Falcon-H1-1.5B": 1.555, "Falcon-H1-1.5B-Deep": 1.555, "Falcon-H1-3B": 3.15},
    **{"Falcon-H1-7B": 7.59, "Falcon-H1-34B": 33.6},
}
"""Billions, as published."""


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    write_configs(folder)
    return folder


@cache
def described(path: Path) -> Description:
    return describe(str(path))


def test_the_published_models_have_their_sizes(published: Path) -> None:
    assert published_configs().keys() == _PARAMETERS.keys()
    for name, billions in _PARAMETERS.items():
        assert described(published / name).parameters / 1e9 == pytest.approx(billions, rel=0.01), name


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Nemotron-3-Nano-30B-A3B", 3.6),
        ("Nemotron-3-Super-120B-A12B", 12.7),
        ("Granite-4.0-H-Tiny", 1.47),
        ("Granite-4.0-H-Small", 8.8),
        ("Granite-4.0-H-Micro", 3.19),
    ],
)
def test_the_published_models_use_few_of_their_experts(published: Path, name: str, billions: float) -> None:
    """Their makers say 3.2 (without embeddings), 12, 1 and 9 billion; Micro has no experts to choose from."""
    assert described(published / name).active_parameters / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize(("engine", "version"), [("vllm", "0.33.0"), ("sglang", "0.5.23")])
def test_every_case_is_recorded(engine: str, version: str) -> None:
    assert _RECORDS[engine][engine] == version
    plans = zip(_RECORDS[engine]["plans"], cases(engine), strict=True)
    assert all(case.items() <= plan.items() for plan, case in plans)


def test_vllm_plans_the_same(published: Path) -> None:
    for plan in _RECORDS["vllm"]["plans"]:
        footprint = planned_footprint(published, plan)
        memory = footprint.weights + _RECORDS["vllm"]["memory"]
        found = in_vllm(footprint, memory, prefix_caching=plan["prefix_caching"])
        assert (found.block_tokens, found.page, found.tokens) == (plan["block_tokens"], plan["page"], plan["tokens"])
        assert found.sequences == pytest.approx(plan["sequences"], rel=1e-12)


def test_sglang_plans_the_same(published: Path) -> None:
    for plan in _RECORDS["sglang"]["plans"]:
        footprint = planned_footprint(published, plan)
        tokens = plan["rest"] // footprint.token
        expected = min(plan["states"] // plan["ratio"], tokens / footprint.context)
        found = in_sglang(footprint, footprint.weights + _RECORDS["sglang"]["memory"])
        assert found.sequences == pytest.approx(expected, rel=1e-6)


def planned_footprint(published: Path, plan: dict[str, Any]) -> Footprint:
    form = StateFormat.of(plan["state_dtype"])
    return described(published / plan["model"]).footprint(plan["state_size"], _RECORDS["vllm"]["context"], form)


def test_no_memory_admits_nobody(published: Path) -> None:
    for name in ("Granite-4.0-H-Tiny", "Mamba-Codestral-7B"):
        footprint = described(published / name).footprint(64)
        assert all(engine.admits(footprint, footprint.weights).sequences == 0 for engine in ENGINES)


def test_a_smaller_state_and_fewer_bits_admit_more_everywhere(published: Path) -> None:
    found = described(published / "Nemotron-H-8B")
    for engine in engines_named(["vllm", "sglang", "llama.cpp-cuda", "mlx-lm"]):
        counts = [engine.admits(found.footprint(size), 80 * 2**30).sequences for size in (None, 64, 32)]
        assert counts == sorted(set(counts))
        if "bfloat16" in engine.states.offered:
            half = engine.admits(found.footprint(form=FORMATS["bfloat16"]), 80 * 2**30).sequences
            assert half > counts[0]


def test_engines_offer_dtypes_that_are_known() -> None:
    for engine in ENGINES:
        states = engine.states
        named = {*states.offered, states.untold, *states.untold_for.values(), *states.rounding, *states.open}
        assert named <= FORMATS.keys(), engine.name
        assert {states.untold, *states.untold_for.values(), *states.rounding} <= set(states.offered)
        assert not set(states.open) & set(states.offered), engine.name


def test_flags_to_serve_with() -> None:
    vllm, sglang, llama = (engine.states for engine in engines_named(["vllm", "sglang", "llama.cpp-cpu"]))
    granite, nemotron, falcon = GraniteMoeHybridConfig(), NemotronHConfig(), FalconH1Config()
    assert vllm.flags("bfloat16", granite) == vllm.flags("float32", nemotron) == sglang.flags("float32", granite) == ""
    assert vllm.flags("float32", granite) == "--mamba-ssm-cache-dtype float32"
    assert sglang.flags("bfloat16", granite) == "--mamba-ssm-dtype bfloat16"
    for config in (granite, nemotron, falcon):  # only some read a key, and each engine its own
        config.mamba_ssm_cache_dtype = config.mamba_ssm_dtype = "float16"
    assert [vllm.unless_told(config) for config in (granite, nemotron, falcon)] == ["bfloat16", "float16", "bfloat16"]
    assert [sglang.unless_told(config) for config in (granite, nemotron, falcon)] == ["float32", "float16", "float16"]
    rounded = "--mamba-ssm-dtype float16 --enable-mamba-cache-stochastic-rounding"
    assert sglang.flags("float16", granite, stochastic=True) == rounded
    assert sglang.flags("bfloat16", granite, stochastic=True) is None
    assert vllm.flags("int8", granite) is llama.flags("bfloat16", granite) is None


def test_inspect_tells_of_serving(run: Run, published: Path) -> None:
    options = ["--state-size", 64, "--state-dtype", "float32", "bfloat16", "int8", "--memory", "80GiB"]
    code, out, err = run("inspect", published / "Granite-4.0-H-Micro", *options)
    assert code == 0, err
    footprint = described(published / "Granite-4.0-H-Micro").footprint(64, 8192, FORMATS["bfloat16"])
    assert f"{in_vllm(footprint, 80 * 2**30).tokens:,}" in out
    for text in (
        "--mamba-ssm-cache-dtype float32",
        "--mamba-ssm-dtype bfloat16",
        "not released yet: pull requests #40012, #52962",
    ):
        assert text in out
    code, out, _ = run("inspect", published / "Granite-4.0-H-Micro", *options, "--context", 1000, "--json")
    found = json.loads(out)
    dense, half = found["cuts"]
    assert [entry["state"] for entry in dense["kept"]] == [36 * 4096 * bytes_ for bytes_ in (512, 256, 132)]
    assert half["kept"][0]["cache"] == 1000 * 4 * 2 * 8 * 64 * 2
    assert {(entry["engine"], entry["state_dtype"]) for entry in half["admitted"]} == {
        ("vllm", "float32"),
        ("vllm", "bfloat16"),
        ("sglang", "float32"),
        ("sglang", "bfloat16"),
        ("llama.cpp-cuda", "float32"),
    }
    assert found["states"]["sglang"]["config_key"] == ""
    code, _, err = run("inspect", published / "Granite-4.0-H-Micro", "--state-dtype", "int3")
    assert code == 2
    assert "'int3'; expected one of: float32" in err
