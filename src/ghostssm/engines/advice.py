"""What follows from the engines' rules for one model: who runs it, and which state sizes suit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ghostssm.engines.rules import ENGINES, Advice, engines_named
from ghostssm.errors import InputError
from ghostssm.models.layout import SSDLayout

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def advise(
    layout: SSDLayout,
    model_type: str,
    *,
    engines: Sequence[str] | None = None,
    dialect: str | None = None,
    own_class: bool = False,
    tied_head: bool = False,
    config: PreTrainedConfig | None = None,
) -> tuple[Advice, ...]:
    """Which engines run a model with mixers of this layout, in the order of the table.

    Args:
        layout: of the mixers as the engine would get them.
        model_type: the transformers name of the model's family, such as ``mamba2``.
        engines: names; None for all that are known.
        dialect: of the model's files; None for files yet to be written, in whichever dialect an engine reads.
        own_class: whether the state is projected, or differs between layers.
        tied_head: whether the checkpoint has no ``lm_head.weight`` of its own.
        config: the model's, for what an engine does not heed in it; None for one that is as usual.

    Raises:
        InputError: no engine of that name.
    """
    chosen = ENGINES if engines is None else engines_named(engines)
    return tuple(
        engine.advise(layout, model_type, dialect=dialect, own_class=own_class, tied_head=tied_head, config=config)
        for engine in chosen
    )


def good_state_sizes(
    layout: SSDLayout,
    model_type: str,
    engines: Sequence[str],
    *,
    tied_head: bool = False,
    config: PreTrainedConfig | None = None,
) -> tuple[int, ...]:
    """State sizes below that of ``layout`` which all of the engines run, and not slowly; ascending.

    Arguments as `advise` has them.

    Raises:
        InputError: no engine of that name, or no such size; says every engine's rule.
    """
    smaller = (layout.with_state_size(size) for size in range(1, layout.state_size))
    sizes = tuple(cut.state_size for cut in smaller if _suits(cut, model_type, engines, tied_head, config))
    if sizes:
        return sizes
    rules = [
        f"\n  - {engine.name}: {engine.never(model_type, tied_head, config) or engine.rule_text}"
        for engine in engines_named(engines)
    ]
    raise InputError(
        f"No state size below the model's N = {layout.state_size} ({layout.num_heads} heads of {layout.head_dim}, "
        f"{layout.n_groups} groups) suits {' and '.join(engines)}:{''.join(rules)}\n"
        "Leave an engine out, or prune without --engine; `ghostssm inspect` says what a size means for each."
    )


def nearest_state_size(
    wanted: int,
    layout: SSDLayout,
    model_type: str,
    engines: Sequence[str],
    *,
    tied_head: bool = False,
    config: PreTrainedConfig | None = None,
) -> int:
    """The state size next to ``wanted`` that all of the engines run, and not slowly; of two, the larger.

    Args:
        wanted: from 1 to the model's N.
        layout: of the model before the cut.
        model_type: the transformers name of the model's family, such as ``mamba2``.
        engines: names of one or several.
        tied_head: whether the checkpoint has no ``lm_head.weight`` of its own.
        config: the model's, for what an engine does not heed in it; None for one that is as usual.

    Raises:
        InputError: as `good_state_sizes`.
    """
    if _suits(layout.with_state_size(wanted), model_type, engines, tied_head, config):
        return wanted
    sizes = good_state_sizes(layout, model_type, engines, tied_head=tied_head, config=config)
    return min(sizes, key=lambda size: (abs(size - wanted), -size))


def _suits(
    cut: SSDLayout, model_type: str, engines: Sequence[str], tied_head: bool, config: PreTrainedConfig | None
) -> bool:
    advice = advise(cut, model_type, engines=engines, tied_head=tied_head, config=config)
    return all(entry.level == "runs" for entry in advice)
