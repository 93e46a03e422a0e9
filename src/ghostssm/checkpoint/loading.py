"""Load a checkpoint of any dialect into transformers' own model class, checked before and after."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from ghostssm.checkpoint.config_checks import MOST_MODULES, bounded_modules, checked_config
from ghostssm.checkpoint.dialects import dialect_named
from ghostssm.checkpoint.generation import read_generation_config
from ghostssm.checkpoint.naming import ignored_names, naming_faults, places_of, settle_ties
from ghostssm.checkpoint.source import Source, find_source
from ghostssm.checkpoint.tokenizer import load_tokenizer, required
from ghostssm.checkpoint.weights import stored_tensors
from ghostssm.errors import CONVERT, GhostWarning, InputError, ModelError, NumericalError, first_line
from ghostssm.files.tensors import StoredTensor
from ghostssm.models.families import check_model, family_named, mixers_of
from ghostssm.models.transformers_private import is_kept_wide, quiet_transformers
from ghostssm.progress import stage
from ghostssm.units import dtype_name
from ghostssm.values import short

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LISTED_FAULTS = 8
_QUANTISATION_KEYS = ("quantization_config", "quantization", "compression_config")
"""Of config.json: transformers', mlx-lm's, and the one that compressed-tensors had before."""
_WIDEN = f"Convert the model to a dtype with a wider range first, `{CONVERT}` (or f32), and take that."
_MODULES_PER_TENSOR = 16
"""Generous: most modules have a weight, shared ones are built several times, and a few hold none."""
GivenModel: TypeAlias = "str | PathLike[str] | PreTrainedModel | Checkpoint"
"""A hub id, a folder, ``reference``, a transformers model in memory, or a loaded checkpoint."""
GivenTokenizer: TypeAlias = str | PathLike[str] | PreTrainedTokenizerBase


@dataclass(frozen=True, init=False, repr=False, eq=False)
class Checkpoint:
    """A model in memory with its tokenizer, and the files that it came from.

    Attributes:
        model: of transformers.
        tokenizer: None where there is none; `require_tokenizer` then says what to do.
        source: where its files are; of a model that came without, `Source.in_memory`.

    Raises:
        InputError: something else in place of model or tokenizer.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    source: Source

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, source: Source | None = None
    ):
        check_model(model)
        if not isinstance(tokenizer, PreTrainedTokenizerBase | None):
            raise InputError(
                f"Found {short(tokenizer)} in place of a tokenizer; expected one of transformers: "
                "ghostssm.Checkpoint(model, AutoTokenizer.from_pretrained(...))."
            )
        for name, value in (("model", model), ("tokenizer", tokenizer)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "source", source or Source.in_memory(model.config))

    def __repr__(self) -> str:
        model, tokenizer = self.model, "a" if self.tokenizer is not None else "no"
        dtype = dtype_name(model.dtype)
        size = f"{model.num_parameters():,} parameters, {dtype} on {model.device}"
        return f"<Checkpoint {self.source.name!r}: {model.config.model_type}, {size}, with {tokenizer} tokenizer>"

    def require_tokenizer(self) -> PreTrainedTokenizerBase:
        return required(self.tokenizer, self.source)


def load(
    spec: str,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    tokenizer: str | None = None,
) -> Checkpoint:
    """Load a model: a hub id, a local folder in any dialect, or ``reference``.

    Args:
        spec: a hub id, a local folder in any dialect, or ``reference``.
        dtype: of the weights in memory; None keeps the stored one.
        device: where the weights go, such as ``cpu`` or ``cuda``.
        tokenizer: a folder or hub id to take the tokenizer from instead.

    Raises:
        InputError: a device that this machine or this torch does not have.
        ModelError: not a Mamba-2 model, a quantised one, a file that is missing or broken, or shapes that contradict
            the config.
        NumericalError: NaN or Inf in a weight; names the tensor.
    """
    check_device(device)
    source = find_source(spec)
    config = model_config(source)
    with stage(f"loading {spec}"):
        stored = checked_tensors(source, config)
        with quiet_transformers():
            model = _build(source, config, stored, dtype or stored_dtype(stored))
        if dtype is None:
            tell_narrowed(model, stored, source)
        check_finite(model.state_dict(), source, stored)
    return Checkpoint(model.to(device).eval(), load_tokenizer(source, config, tokenizer), source)


