"""Out of memory: how to recognise it, and which options of a verb take less."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping

_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; on a CPU PyTorch has no class of its own for it."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)


def out_of_memory_message(error: BaseException, options: Mapping[str, object]) -> str:
    """The message for the person at the terminal; ``options`` are the verb's arguments."""
    reason = str(error).splitlines()[0] if str(error) else "allocation failed"
    ways = ", ".join(_ways_to_lower(options))
    advice = f"What lowers it: {ways}." if ways else "It takes a machine with more."
    resumable = options.get("stream") and "resume" in options
    left = "what is done is kept for --resume" if resumable else "nothing half-written is left"
    return f"Out of memory; {left}. {advice} ({reason})"


def _ways_to_lower(options: Mapping[str, object]) -> Iterator[str]:
    """Options of the verb that take less memory with another value."""
    if options.get("stream") is False:
        yield "--stream"
    if options.get("stream") and options["offload"] is None:
        yield "--offload FOLDER"
    if "windows" in options:
        yield f"fewer --windows (now {options['windows']})"
    if "window_length" in options:
        yield f"a shorter --window-length (now {options['window_length']})"
    if options.get("refit") or _refits_by_itself(options):
        yield "--refit 0"
    batches = options.get("batches")
    if isinstance(batches, list) and options.get("report", True):
        yield f"smaller --batch (now {' '.join(map(str, batches))})"
    if "prompt_length" in options:
        yield f"a shorter --prompt-length (now {options['prompt_length']})"


def _refits_by_itself(options: Mapping[str, object]) -> bool:
    """Whether the recipe has a refit that --refit did not ask for."""
    return "refit" in options and options["refit"] is None and "+refit" in str(options["recipe"])
