"""The tokenizer of a model: read as its own files say, and carried over as they are.

Where no file names a class, transformers takes the one that is usual for the model's type, and most classes build anew
how text is cut and joined, whatever tokenizer.json says of it. That file is what the model was trained with; it alone
decides here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import (
    AutoTokenizer,
    LlamaTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import is_protobuf_available, is_sentencepiece_available

from ghostssm.checkpoint.dialects import dialect_named
from ghostssm.checkpoint.place import REFERENCE
from ghostssm.checkpoint.source import Source, check_links, find_source
from ghostssm.errors import ModelError
from ghostssm.extras import needs_installed
from ghostssm.files.reading import confined, is_plain_name, read_json_object
from ghostssm.models.transformers_private import quiet_transformers
from ghostssm.network import hub_answers

_FILE = "tokenizer.json"
_MODEL_FILE = "tokenizer.model"
_CONFIG_FILE = "tokenizer_config.json"
_ANY_CLASS = "PreTrainedTokenizerFast"
"""Reads tokenizer.json as it is, in every version of transformers."""
_FILES = (
    *("tokenizer*.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tekken.json"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
)
"""All that transformers, in any version, and converters read of a tokenizer."""
_SAMPLE = (
    " The  state's 12345 spaces,\n\n\ttabs\r\n Àéü e\u0301 ﬁ 日本語 😀 don't I'LL "
    "__init__(self):\n        x\u00a0= '';  "
)
"""What tokenizers differ in: spaces, line breaks, digits, apostrophes, accents, Unicode forms, bytes."""


def required(tokenizer: PreTrainedTokenizerBase | None, source: Source) -> PreTrainedTokenizerBase:
    """A tokenizer that must be there; raises ModelError if it is not."""
    if tokenizer is None and not source.has_files:
        raise ModelError(
            "The model came without a tokenizer, which text needs; give one along: "
            "ghostssm.Checkpoint(model, AutoTokenizer.from_pretrained(...)), or tokenizer=... where that is taken."
        )
    if tokenizer is None:
        raise ModelError(
            f"{source.folder} holds no tokenizer, which text needs; expected tokenizer.json. "
            "Put it there, or name a tokenizer (a folder or a hub id) with --tokenizer."
        )
    return tokenizer


def load_tokenizer(source: Source, config: PreTrainedConfig, named: str | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer that a user named, or the model's own, if it has one; raises ModelError if it can't be loaded."""
    own = any((source.folder / name).exists() for name in (_FILE, _MODEL_FILE, "vocab.json"))
    place: str | Path | None = named or (source.folder if own else None)
    if named == REFERENCE:
        place = find_source(REFERENCE, weights=False).folder
    place = place or dialect_named(source.dialect).default_tokenizer(config.vocab_size)
    if place is None:
        return None
    tokenizer = _read(Path(place) if Path(place).is_dir() else _download(str(place)), source.config)
    highest = max(len(tokenizer) - 1, *tokenizer.get_vocab().values())
    if highest >= config.vocab_size:
        raise ModelError(
            f"The tokenizer {str(place)!r} has {highest + 1} tokens, the model only {config.vocab_size}; "
            "expected the tokenizer that the model was trained with."
        )
    return tokenizer


def carry_tokenizer(tokenizer: PreTrainedTokenizerBase, source: Source, folder: Path) -> None:
    """Write a tokenizer into a folder that has its config.json already.

    The files that it was read from are copied as they are. Only where these have no tokenizer.json, or the tokenizer
    was changed since, are they written anew. tokenizer_config.json then names a class by which transformers reads the
    same, if it did not.
    """
    origin = Path(tokenizer.name_or_path) if tokenizer.name_or_path else None  # empty if made in memory
    if origin is None or not (origin / _FILE).is_file() or _was_changed(tokenizer, origin, source.config):
        tokenizer.save_pretrained(folder)
    if origin is not None and origin.is_dir():
        for path in (path for pattern in _FILES for path in origin.glob(pattern)):
            target = folder / path.relative_to(origin)
            if not target.exists():
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(confined(path, ModelError), target)
    if (folder / _FILE).is_file() and not (_class_of(folder) and _transformers_agrees(tokenizer, folder)):
        _name_class(tokenizer, folder / _CONFIG_FILE)


