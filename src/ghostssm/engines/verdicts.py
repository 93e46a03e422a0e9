"""The advice of engines on one or several models, as texts for a terminal and a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from ghostssm.engines.rules import Advice


@dataclass(frozen=True)
class Verdicts:
    """Advice as texts.

    Attributes:
        rows: an engine's name and a cell for every model.
        reasons: pairs of the engines and models that share a reason, and the reason.
        notes: sentences that say what a cell means.
    """

    rows: list[list[str]]
    reasons: list[list[str]]
    notes: list[str]

    @classmethod
    def of(cls, advice: Mapping[str, Sequence[Advice]]) -> Verdicts:
        """From the advice on models by their labels, the same engines for each."""
        rows = []
        shared: dict[tuple[str, str], list[str]] = {}
        for entries in zip(*advice.values(), strict=True):
            rows.append([entries[0].engine, *(_cell(entry) for entry in entries)])
            labels: dict[str, list[str]] = {}
            for label, entry in zip(advice, entries, strict=True):
                # the last reason of an entry with a remedy is what its cell says
                if reason := entry.reason.rpartition("; ")[0] if entry.remedy else entry.reason:
                    labels.setdefault(reason, []).append(label)
            for reason, models in labels.items():
                where = "" if len(models) == len(advice) else f" ({', '.join(models)})"
                shared.setdefault((where, reason), []).append(entries[0].engine)
        notes = []
        told = list(chain.from_iterable(advice.values()))
        if any(entry.remedy for entry in told):
            notes.append("after ...: once ghostssm export or ghostssm prune has written it with that option.")
        if any(entry.export == "--format gguf" for entry in told):
            notes.append("llama.cpp reads GGUF files, which ghostssm export writes.")
        reasons = [[", ".join(engines) + where, reason] for (where, reason), engines in shared.items()]
        return cls(rows, reasons, notes)


def _cell(entry: Advice) -> str:
    return f"after {entry.remedy}" if entry.remedy else entry.level
