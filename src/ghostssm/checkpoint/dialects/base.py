"""What the rest of the project needs to know of a dialect, and the registry of dialects.

A dialect is how a model's config.json and tensors are called. Everything here works on transformers' own classes, so a
dialect is a translation to transformers' words and back. One that is registered is found and loaded everywhere, and
written where it is named.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import ChainMap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ghostssm.errors import unknown_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Dialect(ABC):
    """One dialect. Dialects are stateless.

    Attributes:
        name: as users give it. library: whose checkpoints these are, by the name that the hub has for it.
        holds_hybrids: whether it has models with other layers between the Mamba-2 ones. holds_own_class: whether it has
            ghostssm's own class, for projected states or a state size per layer.
        ties_heads: whether a head that is tied to the embeddings is not stored.
        has_shards: whether its weights are transformers' own shards, so that files of blocks are put together by
            moving them. keeps_unread: whether tensors that transformers' class does not load have a place in it.
        translated_keys: from keys of its config (``OBJECT.KEY`` within an object) to transformers' keys for the same.
        implied_keys: transformers' keys that its config needs no key for.
    """

    name: ClassVar[str]
    library: ClassVar[str]
    holds_hybrids: ClassVar[bool]
    holds_own_class: ClassVar[bool]
    ties_heads: ClassVar[bool]
    has_shards: ClassVar[bool]
    keeps_unread: ClassVar[bool]
    translated_keys: ClassVar[Mapping[str, str]] = {}
    implied_keys: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def recognises(self, config: Mapping[str, Any], folder: Path) -> bool:
        """Whether a config.json is in this dialect; its folder, where the config leaves it open."""

    @abstractmethod
    def to_transformers(self, config: dict[str, Any], where: str) -> dict[str, Any]:
        """A config.json in transformers' words; raises ModelError, naming ``where``, for what these can't say."""

    @abstractmethod
    def from_transformers(
        self, model: PreTrainedModel, base: Mapping[str, Any] | None, carried: bool
    ) -> dict[str, Any]:
        """The config.json of a model.

        Args:
            base: the config.json that it came from, if that was in this dialect. carried: whether what transformers'
                class does not load is written too.
        """

    def to_transformers_name(self, name: str) -> str:
        """Of a stored tensor, with or without the base model's prefix."""
        return name

    @abstractmethod
    def write_weights(self, model: PreTrainedModel, folder: Path) -> None:
        """Write a model's weights, and nothing else that is left there."""

    @abstractmethod
    def how_to_load(self, own_class: bool) -> str:
        """For a model card: code that loads the folder PATH, and what is needed for it, in Markdown."""

    def default_tokenizer(self, vocab_size: int) -> str | None:
        """The hub id of the tokenizer of a model whose folder has none, if that is known."""
        return None


_DIALECTS: dict[str, Dialect] = {}


def register(dialect: Dialect) -> None:
    """Make a dialect known. The one that was registered last is asked first whether a config is its own."""
    _DIALECTS[dialect.name] = dialect


def dialect_named(name: str) -> Dialect:
    """The dialect of a name; raises InputError if there is none."""
    try:
        return _DIALECTS[name]
    except KeyError:
        raise unknown_name("dialect", name, _DIALECTS) from None


def dialect_of(config: Mapping[str, Any], folder: Path) -> str:
    """The name of the dialect of a folder's config.json."""
    return next(dialect.name for dialect in reversed(_DIALECTS.values()) if dialect.recognises(config, folder))


def translated_keys() -> Mapping[str, str]:
    """The translated keys of all dialects: a conversion may leave keys of one in a config of another."""
    return ChainMap(*(dict(dialect.translated_keys) for dialect in _DIALECTS.values()))
