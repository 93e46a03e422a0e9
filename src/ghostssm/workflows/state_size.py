"""Which state size is asked for, and which one engines run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ghostssm.checkpoint.description import Description
from ghostssm.engines import advise, engines_named, good_state_sizes, nearest_state_size
from ghostssm.errors import InputError
from ghostssm.methods.selection import Groups
from ghostssm.models.layout import check_state_size
from ghostssm.progress import Notify
from ghostssm.pruning.recipe import Recipe


@dataclass(frozen=True)
class Target:
    """How much of the state is to stay.

    Attributes:
        size: the state size, on average over layers; None where a bound on the loss decides.
        max_excess_loss: that bound, nats per token.
        sizes: those that the wanted engines run, ascending, where a bound decides; None for all.
    """

    size: int | None = None
    max_excess_loss: float | None = None
    sizes: Sequence[int] | None = None


def wanted_target(limit: int, state_size: int | None, budget: float | None, max_excess_loss: float | None) -> Target:
    """What one of the three options says; ``limit`` is the model's own state size.

    Raises:
        InputError: none of them is given, or several, or one out of range.
    """
    options = {"--state-size": state_size, "--budget": budget, "--max-excess-loss": max_excess_loss}
    given = [option for option, value in options.items() if value is not None]
    if not given:
        raise InputError("Say how much to keep: give one of --state-size, --budget and --max-excess-loss.")
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} each say how much to keep; give one of them.")
    if max_excess_loss is not None:
        if not max_excess_loss >= 0:
            raise InputError(f"--max-excess-loss is {max_excess_loss:g}; expected 0 or more nats per token.")
        return Target(max_excess_loss=max_excess_loss)
    if budget is not None:
        if not 0 < budget <= 1:
            raise InputError(f"--budget is {budget:g}; expected a share of the state above 0, up to 1.")
        return Target(max(1, round(budget * limit)))
    assert state_size is not None
    check_state_size(state_size, limit)
    return Target(state_size)


def check_smaller(target: Target, limit: int) -> None:
    """Raise InputError for a state size that is the model's own, ``limit``: the result would be a copy."""
    if target.size == limit:
        raise InputError(
            f"The state size would be {limit}, which is the model's own N: nothing would change. Expected a smaller "
            "--state-size, or a --budget that leaves less."
        )


def check_engine_dialects(engines: Sequence[str], dialect: str) -> None:
    """Raise InputError for an engine that reads another dialect."""
    for engine in engines_named(engines):
        if engine.dialect not in (None, dialect):
            raise InputError(f"{engine.name} reads the {engine.dialect} dialect; add --dialect {engine.dialect}.")


def suited_target(
    target: Target,
    described: Description,
    recipe: Recipe,
    groups: Groups,
    engines: Sequence[str],
    tied_head: bool,
    multiple: int,
    notify: Notify,
) -> Target:
    """The target nearest to the wanted one that the engines run.

    Raises:
        InputError: an engine that runs nothing of what the recipe makes, or sizes that are not known beforehand.
    """
    layout, family, config = described.layout, described.family, described.config
    if recipe.per_layer or not recipe.registered.stock:
        for advice in advise(layout, family, engines=engines, own_class=True):
            if advice.level == "no":
                raise InputError(
                    f"{advice.engine} {advice.reason}, which {recipe} makes; leave --per-layer out and take a method "
                    "for stock classes, or leave the engine out."
                )
        return target
    if recipe.registered.scope == "model" or (groups == "pooled" and layout.n_groups > 1):
        raise InputError(
            f"With --engine the state size has to be known beforehand, but {recipe} with --groups {groups} pads to the "
            "widest group or layer; expected --groups equal, and a method that cuts all layers alike."
        )
    if target.size is None:
        good = good_state_sizes(layout, family, engines, tied_head=tied_head, config=config)
        return Target(max_excess_loss=target.max_excess_loss, sizes=[size for size in good if size % multiple == 0])
    chosen = nearest_state_size(target.size, layout, family, engines, tied_head=tied_head, config=config)
    if chosen != target.size:
        reasons = [
            f"{advice.engine}: {advice.level}, {advice.reason}"
            for advice in advise(layout.with_state_size(target.size), family, engines=engines)
            if advice.level != "runs"
        ]
        suits = f"the nearest that suits {' and '.join(engines)}"
        notify(f"state size {chosen} in place of {target.size}, {suits} ({'; '.join(reasons)})")
    return Target(chosen)
