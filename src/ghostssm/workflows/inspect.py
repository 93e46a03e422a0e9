"""What a checkpoint is, and what a smaller state would give it; weights are not loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ghostssm.checkpoint.description import Description, describe
from ghostssm.choices import DEFAULT_RECIPE
from ghostssm.engines import Advice, advise, engines_named
from ghostssm.engines.capacity import DEFAULT_CONTEXT, Footprint
from ghostssm.engines.rules import Engine
from ghostssm.errors import InputError
from ghostssm.models.layout import check_state_size
from ghostssm.ops.state_format import BFLOAT16, StateFormat
from ghostssm.units import memory_bytes
from ghostssm.workflows.request_checks import check_request
from ghostssm.workflows.requests import CalibratingRequest, InspectRequest

if TYPE_CHECKING:
    from ghostssm.pruning.forecast import Forecast

_SERVING = ("vllm", "sglang", "llama.cpp-cuda")
"""Engines that allocate more than a sequence takes; the others allocate that and no more."""


@dataclass(frozen=True)
class Cut:
    """What a state size gives.

    Attributes:
        state_size: N'; of the model as it is, the average over its layers.
        saved_fraction: of the bytes of the unpruned model's state.
        predicted_tokens_per_second: by batch size, if that was asked for.
        kept: what a sequence keeps, bytes; one entry for each dtype of the state.
        admitted: how many sequences engines take; one entry for each engine, dtype and memory.
        engines: which of them run it.
    """

    state_size: float
    state_bytes_float32: int
    state_bytes_bfloat16: int
    saved_fraction: float
    parameters: int
    predicted_tokens_per_second: Mapping[int, float]
    kept: Sequence[Mapping[str, Any]]
    admitted: Sequence[Mapping[str, Any]]
    engines: Sequence[Advice]


@dataclass(frozen=True)
class Fit:
    """The largest state in a dtype that takes at most so many bytes per sequence.

    Attributes:
        within: the bound, as it was given.
        state_bytes: of one sequence, all layers, scales included.
        engines: those that run the size and store the dtype.
    """

    within: str
    state_size: int
    state_dtype: str
    state_bytes: int
    engines: tuple[str, ...]


@dataclass(frozen=True)
class InspectOutcome:
    """What there is to know of a checkpoint.

    Attributes:
        context: tokens of a sequence, where its cache is counted.
        serving: engines to serve it with. forms: of the state, to serve it in.
        cuts: the model as it is, then the state sizes that were asked for.
        fits: what there is within the bounds on the bytes that were asked for.
        forecast: what a prune takes, if that was asked for.
    """

    description: Description
    context: int
    serving: tuple[Engine, ...]
    forms: tuple[StateFormat, ...]
    cuts: tuple[Cut, ...]
    fits: tuple[Fit, ...]
    forecast: Forecast | None

    def as_json(self) -> dict[str, Any]:
        facts = {name: value for name, value in asdict(self.description).items() if name != "config"}
        return facts | {
            "layers": self.description.layers,
            "active_parameters": self.description.active_parameters,
            "context": self.context,
            "predicted_prune": None if self.forecast is None else asdict(self.forecast),
            "cuts": [asdict(cut) for cut in self.cuts],
            "fits": [asdict(fit) for fit in self.fits],
            "states": {engine.name: engine.states.as_json(self.description.config) for engine in self.serving},
        }


def inspect(request: InspectRequest) -> InspectOutcome:
    """Carry a request out: what ``ghostssm inspect`` does.

    Raises:
        InputError: a fault of the request or of what it names.
    """
    check_request(request)
    context = DEFAULT_CONTEXT if request.context is None else request.context
    memories = [memory_bytes(size) for size in request.memories]
    described = describe(request.model)
    made_for = None if described.pruning is None else described.pruning.state_dtype
    usual = dict.fromkeys(("float32", made_for or "float32", *(["tiers"] if described.tiers else [])))
    forms = tuple(StateFormat.of(name) for name in request.state_dtypes or usual)
    serving = serving_engines(request.engines, described)
    if (request.state_sizes or request.state_bytes) and not described.is_stock:
        raise InputError(
            f"{request.model} has a projected state or a state size per layer; inspect the original model for cuts."
        )
    for size in request.state_sizes:
        check_state_size(size, described.layout.state_size)
    prediction = _forecast(described, request.state_sizes) if request.predict else None
    sizes = (None, *request.state_sizes)
    before = described.state_bytes(
        described.layout.state_size if described.pruning is None else described.pruning.state_size
    )
    speeds = _predicted_speeds(described, sizes, request.batches)

    def cut(size: int | None) -> Cut:
        footprints = {form: described.footprint(size, context, form) for form in forms}
        return Cut(
            state_size=_mean(described.state_sizes) if size is None else size,
            state_bytes_float32=described.state_bytes(size),
            state_bytes_bfloat16=described.state_bytes(size, BFLOAT16),
            saved_fraction=1 - described.state_bytes(size) / before,
            parameters=described.parameters - described.removed_parameters(size),
            predicted_tokens_per_second=speeds.get(size, {}),
            kept=[_kept(form, footprint) for form, footprint in footprints.items()],
            admitted=[
                _admitted(engine, form, footprint, memory)
                for engine in serving
                for form, footprint in footprints.items()
                if form.name in engine.states.offered
                for memory in memories
            ],
            engines=advise(
                described.layout if size is None else described.layout.with_state_size(size),
                described.family,
                engines=request.engines or None,
                dialect=described.dialect if size is None else None,  # prune writes the dialect that is wanted
                own_class=not described.is_stock,
                tied_head=described.tied_head,
                config=described.config,
            ),
        )

    fits = tuple(fit for bound in request.state_bytes for fit in _fits(described, bound, request.engines))
    return InspectOutcome(described, context, serving, forms, tuple(map(cut, sizes)), fits, prediction)


def _fits(described: Description, bound: str, engines: Sequence[str]) -> list[Fit]:
    """What ``prune --state-bytes`` with the default recipe chooses from, the largest state first."""
    from ghostssm.pruning.recipe import Recipe  # these take model classes
    from ghostssm.pruning.search import fits_in
    from ghostssm.workflows.state_size import target_within

    target = target_within(bound, described, Recipe.parse(DEFAULT_RECIPE), engines)
    assert target.state_bytes is not None
    wanted = fits_in(target.state_bytes, described.layout, described.layers, target.sizes, target.dtypes)

    def fit(size: int, dtype: str) -> Fit:
        layout = described.layout.with_state_size(size)
        advice = advise(layout, described.family, engines=engines or None, config=described.config)
        running = engines_named([each.engine for each in advice if each.level == "runs"])
        names = tuple(engine.name for engine in running if dtype in engine.states.offered)
        return Fit(bound, size, dtype, described.state_bytes(size, StateFormat.of(dtype)), names)

    return [fit(size, dtype) for dtype, size in sorted(wanted.items(), key=lambda each: -each[1])]


def _mean(sizes: Sequence[int]) -> float:
    """The average, as one of the sizes where all are the same."""
    return sizes[0] if len(set(sizes)) == 1 else sum(sizes) / len(sizes)


def serving_engines(named: Sequence[str], described: Description) -> tuple[Engine, ...]:
    """The engines that have a class for a model: of those named, or of those that reserve memory by rules of theirs."""
    if not described.is_stock:
        return tuple(engine for engine in engines_named(named or ("transformers-cpu",)) if engine.own_class != "no")
    engines = engines_named(named or _SERVING)
    return tuple(engine for engine in engines if engine.model_types is None or described.family in engine.model_types)


def _kept(form: StateFormat, footprint: Footprint) -> dict[str, Any]:
    names = ("state", "conv", "cache", "attention_layers", "state_share")
    return {"state_dtype": form.name, **{name: getattr(footprint, name) for name in names}}


def _admitted(engine: Engine, form: StateFormat, footprint: Footprint, memory: int) -> dict[str, Any]:
    admission, names = engine.admits(footprint, memory), ("sequences", "tokens", "page", "block_tokens")
    place = {"engine": engine.name, "state_dtype": form.name, "memory": memory, "weights": footprint.weights}
    return place | {name: getattr(admission, name) for name in names}


def _forecast(described: Description, state_sizes: Sequence[int]) -> Forecast:
    """The prediction for a prune with GHOST and the default options. It takes model classes, so it is imported here."""
    from ghostssm.pruning.forecast import forecast, product_rate
    from ghostssm.pruning.run import check_original

    check_original(described.is_stock)
    size, default = (*state_sizes, max(1, described.layout.state_size // 2))[0], CalibratingRequest()
    return forecast(described, size, default.windows * default.window_length, product_rate())


def _predicted_speeds(
    described: Description, sizes: Sequence[int | None], batches: Sequence[int]
) -> dict[int | None, dict[int, float]]:
    """Tokens per second by state size and batch size; empty without batch sizes."""
    if not batches:
        return {}
    from ghostssm.evaluation.roofline import measure_machine, predicted_step_seconds  # which takes model classes

    machine = measure_machine(batches)
    return {
        size: {batch: batch / predicted_step_seconds(described, machine, batch, size) for batch in batches}
        for size in sizes
    }