def is_in_memory(given: GivenModel) -> bool:
    """Whether a model is in memory already; otherwise it is the name of one to load."""
    return not isinstance(given, str | PathLike)


def in_memory(given: PreTrainedModel | Checkpoint) -> Checkpoint:
    """A model in memory as a checkpoint without a tokenizer; a checkpoint is returned as it is.

    Raises:
        InputError: something else.
    """
    if isinstance(given, Checkpoint):
        return given
    check_model(given)
    return Checkpoint(given)


def given_checkpoint(
    given: GivenModel,
    tokenizer: GivenTokenizer | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: str | None = None,
) -> Checkpoint:
    """What a caller gave, as a checkpoint; a name is loaded.

    Args:
        tokenizer: to take instead of the model's own: in memory, or a folder or hub id.
        dtype, device: as `load`. A model in memory stays as and where it is.

    Raises:
        InputError: something else, or a device for a model that is in memory already. Others as `load`.
    """
    named = None if isinstance(tokenizer, PreTrainedTokenizerBase | None) else str(tokenizer)
    if not is_in_memory(given):
        checkpoint = load(str(given), dtype=dtype, device=device or "cpu", tokenizer=named)
    else:
        checkpoint = in_memory(given)
        here = checkpoint.model.device
        if device is not None and torch.device(device).type != here.type:
            raise InputError(
                f"The model is on {here} already, the device is {device!r}; leave that out, or move the model: "
                "model.to(...)."
            )
        if named is not None:
            raise InputError(
                f"The model is in memory, its tokenizer is {named!r}; expected one in memory too: "
                "tokenizer=AutoTokenizer.from_pretrained(...)."
            )
    own = isinstance(tokenizer, PreTrainedTokenizerBase)
    return Checkpoint(checkpoint.model, tokenizer, checkpoint.source) if own else checkpoint


def _is_finite(value: Tensor) -> bool:
    """Whether a tensor has neither NaN nor Inf. Its sum tells in a tenth of the time, unless it overflows."""
    return bool(value.sum().isfinite()) or bool(value.isfinite().all())


def check_finite(tensors: Mapping[str, Tensor], source: Source, stored: Mapping[str, StoredTensor]) -> None:
    """Raise NumericalError for the first tensor of a loaded model with NaN or Inf in it.

    Args:
        stored: the tensors of its files, which tell a broken file from a dtype that is too narrow.
    """
    for name, value in tensors.items():
        if _is_finite(value):
            continue
        if all(_is_finite(tensor.read()) for tensor in stored.values()):
            raise NumericalError(
                f"{name} in {source.folder} has numbers beyond {torch.finfo(value.dtype).max:g}, the largest of "
                f"{dtype_name(value.dtype)}, in which the model is loaded. {_WIDEN}"
            )
        raise NumericalError(
            f"{name} in {source.folder} holds NaN or Inf; the checkpoint is broken. Download it again."
        )


def check_writable(tensors: Mapping[str, Tensor]) -> None:
    """Raise NumericalError for the first tensor that is to be written with NaN or Inf in it."""
    for name, value in tensors.items():
        if not _is_finite(value):
            raise NumericalError(
                f"{name} would be written with NaN or Inf in {dtype_name(value.dtype)}, which was not done. {_WIDEN}"
            )


def check_device(device: str | torch.device) -> None:
    """Raise InputError for a device that this machine or this torch does not have."""
    try:
        torch.empty(1, device=device).item()  # a meta device has no numbers
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = first_line(error).split(". ")[0]
        if reason.startswith("Expected one of"):  # a list of all kinds of devices that PyTorch has ever had
            reason = "PyTorch knows no such kind"
        raise InputError(
            f"The device {str(device)!r} can't be used ({reason}); expected cpu, or a device at hand such as cuda."
        ) from None


def model_config(source: Source) -> PreTrainedConfig:
    """The config as transformers' class, with sizes that a family here accepts.

    Raises:
        ModelError: not a Mamba-2 model, a quantised one, or sizes that contradict each other.
    """
    file = source.folder / "config.json"
    _check_unquantised(source)
    translated = dialect_named(source.dialect).to_transformers(source.config, str(file))
    model_type = translated["model_type"]
    family = family_named(model_type)
    config_class = type(AutoConfig.for_model(model_type))
    values = checked_config(translated, str(file), config_class)
    try:
        with quiet_transformers():
            config = config_class.from_dict(values)
    except Exception as error:  # transformers' validation raises many classes
        raise ModelError(f"{file} is not a valid {model_type} config: {error}") from None
    config.return_dict = True  # callers here, and the harness, name what they read
    family.layout(config)
    return config


