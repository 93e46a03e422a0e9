"""How to serve a model: the dtypes that engines store its state in, and how many sequences they take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ghostssm.cli.console import print_table, print_text
from ghostssm.units import bytes_text

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ghostssm.engines.rules import Engine


def print_admissions(by_size: Mapping[str, Sequence[Mapping[str, Any]]], context: int) -> None:
    """One table per memory: engines and dtypes by state sizes, sequences and all their tokens."""
    rows: dict[int, dict[tuple[str, str], list[str]]] = {}
    weights: dict[int, int] = {}  # the least
    for entries in by_size.values():
        for entry in entries:
            weights[entry["memory"]] = min(entry["weights"], weights.get(entry["memory"], entry["weights"]))
            cells = rows.setdefault(entry["memory"], {}).setdefault((entry["engine"], entry["state_dtype"]), [])
            cells += [f"{int(entry['sequences']):,}", f"{entry['tokens']:,}"]
    for memory, lines in rows.items():
        headers = [text for size in by_size for text in (f"sequences, N' = {size}", "their tokens")]
        print_text(f"Sequences of {context:,} tokens in {bytes_text(memory)}, weights included:")
        print_table(["engine", "state", *headers], [[*key, *numbers] for key, numbers in lines.items()], text_columns=2)
        if weights[memory] > memory:
            print_text(f"The weights alone take {bytes_text(weights[memory])}.")
        print()


def print_states(engines: Sequence[Engine], config: PreTrainedConfig, dtypes: Sequence[str]) -> None:
    """A table of the options that make each engine keep the state in a dtype."""
    lines = [(engine.name, dtype, _options(engine, dtype, config)) for engine in engines for dtype in dtypes]
    if lines:
        print_table(["engine", "state", "to serve with it"], lines, text_columns=3)
    keys = ((engine.name, engine.states.config_key(config.model_type)) for engine in engines)
    if told := [f"{key} to {engine}" for engine, key in keys if key]:
        print()
        print_text(f"config.json may say it too: {', '.join(told)}.")


def _options(engine: Engine, dtype: str, config: PreTrainedConfig) -> str:
    flags = engine.states.flags(dtype, config)
    if flags is None and engine.own_class != "no":
        return f'ghostssm.accelerate(model, state_dtype="{dtype}")'
    if flags is None:
        requests = engine.states.open.get(dtype)
        return f"not released yet: pull requests {requests}" if requests else "not offered"
    return flags or ("no flag: its default" if dtype == engine.states.unless_told(config) else "as weights have it")
