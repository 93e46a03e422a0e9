"""Load a checkpoint of either dialect into transformers' own model class, checked before and after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import GENERATION_CONFIG_NAME

from ghostssm.checkpoint import mamba_ssm
from ghostssm.checkpoint.config_checks import MOST_MODULES, bounded_modules, checked_config
from ghostssm.checkpoint.naming import ignored_names, naming_faults, places_of
from ghostssm.checkpoint.quiet import quiet_transformers
from ghostssm.checkpoint.source import REFERENCE, Source, check_links, find_source
from ghostssm.checkpoint.weights import StoredTensor, stored_tensors
from ghostssm.errors import CONVERT, InputError, ModelError, NumericalError
from ghostssm.families import family_named, mixers_of
from ghostssm.files import is_plain_name, read_json_object

_LISTED_FAULTS = 8
_WIDEN = f"Convert the model to a dtype with a wider range first, `{CONVERT}` (or f32), and take that."
_MODULES_PER_TENSOR = 16
"""Generous: most modules have a weight, shared ones are built several times, and a few hold none."""
_OTHER_MAMBAS = {
    "mamba": "Mamba-1",
    "falcon_mamba": "Mamba-1 (FalconMamba)",
    "jamba": "Mamba-1 (Jamba)",
    "zamba": "Mamba-1 (Zamba)",
    "mamba3": "Mamba-3",
}


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model with the tokenizer and the files that it came from.

    The tokenizer is None where the folder has none; `require_tokenizer` then says what to do.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    source: Source

    def require_tokenizer(self) -> PreTrainedTokenizerBase:
        return required(self.tokenizer, self.source)


def required(tokenizer: PreTrainedTokenizerBase | None, source: Source) -> PreTrainedTokenizerBase:
    """A tokenizer that must be there; raises ModelError if it is not."""
    if tokenizer is None:
        raise ModelError(
            f"{source.folder} holds no tokenizer, which text needs; expected tokenizer.json. "
            "Put it there, or name a tokenizer (a folder or a hub id) with --tokenizer."
        )
    return tokenizer


def load(
    spec: str,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    tokenizer: str | None = None,
) -> Checkpoint:
    """Load a model: a hub id, a local folder in either dialect, or ``reference``.

    Args:
        dtype: of the weights in memory; None keeps the stored one.
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
    stored = checked_tensors(source, config)
    with quiet_transformers():
        model = _build(source, config, stored, dtype or stored_dtype(stored))
    check_finite(model.state_dict(), source, stored)
    return Checkpoint(model.to(device).eval(), load_tokenizer(source, config, tokenizer), source)


def check_finite(tensors: Mapping[str, Tensor], source: Source, stored: Mapping[str, StoredTensor]) -> None:
    """Raise NumericalError for the first tensor of a loaded model with NaN or Inf in it.

    Args:
        stored: the tensors of its files, which tell a broken file from a dtype that is too narrow.
    """
    for name, value in tensors.items():
        if torch.isfinite(value).all():
            continue
        if all(torch.isfinite(tensor.read()).all() for tensor in stored.values()):
            raise NumericalError(
                f"{name} in {source.folder} has numbers beyond {torch.finfo(value.dtype).max:g}, the largest of "
                f"{str(value.dtype).removeprefix('torch.')}, in which the model is loaded. {_WIDEN}"
            )
        raise NumericalError(
            f"{name} in {source.folder} holds NaN or Inf; the checkpoint is broken. Download it again."
        )


def check_writable(tensors: Mapping[str, Tensor]) -> None:
    """Raise NumericalError for the first tensor that is to be written with NaN or Inf in it."""
    for name, value in tensors.items():
        if not torch.isfinite(value).all():
            raise NumericalError(
                f"{name} would be written with NaN or Inf in {str(value.dtype).removeprefix('torch.')}, which was not "
                f"done. {_WIDEN}"
            )


def check_device(device: str | torch.device) -> None:
    """Raise InputError for a device that this machine or this torch does not have."""
    try:
        torch.empty(1, device=device).item()  # a meta device has no numbers
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise InputError(
            f"The device {str(device)!r} can't be used ({reason}); expected 'cpu' or a device at hand."
        ) from None


