"""A transformers tokenizer in GGUF: byte-level BPE, with the name of llama.cpp's own pre-tokenizer.

llama.cpp cuts text by regular expressions that are compiled into it, one set per name. A tokenizer is accepted where
one of these sets cuts as its own pre-tokenizer does; the table names them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from reprlib import repr as short
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ghostssm.errors import ModelError
from ghostssm.files.reading import read_json_object

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTE_LEVEL_GPT2, _BYTE_LEVEL = "ByteLevel with its own pattern", "ByteLevel"

# What a tokenizer does before its merges, step by step, and whether it takes whole words from the vocabulary first
# (ignore_merges), to llama.cpp's name for the same.
_PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    ((_BYTE_LEVEL_GPT2,), False): "gpt-2",
    (("single digits", _BYTE_LEVEL_GPT2), False): "starcoder",
    ((_LLAMA3, _BYTE_LEVEL), True): "llama-bpe",
    ((_LLAMA3, _BYTE_LEVEL), False): "smaug-bpe",
    ((_QWEN2, _BYTE_LEVEL), False): "qwen2",
}
_DEFAULT_TEMPLATE = "default"
_NO_MERGE = "[none] [none]"
"""Stands for an empty list of merges, which GGUF can't hold: both sides are longer than any symbol can become."""


@dataclass(frozen=True)
class Vocabulary:
    """What GGUF stores of a tokenizer.

    Attributes:
        pre: llama.cpp's name of the pre-tokenizer.
        tokens, types: of every id of the model, with llama.cpp's token types.
        merges: pairs with a space between, best first.
        special: bos, eos, unk and pad to their ids, where there are any.
        add_bos, add_eos: whether encoding a text adds them.
        chat_templates: by name, of letters, digits and underscores; "default" is the one for those who name none.
        notes: where llama.cpp may give other ids than transformers.
    """

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    chat_templates: Mapping[str, str]
    notes: tuple[str, ...]

    def write(self, writer: Any) -> None:
        """Write the keys into a ``gguf.GGUFWriter``."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        for name, index in self.special.items():
            getattr(writer, f"add_{name}_token_id")(index)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        self._write_chat_templates(writer)

    def _write_chat_templates(self, writer: Any) -> None:
        """Under the keys of llama.cpp's converter."""
        import gguf

        keys = gguf.Keys.Tokenizer
        named = {name: text for name, text in self.chat_templates.items() if name != _DEFAULT_TEMPLATE}
        for name, template in named.items():
            writer.add_string(keys.CHAT_TEMPLATE_N.format(name=name), template)
        if named:
            writer.add_array(keys.CHAT_TEMPLATES, sorted(named))
        if _DEFAULT_TEMPLATE in self.chat_templates:
            writer.add_string(keys.CHAT_TEMPLATE, self.chat_templates[_DEFAULT_TEMPLATE])


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> Vocabulary:
    """What GGUF stores of a tokenizer.

    Args:
        config: of the model. It has the number of ids, and the end of text for a tokenizer that names none.

    Raises:
        ModelError: llama.cpp has no tokenizer that gives the same ids; says which part it lacks.
    """
    parts = _parts(tokenizer)
    model, size, eos = parts["model"], config.vocab_size, config.eos_token_id
    notes = _check_normalizer(parts)
    pre = _pre_tokenizer(parts)
    add_bos, add_eos = _added_ends(tokenizer)
    tokens, types = _tokens(parts, size)
    for token in parts["added_tokens"]:
        bound = [flag for flag in ("lstrip", "rstrip", "single_word") if token[flag]]
        if bound:
            notes.append(f"the added token {token['content']!r} is {' and '.join(bound)}, which llama.cpp ignores")
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    if ids["eos"] is None:
        ids["eos"] = eos[0] if isinstance(eos, list) else eos
    special = {name: index for name, index in ids.items() if index is not None and index < size}
    if "eos" not in special:
        notes.append("neither tokenizer nor config names an end-of-text token; llama.cpp will take token 11 for it")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    templates: dict[str, str] = {}
    for name, template in _chat_templates(tokenizer).items():
        plain = re.sub("[^A-Za-z0-9]", "_", name)  # as llama.cpp's converter has it
        if templates.setdefault(plain, template) != template:
            notes.append(f"the chat template {name!r} is left out: in GGUF another one has the name {plain}")
    return Vocabulary(pre, tokens, types, merges or [_NO_MERGE], special, add_bos, add_eos, templates, tuple(notes))


