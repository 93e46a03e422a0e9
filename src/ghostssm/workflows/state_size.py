"""Which state size is asked for, and which one engines run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from ghostssm.checkpoint.description import Description
from ghostssm.choices import Groups
from ghostssm.engines import advise, engines_named, good_state_sizes, nearest_state_size
from ghostssm.errors import InputError
from ghostssm.models.layout import check_state_size
from ghostssm.ops.state_format import FORMATS, TIERS, StateFormat
from ghostssm.progress import Notify
from ghostssm.pruning.recipe import Recipe
from ghostssm.units import memory_bytes


@dataclass(frozen=True)
class Target:
    """How much of the state is to stay.

    Attributes:
        size: the state size, on average over layers; None where a bound decides.
        max_excess_loss: on the loss, nats per token. state_bytes: on the bytes of one sequence's state.
        sizes: those that the wanted engines run, ascending, where a bound decides; None for all.
        dtypes: of the state, that they offer, where a bound on the bytes decides; None for all.
    """

    size: int | None = None
    max_excess_loss: float | None = None
    state_bytes: int | None = None
    sizes: Sequence[int] | None = None
    dtypes: Sequence[str] | None = None


def wanted_target(
    described: Description,
    state_size: int | None = None,
    budget: float | None = None,
    max_excess_loss: float | None = None,
    state_bytes: str | None = None,
) -> Target:
    """What one of the four options says of a model.

    Raises:
        InputError: none of them is given, or several, or one out of range.
    """
    limit = described.layout.state_size
    options = {
        "--state-size": state_size,
        "--budget": budget,
        "--max-excess-loss": max_excess_loss,
        "--state-bytes": state_bytes,
    }
    given = [option for option, value in options.items() if value is not None]
    if not given:
        raise InputError(f"Say how much to keep: give one of {', '.join(options)}.")
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} each say how much to keep; give one of them.")
    if max_excess_loss is not None:
        if not max_excess_loss >= 0:
            raise InputError(f"--max-excess-loss is {max_excess_loss:g}; expected 0 or more nats per token.")
        return Target(max_excess_loss=max_excess_loss)
    if state_bytes is not None:
        return Target(state_bytes=bound_on_bytes(state_bytes, described.state_bytes()))
    if budget is not None:
        if not 0 < budget <= 1:
            raise InputError(f"--budget is {budget:g}; expected a share of the state above 0, up to 1.")
        return Target(max(1, round(budget * limit)))
    assert state_size is not None
    check_state_size(state_size, limit)
    return Target(state_size)


def bound_on_bytes(text: str, dense: int) -> int:
    """Bytes of a share of the dense float32 state, such as ``1/8``, or of a size with its unit.

    Raises:
        InputError: it is neither, or not below the dense state's bytes.
    """
    try:
        bound = int(Fraction(text) * dense)
    except ZeroDivisionError:
        bound = 0
    except ValueError:
        if "B" not in text.upper():
            raise InputError(
                f"--state-bytes is {text!r}; expected a share of the dense float32 state, such as 1/8, or a size with "
                "its unit, such as 6MiB."
            ) from None
        bound = memory_bytes(text, "state's size")
    if not 0 < bound < dense:
        raise InputError(
            f"--state-bytes is {text}, which is {bound:,} bytes per sequence; expected more than 0, and less than the "
            f"{dense:,} of the model's state in float32."
        )
    return bound


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


def check_dtypes(names: Iterable[str]) -> None:
    """Raise InputError for what is no dtype of a state that any model can be kept in."""
    for name in names:
        if StateFormat.of(name) is TIERS:
            raise InputError(
                "The state dtype is tiers, in which only a model can be kept that was pruned to them: "
                f"--method balanced --state-bytes 1/16 may choose them. Expected one of {', '.join(FORMATS)}."
            )


def check_stored(engines: Sequence[str], state_dtype: str) -> None:
    """Raise InputError for an engine that stores no state of a dtype."""
    for engine in engines_named(engines):
        if state_dtype not in (offered := engine.states.offered):
            raise InputError(
                f"{engine.name} keeps a state in {' or '.join(offered)}, not in {state_dtype}; name one of these with "
                "--state-dtype, or leave the engine out."
            )


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
    if target.state_bytes is not None:
        target = replace(target, dtypes=_offered_dtypes(engines))
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
        sizes = [size for size in good if size % multiple == 0]
        if target.state_bytes is not None:  # a narrower dtype alone may do
            sizes.append(layout.state_size)
        return replace(target, sizes=sizes)
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


def _offered_dtypes(engines: Sequence[str]) -> list[str]:
    """Dtypes of the state that all of the engines can store."""
    offered = [engine.states.offered for engine in engines_named(engines)]
    return [name for name in FORMATS if all(name in names for names in offered)]