def model_config(source: Source) -> PreTrainedConfig:
    """The config as transformers' class, with sizes that a family here accepts.

    Raises:
        ModelError: not a Mamba-2 model, a quantised one, or sizes that contradict each other.
    """
    file = source.folder / "config.json"
    if source.dialect == "mamba_ssm":
        return mamba_ssm.to_transformers_config(checked_config(source.config, str(file)))
    model_type = source.config.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError(
            f"{file} has neither a model_type nor an ssm_cfg; expected the config of a "
            "Mamba-2 model in the transformers or the mamba_ssm dialect."
        )
    if model_type in _OTHER_MAMBAS:
        raise ModelError(f"{source.name} is a {_OTHER_MAMBAS[model_type]} model; ghostssm prunes Mamba-2 layers only.")
    if quantisation := source.config.get("quantization_config"):
        how = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation
        raise ModelError(
            f"{source.name} is quantised (quantization_config in config.json: {how}). "
            "Prune the unquantised model, then quantise the result."
        )
    family = family_named(model_type)
    config_class = type(AutoConfig.for_model(model_type))
    values = checked_config(mamba_ssm.without_their_keys(source.config, config_class), str(file), config_class)
    try:
        with quiet_transformers():
            config = config_class.from_dict(values)
    except Exception as error:  # transformers' validation raises many classes
        raise ModelError(f"{file} is not a valid {model_type} config: {error}") from None
    family.layout(config)
    return config


def empty_model(config: PreTrainedConfig, most_modules: int = MOST_MODULES) -> PreTrainedModel:
    """The model of a config on the meta device: names and shapes, no memory.

    Raises:
        ModelError: transformers can't build it, it has more modules than ``most_modules``, no Mamba-2 layer, or one of
            a kind that ghostssm does not know.
    """
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
    stored = stored_tensors(source.folder)
    if source.dialect == "mamba_ssm":
        stored = {mamba_ssm.to_transformers_name(name): value for name, value in stored.items()}
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
    if left := {what: sorted(map(str, found)) for what, found in report.items() if found}:
        raise ModelError(f"transformers can't load {source.folder} as it is, and would fill in random numbers: {left}.")
    if (source.folder / GENERATION_CONFIG_NAME).exists():
        model.generation_config = _generation_config(source.folder / GENERATION_CONFIG_NAME)
    return model


def _generation_config(file: Path) -> GenerationConfig:
    values = checked_config(read_json_object(file, ModelError), str(file))
    try:
        return GenerationConfig.from_dict(values)
    except Exception as error:  # transformers' validation raises many classes
        raise ModelError(f"{file} is not a valid generation config: {error}") from None


def load_tokenizer(source: Source, config: PreTrainedConfig, named: str | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer that a user named, or the model's own, if it has one; raises ModelError if it can't be loaded."""
    own = any((source.folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    place: str | Path | None = named or (source.folder if own else None)
    if named == REFERENCE:
        place = find_source(REFERENCE, weights=False).folder
    if place is None and source.dialect == "mamba_ssm" and 0 <= config.vocab_size - mamba_ssm.GPT_NEOX_TOKENS < 64:
        place = mamba_ssm.GPT_NEOX_TOKENIZER  # what the published state-spaces checkpoints were trained with
    if place is None:
        return None
    tokenizer = _read_tokenizer(place, config if place == source.folder else None)
    highest = max(len(tokenizer) - 1, *tokenizer.get_vocab().values())
    if highest >= config.vocab_size:
        raise ModelError(
            f"The tokenizer {str(place)!r} has {highest + 1} tokens, the model only {config.vocab_size}; "
            "expected the tokenizer that the model was trained with."
        )
    return tokenizer


def _read_tokenizer(place: str | Path, config: PreTrainedConfig | None) -> PreTrainedTokenizerBase:
    """Args: config: of the model in the same place; transformers would read the file again, without what was mended."""
    if Path(place).is_dir():
        check_links(Path(place))
        _check_tokenizer_config(Path(place) / "tokenizer_config.json")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            place, config=config, trust_remote_code=False
        )
        tokenizer("text")
    except (KeyboardInterrupt, SystemExit, MemoryError):  # SIGTERM too
        raise
    except BaseException as error:  # tokenizers, their native code and the hub client raise many classes
        raise ModelError(
            f"The tokenizer {str(place)!r} could not be loaded ({type(error).__name__}); bring its tokenizer.json into "
            f"a folder and name that with --tokenizer."
        ) from error
    return tokenizer


def _check_tokenizer_config(file: Path) -> None:
    """transformers opens the files that ``fast_tokenizer_files`` names."""
    try:
        named = read_json_object(file, ModelError).get("fast_tokenizer_files", [])
    except FileNotFoundError:
        return
    if not isinstance(named, list) or any(not isinstance(name, str) or not is_plain_name(name) for name in named):
        raise ModelError(f"fast_tokenizer_files in {file} is {named!r}; expected plain names of files beside it.")
