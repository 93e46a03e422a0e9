"""llama.cpp, called through llama-cpp-python's low-level interface: token ids in, logits out."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch

_ERROR = 4
"""ggml's level of error messages."""


@llama_cpp.llama_log_callback
def _only_errors(level: int, text: bytes, _: Any) -> None:
    if level == _ERROR:
        sys.stderr.write(text.decode())


class Llama:
    """A model with room for some sequences of some length; every position's logits are kept, and keys
    and values are float32."""

    def __init__(self, path: Path, sequences: int = 1, length: int = 256, threads: int = 2):
        llama_cpp.llama_log_set(_only_errors, ctypes.c_void_p(0))
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        assert model, path
        self.model = model
        self.vocabulary = llama_cpp.llama_model_get_vocab(model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(self.vocabulary)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = sequences * max(length, 256)
        settings.n_batch = settings.n_ubatch = max(length, sequences)
        settings.n_seq_max = sequences
        settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
        settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.n_threads = settings.n_threads_batch = threads
        context = llama_cpp.llama_init_from_model(model, settings)
        assert context, path
        self.context = context

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *_: object) -> None:
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def decode(self, ids: Sequence[int], positions: Sequence[int], sequences: Sequence[int]) -> np.ndarray:
        """(count, vocabulary), of token i at its position of its sequence."""
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, (token, position, sequence) in enumerate(zip(ids, positions, sequences, strict=True)):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, True
            batch.seq_id[i][0] = sequence
        assert llama_cpp.llama_decode(self.context, batch) == 0
        llama_cpp.llama_batch_free(batch)
        logits = llama_cpp.llama_get_logits(self.context)
        return np.ctypeslib.as_array(logits, shape=(len(ids), self.vocab_size)).copy()

    def prefill(self, ids: Sequence[int]) -> torch.Tensor:
        """(l, vocabulary): all positions at once."""
        self.clear()
        return torch.from_numpy(self.decode(ids, range(len(ids)), [0] * len(ids)))

    def token_by_token(self, ids: Sequence[int]) -> torch.Tensor:
        """(l, vocabulary): one position after the other."""
        self.clear()
        return torch.from_numpy(np.concatenate([self.decode([token], [i], [0]) for i, token in enumerate(ids)]))

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        raw = text.encode()
        room = len(raw) + 8
        ids = (llama_cpp.llama_token * room)()
        count = llama_cpp.llama_tokenize(self.vocabulary, raw, len(raw), ids, room, add_special, parse_special)
        return list(ids[:count])
