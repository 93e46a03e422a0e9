"""What a caller gave in place of names, opened as a request asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any, TypeVar

import torch

from ghostssm.checkpoint.description import Description, described
from ghostssm.checkpoint.loading import Checkpoint, GivenModel, GivenTokenizer, given_checkpoint, is_in_memory
from ghostssm.errors import unknown_name
from ghostssm.text.coercion import GivenText, given_windows, is_name
from ghostssm.text.windows import Windows
from ghostssm.values import short
from ghostssm.workflows.options import called_with
from ghostssm.workflows.requests import CalibratingRequest, Request

Asked = TypeVar("Asked", bound=Request)


@dataclass(frozen=True)
class Given:
    """What a caller gave in place of names."""

    model: GivenModel
    text: GivenText
    evaluate: GivenText | None
    tokenizer: GivenTokenizer | None
    column: str | None
    device: str | None
    dtype: torch.dtype | None = None

    @property
    def is_at_hand(self) -> bool:
        """Whether the model is in memory."""
        return is_in_memory(self.model)

    @property
    def is_named(self) -> bool:
        """Whether a request can say it all."""
        texts = all(text is None or is_name(text) for text in (self.text, self.evaluate))
        own = self.tokenizer is None or isinstance(self.tokenizer, str | PathLike)
        return texts and own and not self.is_at_hand and self.column is None

    def name(self, part: str) -> str | None:
        """What a request calls a part: its name, or what stands for it until it is known."""
        value = getattr(self, part)
        return None if value is None else str(value) if isinstance(value, str | PathLike) else short(value)

    def described(self) -> Description | None:
        """The model, if it is in memory."""
        if not self.is_at_hand:
            return None
        checkpoint = self.opened()
        return described(checkpoint.model, checkpoint.source.name, checkpoint.source)

    def opened(self) -> Checkpoint:
        return given_checkpoint(self.model, self.tokenizer, dtype=self.dtype, device=self.device)

    def calibration(self, checkpoint: Checkpoint, request: CalibratingRequest) -> Windows:
        """The windows to calibrate on."""
        return self._windows(self.text, checkpoint, request, request.windows, seed=request.seed)

    def held_out(self, checkpoint: Checkpoint, request: CalibratingRequest) -> Windows:
        """The windows to measure the loss on."""
        assert self.evaluate is not None
        return self._windows(self.evaluate, checkpoint, request, request.text_windows, role="evaluation")

    def _windows(
        self, text: GivenText, checkpoint: Checkpoint, request: Request, count: int | None, **how: Any
    ) -> Windows:
        size = checkpoint.model.config.vocab_size
        tables = [each for each in (self.text, self.evaluate) if hasattr(each, "column_names")]
        column = self.column if not tables or hasattr(text, "column_names") else None
        return given_windows(
            text, checkpoint.tokenizer, request.window_length, count, column=column, vocab_size=size, **how
        )


def asked(kind: type[Asked], options: Mapping[str, Any], **named: Any) -> Asked:
    """A request with a caller's options; raises InputError for one that it does not have."""
    own = [each.name for each in fields(kind)]
    free = [name for name in own if name not in named]
    for name in options:
        if name not in free:
            raise unknown_name("option", name, [*free, "text", "evaluate", "column"])
    return called_with(kind, named | dict(options))
