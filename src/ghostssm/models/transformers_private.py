"""All names of transformers that are used here and that it does not promise to keep.

A new minor version of transformers may change any of them, which is why `ghostssm.models.registration` refuses those
that were not tried. What imports transformers' model classes, which takes seconds, is imported where it is used.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters
from transformers.utils import logging

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within the context transformers shows errors only; afterwards its settings are as before."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    loud = verbosity != logging.ERROR  # to set it empties the caches of all loggers
    if loud:
        logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if loud:
            logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def rotary_types() -> dict[str, object]:
    """The types of what configs say of rotary embeddings, by key."""
    return dict(RopeParameters.__annotations__)


def tied_weights(model: PreTrainedModel) -> dict[str, str]:
    """A parameter to the one whose weight it shares: the model's own record; what is taken out is untied."""
    ties: dict[str, str] = model.all_tied_weights_keys
    return ties


def left_in_files(model: PreTrainedModel) -> tuple[str, ...]:
    """Patterns of the names of tensors that a model's class leaves in its files for other engines."""
    return tuple(model._keys_to_ignore_on_load_unexpected or ())


def without_ignored(model: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """Names that are no part of a model, without those that transformers' loader is told to ignore."""
    report = SimpleNamespace(missing_keys=set(), unexpected_keys=set(names))
    model._adjust_missing_and_unexpected_keys(report)
    return set(report.unexpected_keys)


def loaded_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, tuple[str, str | None]]:
    """A stored name to the parameter that is made of it, and the pattern of the conversion, if there is one."""
    return _loaded_names(model, names, _conversions_of(model))


def note_layout(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Have `as_stored` write a model in the layout of files with these names; loading a part of them changes nothing.

    transformers notes as much where it loads all at once.
    """
    conversions = _conversions_of(model)
    _loaded_names(model, names, conversions)
    model._weight_conversions = [each for each in conversions if each.was_used()]


def _conversions_of(model: PreTrainedModel) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping

    return list(get_model_conversion_mapping(model))


def _loaded_names(
    model: PreTrainedModel, names: Iterable[str], conversions: Iterable[Any]
) -> dict[str, tuple[str, str | None]]:
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    conversions = list(conversions)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    prefix, state = model.base_model_prefix, model.state_dict()
    loaded = {}
    for name in names:
        parameter, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if parameter not in state and name in state:
            parameter, pattern = rename_source_key(name, [], [], prefix, state)
        loaded[name] = (parameter, pattern)
    return loaded


def as_stored(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model, on any device, as transformers would write them: in an older layout, if it knows one."""
    from transformers.core_model_loading import revert_weight_conversion

    stored: dict[str, Tensor] = revert_weight_conversion(model, dict(tensors))
    return stored


def load_tensors(model: PreTrainedModel, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Put tensors with the names that files have into a model, each in the precision that transformers gives it."""
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    how = LoadStateDictConfig(
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=_conversions_of(model),
    )
    noted = vars(model).get("_weight_conversions")
    with quiet_transformers():
        convert_and_load_state_dict_in_model(model, dict(tensors), how)
    if noted is not None:
        model._weight_conversions = noted


def is_kept_wide(model: PreTrainedModel, name: str) -> bool:
    """Whether transformers keeps a tensor in float32, whatever dtype the model is loaded in."""
    return any(re.search(pattern, name) for pattern in model._get_dtype_plan(model.dtype))


def without_weights(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a config, its parameters on the meta device, its buffers in place."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), quiet_transformers():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    for value in model.state_dict(keep_vars=True).values():
        value._is_hf_initialized = True  # so that only what no file holds gets values
    # The steps of from_pretrained for what is missing in the files.
    model._move_missing_keys_from_meta_to_device(set(), None, None, None)
    model._initialize_missing_keys(is_quantized=False)
    return model.eval()
