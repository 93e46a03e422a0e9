"""The registry of families, and what is asked of any model: its family, its mixers, whether it is plain."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedConfig

from ghostssm.errors import InputError, ModelError
from ghostssm.models.families.family import Family
from ghostssm.models.layout import SSDLayout
from ghostssm.models.mixer import Mixer

_FAMILIES: dict[str, Family] = {}
_MERGE = "Merge the adapters into the model first: model = model.merge_and_unload()."


def register(family: Family) -> None:
    _FAMILIES[family.model_type] = family


def supported_model_types() -> tuple[str, ...]:
    return tuple(sorted(_FAMILIES))


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a config.

    Raises:
        ModelError: no family here has that model type.
    """
    return family_named(config.model_type)


def family_named(model_type: str) -> Family:
    """The family of a ``model_type``; raises as `family_of`."""
    try:
        return _FAMILIES[model_type]
    except KeyError:
        raise ModelError(
            f"The model type is {model_type!r}, in which ghostssm knows no Mamba-2 layers; "
            f"expected one of: {', '.join(supported_model_types())}."
        ) from None


def layout_of(config: PreTrainedConfig) -> SSDLayout:
    """The sizes of a model's mixers, from its config alone; raises ModelError for a config without them."""
    return family_of(config).layout(config)


def check_model(model: object) -> None:
    """Raise InputError unless something is a transformers model, on one device."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        merge = f" {_MERGE}" if hasattr(model, "merge_and_unload") else ""
        raise InputError(
            f"Found a {type(model).__name__} in place of a model; expected a transformers model, such as the .model of "
            f"what ghostssm.load returns.{merge}"
        )
    devices = {str(device) for device in getattr(model, "hf_device_map", {}).values()}
    if len(devices) > 1:
        raise InputError(
            f"The model lies on several devices ({', '.join(sorted(devices))}); expected one, as ghostssm.load has it. "
            "What is larger than that can be pruned in parts: ghostssm.prune_streamed."
        )


def check_plain(model: nn.Module) -> None:
    """Raise ModelError if a model has adapters, or quantised layers where a plan would cut weights.

    Such a model runs, but slices of its weights are not the weights of a smaller model. Other errors as `mixers_of`.
    """
    check_model(model)
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):  # peft's layers, and those of others who follow it
            raise ModelError(
                f"{name} is a {_full_name(module)} around another layer, as adapters are; expected the layer alone. "
                f"{_MERGE}"
            )
    for mixer in mixers_of(model):
        for part, plain in (("in_proj", nn.Linear), ("conv1d", nn.Conv1d), ("out_proj", nn.Linear)):
            layer = getattr(mixer, part)
            if type(layer) is not plain:
                raise ModelError(
                    f"{mixer.name}.{part} is a {_full_name(layer)}; expected torch's {plain.__name__} "
                    "with floating-point weights. Prune the unquantised model, then quantise the result."
                )


def _full_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def mixers_of(model: nn.Module) -> list[Mixer]:
    """Every Mamba-2 mixer of a model, front to back.

    Raises:
        InputError: it is no transformers model.
        ModelError: no family here has the model's type, there is no mixer in it, or one of an unknown kind.
    """
    check_model(model)
    family = family_of(model.config)
    of_blocks = (family.mixer(block, index) for index, block in enumerate(family.blocks(model)))
    mixers = [mixer for mixer in of_blocks if mixer is not None]
    if not mixers:
        raise ModelError(
            f"None of the {len(family.blocks(model))} layers of this {family.model_type} model is a Mamba-2 layer, "
            "so there is no state to prune; expected a layer pattern that has some."
        )
    return mixers
