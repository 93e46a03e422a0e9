"""What ``ghostssm inspect`` says of serving a model: how engines store its state, and how many sequences they take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ghostssm.cli.console import print_table, print_text
from ghostssm.units import bytes_text

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ghostssm.checkpoint.description import Description
    from ghostssm.engines.rules import Engine
    from ghostssm.ops.state_format import StateFormat

_TOLD = ("vllm", "sglang", "llama.cpp-cuda")
"""Engines that are told of where none is named; the others allocate what a sequence takes and no more."""


def engines_told(named: Sequence[str] | None, found: Description) -> tuple[Engine, ...]:
    """The engines that have a class for a model: of those named, or of those with rules of their own."""
    from ghostssm.engines import engines_named

    if not found.is_stock:
        return tuple(engine for engine in engines_named(named or ("transformers-cpu",)) if engine.own_class != "no")
    engines = engines_named(named or _TOLD)
    return tuple(engine for engine in engines if engine.model_types is None or found.family in engine.model_types)


def kept(found: Description, size: int | None, forms: Sequence[StateFormat], context: int) -> list[dict[str, Any]]:
    """What one sequence keeps, by state dtype; bytes."""
    footprints = {form: found.footprint(size, context, form) for form in forms}
    return [
        {
            "state_dtype": form.name,
            **{name: getattr(each, name) for name in ("state", "conv", "cache", "attention_layers", "state_share")},
        }
        for form, each in footprints.items()
    ]


def admissions(
    found: Description,
    size: int | None,
    forms: Sequence[StateFormat],
    context: int,
    memories: Sequence[int],
    engines: Sequence[Engine],
) -> list[dict[str, Any]]:
    """How many sequences each engine takes with each state dtype that it offers, in each memory; bytes."""
    entries = []
    for engine in engines:
        for form in forms:
            for memory in memories:
                if form.name in engine.states.offered:
                    admitted = engine.admits(found.footprint(size, context, form), memory)
                    entries.append(
                        {"engine": engine.name, "state_dtype": form.name, "memory": memory}
                        | {"sequences": admitted.sequences, "tokens": admitted.tokens}
                        | {"page": admitted.page, "block_tokens": admitted.block_tokens}
                    )
    return entries


def print_admissions(by_size: Mapping[str, Sequence[Mapping[str, Any]]], context: int) -> None:
    """One table per memory: engines and dtypes by state sizes, sequences and all their tokens."""
    rows: dict[int, dict[tuple[str, str], list[str]]] = {}
    for entries in by_size.values():
        for entry in entries:
            cells = rows.setdefault(entry["memory"], {}).setdefault((entry["engine"], entry["state_dtype"]), [])
            cells += [f"{int(entry['sequences']):,}", f"{entry['tokens']:,}"]
    for memory, lines in rows.items():
        headers = [text for size in by_size for text in (f"sequences, N' = {size}", "their tokens")]
        print_text(f"Sequences of {context:,} tokens in {bytes_text(memory)}, weights included:")
        print_table(["engine", "state", *headers], [[*key, *numbers] for key, numbers in lines.items()], text_columns=2)
        print()


def print_states(engines: Sequence[Engine], config: PreTrainedConfig, dtypes: Sequence[str]) -> None:
    """How to serve a model with states of these dtypes, by engine."""
    lines = [(engine.name, dtype, _options(engine, dtype, config)) for engine in engines for dtype in dtypes]
    if lines:
        print_table(["engine", "state", "to serve with it"], lines, text_columns=3)
        print()
    keys = ((engine.name, engine.states.config_key(config.model_type)) for engine in engines)
    if told := [f"{key} to {engine}" for engine, key in keys if key]:
        print_text(f"config.json may say it too: {', '.join(told)}.")
        print()


def _options(engine: Engine, dtype: str, config: PreTrainedConfig) -> str:
    flags = engine.states.flags(dtype, config)
    if flags is None:
        requests = engine.states.open.get(dtype)
        return f"not released yet: pull requests {requests}" if requests else "not offered"
    return flags or ("unless told otherwise" if dtype == engine.states.unless_told(config) else "as weights have it")
