"""How much of a model's state is to stay, as it was asked for and as engines run it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ghostssm.checkpoint.description import Description
from ghostssm.choices import Groups
from ghostssm.engines import advise, engines_named, good_state_sizes, nearest_state_size
from ghostssm.errors import InputError
from ghostssm.ops.state_format import FORMATS, TIERS, StateFormat
from ghostssm.progress import Notify, unheard
from ghostssm.pruning.recipe import Recipe
from ghostssm.pruning.run import DEFAULT_MULTIPLE
from ghostssm.pruning.search import check_shrinks, fits_in, formats_to_try
from ghostssm.workflows.request_checks import share_or_bytes
from ghostssm.workflows.requests import PruneRequest


@dataclass(frozen=True)
class Target:
    """How much of the state is to stay.

    Attributes:
        size: the state size, on average over layers; None where a bound decides.
        max_excess_loss: on the loss, nats per token. state_bytes: on the bytes of one sequence's state.
        sizes: those that the wanted engines run, ascending, where a bound decides; None for all.
        dtypes: of the state, that they offer or that was asked for, where a bound decides; None for all.
    """

    size: int | None = None
    max_excess_loss: float | None = None
    state_bytes: int | None = None
    sizes: Sequence[int] | None = None
    dtypes: Sequence[str] | None = None


def wanted_target(request: PruneRequest, described: Description) -> Target:
    """How much of a model's state a checked request keeps.

    Raises:
        InputError: all that there is, or more, or nothing.
    """
    if (most := request.max_excess_loss) is not None:
        return Target(max_excess_loss=most, dtypes=request.state_dtype and (request.state_dtype,))
    if request.state_bytes is not None:
        return Target(state_bytes=bound_on_bytes(request.state_bytes, described.state_bytes()))
    size, limit = request.state_size, described.layout.state_size
    if request.budget is not None:
        size = max(1, round(request.budget * limit))
    assert size is not None
    if not 1 <= size < limit:
        raise InputError(
            f"The state size would be {size}; expected 1 to {limit - 1}, less than the model's own N = {limit}: a "
            "smaller --state-size, or a --budget that leaves less."
        )
    return Target(size)


def bound_on_bytes(text: str, dense: int) -> int:
    """The bytes that ``--state-bytes`` says, of a model whose state takes so many in float32.

    Raises:
        InputError: as `share_or_bytes`, or not below the dense state's bytes.
    """
    said = share_or_bytes(text)
    bound = said if isinstance(said, int) else int(said * dense)
    if not 0 < bound < dense:
        raise InputError(
            f"--state-bytes is {text}, which is {bound:,} bytes per sequence; expected more than 0, and less than the "
            f"{dense:,} of the model's state in float32: a share of it, such as 1/8, or a size with its unit."
        )
    return bound


def target_of(request: PruneRequest, described: Description, recipe: Recipe, notify: Notify) -> Target:
    """The target of a checked request, nearest to the wanted one that its engines run.

    Raises:
        InputError: as `wanted_target` and `_suited_target`; or no state fits.
    """
    target = wanted_target(request, described)
    if target.size is None:
        check_shrinks(recipe)
    if request.engines:
        target = _suited_target(target, described, recipe, request, notify)
    if target.state_bytes is not None:  # something has to fit
        multiple = request.multiple or DEFAULT_MULTIPLE
        names = [form.name for form in formats_to_try(recipe, target.dtypes)]
        fits_in(target.state_bytes, described.layout, described.layers, target.sizes, names, multiple)
    return target


def target_within(
    bound: str, described: Description, recipe: Recipe, engines: Sequence[str], groups: Groups = "equal"
) -> Target:
    """What ``prune --state-bytes`` chooses within, where nothing is written.

    The head counts as untied, which some engines need.

    Raises:
        InputError: as `target_of`.
    """
    request = PruneRequest(
        described.name, state_bytes=bound, recipe=str(recipe), engines=tuple(engines), groups=groups, untie=True
    )
    return target_of(request, described, recipe, unheard)


def check_dtypes(names: Iterable[str]) -> None:
    """Raise InputError for what is no dtype of a state that any model can be kept in."""
    for name in names:
        if StateFormat.of(name) == TIERS:
            raise InputError(
                "The state dtype is tiers, in which only a model can be kept that was pruned to them: "
                "--method balanced with --state-bytes 1/16 or --max-excess-loss 0.02 may choose them. "
                f"Expected one of {', '.join(FORMATS)}."
            )


def check_engines(request: PruneRequest) -> None:
    """Raise InputError for an engine that reads another dialect, or stores no state of the wanted dtype."""
    for engine in engines_named(request.engines):
        if engine.dialect not in (None, request.dialect):
            raise InputError(f"{engine.name} reads the {engine.dialect} dialect; add --dialect {engine.dialect}.")
        if request.state_dtype not in (None, *(offered := engine.states.offered)):
            raise InputError(
                f"{engine.name} keeps a state in {' or '.join(offered)}, not in {request.state_dtype}; name one of "
                "these with --state-dtype, or leave the engine out."
            )


def _suited_target(
    target: Target, described: Description, recipe: Recipe, request: PruneRequest, notify: Notify
) -> Target:
    """The target nearest to the wanted one that the engines run.

    Raises:
        InputError: an engine that runs nothing of what the recipe makes, or sizes that are not known beforehand.
    """
    layout, family, engines, groups = described.layout, described.family, request.engines, request.groups
    tied_head = described.tied_head and not request.untie
    if target.size is None and target.dtypes is None:
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
        good = good_state_sizes(layout, family, engines, tied_head=tied_head, config=described.config)
        sizes = [size for size in good if size % (request.multiple or DEFAULT_MULTIPLE) == 0]
        return replace(target, sizes=[*sizes, layout.state_size])  # a narrower dtype alone may do
    chosen = nearest_state_size(target.size, layout, family, engines, tied_head=tied_head, config=described.config)
    if chosen != target.size:
        advices = advise(layout.with_state_size(target.size), family, engines=engines)
        reasons = "; ".join(f"{each.engine}: {each.level}, {each.reason}" for each in advices if each.level != "runs")
        suits = f"the nearest that suits {' and '.join(engines)}"
        notify(f"state size {chosen} in place of {target.size}, {suits} ({reasons})")
    return Target(chosen)


def _offered_dtypes(engines: Sequence[str]) -> list[str]:
    """Dtypes of the state that all of the engines can store."""
    offered = [engine.states.offered for engine in engines_named(engines)]
    return [name for name in FORMATS if all(name in names for names in offered)]