def _chat_templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """A tokenizer's chat templates by name, wherever its files have them.

    transformers reads those in tokenizer_config.json, chat_template.jinja and additional_chat_templates/, and of
    models that take text alone not the older chat_template.json, which llama.cpp's converter reads.
    """
    templates = tokenizer.chat_template
    older = Path(tokenizer.name_or_path) / "chat_template.json"
    if not templates and older.is_file():
        templates = read_json_object(older, ModelError).get("chat_template")
    if isinstance(templates, str):
        templates = {_DEFAULT_TEMPLATE: templates}
    if isinstance(templates, list):
        templates = {entry.get("name"): entry.get("template") for entry in templates if isinstance(entry, dict)}
    templates = templates or {}
    if not isinstance(templates, dict) or not all(isinstance(part, str) for pair in templates.items() for part in pair):
        raise ModelError(
            f"The chat templates of {tokenizer.name_or_path} are {short(templates)}; expected texts by name."
        )
    return templates


def _refused(what: str) -> ModelError:
    return ModelError(
        f"The tokenizer {what}, which llama.cpp does not have for byte-level BPE; text would get other ids there. "
        "Name another tokenizer with --tokenizer, or export without one (--no-tokenizer) and tokenize elsewhere."
    )


def _parts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refused(f"({type(tokenizer).__name__}) is not one of the tokenizers library's")
    parts: dict[str, Any] = json.loads(backend.to_str())
    model = parts["model"]
    if model["type"] != "BPE":
        raise _refused(f"is a {model['type']} model")
    if model.get("byte_fallback"):
        raise _refused("is a SentencePiece-style BPE with byte fallback")
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(name):
            raise _refused(f"sets {name} = {model[name]!r}")
    return parts


def _flat(part: dict[str, Any] | None, key: str) -> Iterator[dict[str, Any]]:
    """The steps of a part that may be missing, one step, or a sequence."""
    if part is None:
        return
    if part["type"] == "Sequence":
        for inner in part[key]:
            yield from _flat(inner, key)
    else:
        yield part


def _check_normalizer(parts: dict[str, Any]) -> list[str]:
    steps = [step["type"] for step in _flat(parts["normalizer"], "normalizers")]
    if any(step != "NFC" for step in steps):
        raise _refused(f"normalises text with {' and '.join(steps)}")
    note = "the tokenizer brings text into Unicode form NFC first and llama.cpp does not: hand it text in NFC"
    return [note] if steps else []


def _pre_tokenizer(parts: dict[str, Any]) -> str:
    steps = tuple(_step_name(step) for step in _flat(parts["pre_tokenizer"], "pretokenizers"))
    ignores_merges = bool(parts["model"].get("ignore_merges"))
    name = _PRE_TOKENIZERS.get((steps, ignores_merges))
    if name is None:
        whole = " with ignore_merges" if ignores_merges else ""
        raise _refused(f"cuts text by {' then '.join(steps) or 'nothing at all'}{whole}")
    return name


def _step_name(step: dict[str, Any]) -> str:
    """One step of a pre-tokenizer, in the words of the table; anything else as it is, which the table lacks."""
    plain = {
        "ByteLevel": not step.get("add_prefix_space"),
        "Digits": step.get("individual_digits"),
        "Split": step.get("behavior") == "Isolated" and not step.get("invert") and "Regex" in step.get("pattern", {}),
    }
    if not plain.get(step["type"]):
        return json.dumps(step)
    if step["type"] == "ByteLevel":
        return _BYTE_LEVEL_GPT2 if step["use_regex"] else _BYTE_LEVEL
    return "single digits" if step["type"] == "Digits" else str(step["pattern"]["Regex"])


def _added_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether encoding puts bos before a text and eos after it, found by doing it."""
    inner = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a")
    for bos, eos in product((False, True), repeat=2):
        if whole == [tokenizer.bos_token_id] * bos + inner + [tokenizer.eos_token_id] * eos:
            return bos, eos
    raise _refused(f"encodes 'a' as {whole}, more than a beginning and an end of text around {inner}")


def _tokens(parts: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Text and type of every id; ids beyond the tokenizer's are unused, as in a vocabulary padded for speed."""
    import gguf

    normal, control = int(gguf.TokenType.NORMAL), int(gguf.TokenType.CONTROL)
    by_id = {index: (token, normal) for token, index in parts["model"]["vocab"].items()}
    for token in parts["added_tokens"]:
        by_id[token["id"]] = (token["content"], control if token["special"] else int(gguf.TokenType.USER_DEFINED))
    if max(by_id) >= size:
        raise ModelError(
            f"The tokenizer has the id {max(by_id)}, the model only ids up to {size - 1}. "
            "Name the model's with --tokenizer."
        )
    tokens, types = [], []
    for index in range(size):
        token, kind = by_id.get(index, (f"[PAD{index}]", int(gguf.TokenType.UNUSED)))
        tokens.append(token)
        types.append(kind)
    if len(set(tokens)) < size:
        twice = next(token for token in tokens if tokens.count(token) > 1)
        raise ModelError(
            f"The tokenizer has the token {twice!r} twice; llama.cpp expects every token once. "
            "Export with --no-tokenizer."
        )
    return tokens, types
