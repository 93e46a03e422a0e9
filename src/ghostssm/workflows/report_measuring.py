"""What is measured for a report only: what the state does, how fast the model decodes, how it goes on from a prompt."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ghostssm.calibration.blocks import Blocks
from ghostssm.calibration.samples import sample_outputs
from ghostssm.calibration.walk import LayerWalk
from ghostssm.checkpoint.description import Description
from ghostssm.checkpoint.loading import Checkpoint
from ghostssm.evaluation.roofline import Machine, measure_machine, predicted_step_seconds
from ghostssm.evaluation.speed import first_channels, measure
from ghostssm.methods.balanced import hankel_values
from ghostssm.methods.base import Evidence, Known
from ghostssm.methods.baselines import magnitude
from ghostssm.models.families import mixers_of
from ghostssm.models.forward import fast_forward, replaced_forward
from ghostssm.models.transformers_private import quiet_transformers
from ghostssm.ops.state_format import FLOAT32, StateFormat, StateStorage
from ghostssm.plan.plan import Plan
from ghostssm.plan.surgery import pruned
from ghostssm.progress import Progress, silent
from ghostssm.text.windows import Windows
from ghostssm.units import text_name
from ghostssm.workflows.report_record import DecodeSpeed, Observations, Samples

_OBSERVED_TOKENS = 16384
"""Figures of the state need fewer tokens than a decision: nobody sees an error of a few percent."""
_SAMPLES = 2048
_PROMPT = 8
_SAMPLE_PROMPT = 64
_SAMPLE_TOKENS = 64


def observe(model: PreTrainedModel | Blocks, windows: Windows, progress: Progress = silent) -> Observations:
    """Weight norms, channel energies and Hankel singular values of an unpruned model, on the first of some windows.

    Raises:
        NumericalError: activations that are not finite.
    """
    seen = windows.part(slice(0, max(1, _OBSERVED_TOKENS // windows.length)))
    walk = LayerWalk(model, seen)
    norms: dict[str, Tensor] = {}
    energies: dict[str, Tensor] = {}
    hankel: dict[str, Tensor] = {}
    for block in walk.blocks():
        progress("observed", block.index, len(walk))
        if (mixer := block.mixer) is not None:
            samples = sample_outputs(mixer, block.scanned_streams(), seen.ids.numel(), _SAMPLES)
            evidence = Evidence(mixer.layout, mixer.in_proj.weight.detach(), 0, Known(known_samples=samples))
            norms[mixer.name] = magnitude(evidence).double().cpu()
            hankel[mixer.name] = hankel_values(evidence).double().cpu()
            energies[mixer.name] = block.statistics().output_energy.sqrt().cpu()
        block.advance()
    progress("observed", len(walk), len(walk))
    return Observations(norms, energies, hankel, text_name(windows.text_name), seen.ids.numel())


def decode_speeds(
    model: PreTrainedModel, described: Description, plan: Plan, batches: Sequence[int], progress: Progress = silent
) -> tuple[DecodeSpeed, ...]:
    """Decode speed of a model as it is and under a plan, beside the prediction; all in float32 but the plan's state.

    Args:
        described: the model as it is.
    """
    whole = model if model.dtype.itemsize >= 4 else copy.deepcopy(model).float()
    plans = {"dense": first_channels(model, plan.state_size), "pruned": plan}
    storages = {"dense": StateStorage(), "pruned": StateStorage.of(plan.state_dtype or FLOAT32)}
    timings = measure(whole, plans, batches, _PROMPT, progress, storages=storages)
    machine = measure_machine(batches, str(model.device))
    speeds = []
    for name in plans:
        for batch in batches:
            speed = timings[name, batch].decode(batch)
            form = storages[name].format
            predicted = predicted_speed(described, machine, batch, plan if name == "pruned" else None, form)
            speeds.append(DecodeSpeed(name, batch, speed.median, predicted, (speed.low, speed.high)))
    return tuple(speeds)


def sample(checkpoint: Checkpoint, plans: Mapping[str, Plan], windows: Windows) -> Samples:
    """How a model goes on from the beginning of the first window, as it is ("dense") and under each of some plans."""
    model, tokenizer = checkpoint.model, checkpoint.require_tokenizer()
    prompt = windows.ids[:1, : min(_SAMPLE_PROMPT, windows.length)].to(model.device)
    continuations = {"dense": _continuation(model, prompt)}
    for name, plan in plans.items():
        with pruned(model, plan) as smaller:
            continuations[name] = _continuation(smaller, prompt, plan.state_dtype)
    texts = {name: tokenizer.decode(ids) for name, ids in continuations.items()}
    return Samples(text_name(windows.text_name), tokenizer.decode(prompt[0]), texts)


def _continuation(model: PreTrainedModel, prompt: Tensor, state_dtype: str | None = None) -> Tensor:
    """The likeliest next token, again and again; (l,), int64."""
    forward = partial(fast_forward, storage=StateStorage.of(state_dtype or FLOAT32))
    with replaced_forward(mixers_of(model), forward), quiet_transformers():
        ids: Tensor = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=_SAMPLE_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
    return ids[0, prompt.shape[1] :]


def predicted_speed(
    described: Description, machine: Machine, batch: int, plan: Plan | None, form: StateFormat = FLOAT32
) -> float:
    """Tokens per second that bandwidth and arithmetic predict for a model under a plan, or as it is.

    Args:
        form: of the state.
    """
    if plan is None or not plan.needs_own_class:
        size = None if plan is None else plan.kept_state_size
        return batch / predicted_step_seconds(described, machine, batch, size, form)
    removed = 0
    if not plan.is_projected:
        removed = sum(described.removed_parameters(size) // described.layers for size in plan.state_sizes)
    smaller = dataclasses.replace(
        described,
        state_sizes=plan.state_sizes,
        tiers=tuple(plan.tiers.values()),
        parameters=described.parameters - removed,
    )
    return batch / predicted_step_seconds(smaller, machine, batch, None, form)