def _check_unquantised(source: Source) -> None:
    for key in _QUANTISATION_KEYS:
        if quantisation := source.config.get(key):
            values = quantisation if isinstance(quantisation, dict) else {"quant_method": quantisation}
            how = values.get("quant_method") or f"{values.get('bits', 'unknown')} bits"
            raise ModelError(
                f"{source.name} is quantised ({key} in config.json: {how}). "
                "Prune or distil the unquantised model, then quantise the result."
            )


def empty_model(config: PreTrainedConfig, most_modules: int = MOST_MODULES) -> PreTrainedModel:
    """The model of a config on the meta device: names and shapes, no memory.

    Raises:
        ModelError: transformers can't build it, it has more modules than ``most_modules``, no Mamba-2 layer, or one of
            a kind that ghostssm does not know.
    """
    from transformers import AutoModelForCausalLM

    import ghostssm.models.own_class.classes  # noqa: F401  (nobody may have, where a config came before the auto classes)

    try:
        with torch.device("meta"), quiet_transformers(), bounded_modules(most_modules):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        mixers_of(model)
    except (ModelError, MemoryError):
        raise
    except Exception as error:  # the faults of a model class share no base class
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ModelError(
            f"transformers can't build a {config.model_type} model from this config ({reason})."
        ) from error
    return model


def checked_tensors(source: Source, config: PreTrainedConfig) -> dict[str, StoredTensor]:
    """The tensors in a source's weight files that make its model, under names that transformers reads; none is loaded.

    Raises:
        ModelError: names and shapes other than the config implies.
    """
    dialect = dialect_named(source.dialect)
    stored = {dialect.to_transformers_name(name): value for name, value in stored_tensors(source.folder).items()}
    model = empty_model(config, _MODULES_PER_TENSOR * (len(stored) + 1))
    places = places_of(model, stored)
    for name in ignored_names(model, places):
        del stored[name], places[name]
    faults = naming_faults(model, stored, places)
    if faults:
        listed = "".join(f"\n  - {fault}" for fault in faults[:_LISTED_FAULTS])
        more = f"\n  and {len(faults) - _LISTED_FAULTS} more" if len(faults) > _LISTED_FAULTS else ""
        raise ModelError(
            f"The weights in {source.folder} contradict its config.json:{listed}{more}\n"
            "Download both again, or correct config.json."
        )
    return stored


def stored_dtype(stored: dict[str, StoredTensor]) -> torch.dtype:
    """The dtype of most numbers; a half-precision checkpoint may keep a few small tensors in float32."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in stored.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + torch.Size(tensor.shape).numel()
    return max(sizes, key=lambda dtype: sizes[dtype])


def tell_narrowed(model: PreTrainedModel, stored: dict[str, StoredTensor], source: Source) -> None:
    """Warn of tensors that are stored wider than the dtype that transformers loads them in."""
    wider = [
        name
        for name, tensor in stored.items()
        if tensor.dtype.itemsize > model.dtype.itemsize and not is_kept_wide(model, name)
    ]
    if wider:
        here, there = (dtype_name(each) for each in (model.dtype, stored[wider[0]].dtype))
        more = f" and {len(wider) - 1} more" if len(wider) > 1 else ""
        warnings.warn(
            f"{wider[0]}{more} of {source.name} {'are' if more else 'is'} stored as {there} in a {here} checkpoint; "
            f"transformers loads {here}, and so is what is written.",
            GhostWarning,
            stacklevel=2,
        )


def _build(
    source: Source, config: PreTrainedConfig, stored: dict[str, StoredTensor], dtype: torch.dtype
) -> PreTrainedModel:
    tensors = {}
    for name, tensor in stored.items():
        value = tensor.read()
        # Widened one by one, so that the narrow ones need not stay.
        tensors[name] = value.to(torch.promote_types(value.dtype, dtype))
    model, report = type(empty_model(config)).from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
    )
    if left := {what: sorted(map(str, names)) for what, names in report.items() if names}:
        raise ModelError(f"transformers can't load {source.folder} as it is, and would fill in random numbers: {left}.")
    settle_ties(model)
    if (generation := read_generation_config(source.folder)) is not None:
        model.generation_config = generation
    return model