def renamed_class(tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> str | None:
    """A note that `carry_tokenizer` had to name another class in tokenizer_config.json; None if it had not."""
    if tokenizer is None or not (folder / _CONFIG_FILE).is_file() or not tokenizer.name_or_path:
        return None
    origin = Path(tokenizer.name_or_path)
    now, before = _class_of(folder), _class_of(origin)
    if now != _ANY_CLASS or before == now or not (origin / _FILE).is_file():
        return None
    why = f"names {before}, by which transformers reads it otherwise" if before else "has no word on its class"
    return (
        f"tokenizer.json is read as it stands; {origin} {why}, so the output's tokenizer_config.json names {_ANY_CLASS}"
    )


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        wanted, local = ["config.json", *_FILES], not hub_answers()
        return Path(snapshot_download(hub_id, allow_patterns=wanted, local_files_only=local))
    except Exception as error:  # the hub client's faults share no base class
        raise ModelError(
            f"The tokenizer {hub_id!r} is no local folder and could not be fetched from the hub "
            f"({type(error).__name__}); bring its tokenizer.json into a folder and name that with --tokenizer."
        ) from error


def _read(folder: Path, model: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder; ``model`` is the config.json that names special tokens where the folder does not."""
    check_links(folder)
    _check_tokenizer_config(folder / _CONFIG_FILE)
    reader = _reader(folder)
    try:
        with quiet_transformers():
            tokenizer: PreTrainedTokenizerBase = reader.from_pretrained(folder, trust_remote_code=False)
        tokenizer(_SAMPLE)
    except (KeyboardInterrupt, SystemExit, MemoryError):  # SIGTERM too
        raise
    except BaseException as error:  # tokenizers and their native code raise many classes
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise ModelError(
            f"The tokenizer {str(folder)!r} could not be loaded ({reason}); bring its tokenizer.json again, or name "
            "a folder that holds a whole one with --tokenizer."
        ) from error
    if isinstance(tokenizer, LlamaTokenizer):
        _check_against_sentencepiece(tokenizer, folder / _MODEL_FILE)
    _name_special_tokens(tokenizer, model)
    return tokenizer


def _reader(folder: Path) -> Any:
    """The class that reads what is there.

    Raises:
        ModelError: nothing that is whole, or nothing that says how text is cut.
    """
    if (folder / _FILE).exists():
        return PreTrainedTokenizerFast
    if (folder / _MODEL_FILE).exists():
        missing = [
            package
            for package, there in (
                ("sentencepiece", is_sentencepiece_available()),
                ("protobuf", is_protobuf_available()),
            )
            if not there
        ]
        if missing:
            raise ModelError(
                f"{folder} has its tokenizer as tokenizer.model only, which {needs_installed(*missing)} Or bring its "
                "tokenizer.json."
            )
        return AutoTokenizer if _class_of(folder) else LlamaTokenizer
    if _class_of(folder):
        return AutoTokenizer
    raise ModelError(
        f"{folder} holds no tokenizer.json, and no file there names the tokenizer's class (tokenizer_class in "
        "tokenizer_config.json), so that nothing says how text is cut. Bring its tokenizer.json, or name another "
        "folder with --tokenizer."
    )


def _check_against_sentencepiece(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Raise ModelError unless transformers' class gives the ids that sentencepiece, whose file it is, gives."""
    from sentencepiece import SentencePieceProcessor

    words = [piece[1:] for piece in tokenizer.get_vocab() if piece.startswith("\u2581") and piece[1:].isalpha()]
    text = " ".join([_SAMPLE.strip(), *sorted(words)])
    if tokenizer.encode(text, add_special_tokens=False) != SentencePieceProcessor(model_file=str(file)).encode(text):
        raise ModelError(
            f"transformers gives other ids than sentencepiece does by {file}; bring the tokenizer.json that belongs to "
            "the model, or name a folder that holds it with --tokenizer."
        )


def _class_of(folder: Path) -> str | None:
    """The class that a folder names for its tokenizer, where no code of its own has to define it."""
    own, model = (_entries(folder / name) for name in (_CONFIG_FILE, "config.json"))
    name = own.get("tokenizer_class") or model.get("tokenizer_class")
    return name if isinstance(name, str) and "auto_map" not in own else None


def _entries(file: Path) -> dict[str, Any]:
    try:
        return read_json_object(file, ModelError)
    except FileNotFoundError:
        return {}


def _check_tokenizer_config(file: Path) -> None:
    """transformers opens the files that ``fast_tokenizer_files`` names."""
    named = _entries(file).get("fast_tokenizer_files", [])
    if not isinstance(named, list) or any(not isinstance(name, str) or not is_plain_name(name) for name in named):
        raise ModelError(f"fast_tokenizer_files in {file} is {named!r}; expected plain names of files beside it.")


def _name_special_tokens(tokenizer: PreTrainedTokenizerBase, model: Mapping[str, Any]) -> None:
    """Take the ends of text from the model's config where the tokenizer's files name none.

    Only tokens that are special already: to make another one special would change how text is cut.
    """
    special = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    for name in ("bos", "eos", "pad"):
        index = model.get(f"{name}_token_id")
        index = index[0] if isinstance(index, list) and index else index
        if getattr(tokenizer, f"{name}_token") is None and isinstance(index, int) and index in special:
            setattr(tokenizer, f"{name}_token", special[index])


def _was_changed(tokenizer: PreTrainedTokenizerBase, origin: Path, model: Mapping[str, Any]) -> bool:
    """Whether a tokenizer is no longer what its folder holds: its tokens, the special ones, chat templates."""
    try:
        stored = _read(origin, model)
    except ModelError:
        return True
    same = all(getattr(tokenizer, name) == getattr(stored, name) for name in ("special_tokens_map", "chat_template"))
    return not same or tokenizer.get_vocab() != stored.get_vocab()


def _transformers_agrees(tokenizer: PreTrainedTokenizerBase, folder: Path) -> bool:
    """Whether transformers makes the same of the files in a folder."""
    try:
        with quiet_transformers():
            other = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        ids, others = tokenizer.encode(_SAMPLE), other.encode(_SAMPLE)
        return len(other) == len(tokenizer) and ids == others and other.decode(ids) == tokenizer.decode(ids)
    except Exception:  # what it raises shares no base class
        return False


def _name_class(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Have tokenizer_config.json name the class that reads tokenizer.json as it is, and the special tokens."""
    entries = _entries(file)
    entries.pop("auto_map", None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if name.endswith("_token")}
    entries |= {name: token for name, token in special.items() if not entries.get(name)}
    # Older versions would take spaces away before punctuation, and return a third tensor that generate refuses.
    defaults = {"clean_up_tokenization_spaces": False, "model_input_names": ["input_ids", "attention_mask"]}
    entries = defaults | entries | {"tokenizer_class": _ANY_CLASS}
    file.write_text(json.dumps(entries, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
