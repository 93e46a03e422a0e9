"""Out of memory: how it shows, and which options of a verb lower what it takes."""

from __future__ import annotations

import errno
from collections.abc import Mapping

# By the option's name in a verb's arguments, what to do about it; what is switched on or grows with it.
_LOWERS = {
    "stream": "--stream",
    "offload": "--offload FOLDER",
    "windows": "fewer --windows (now {value})",
    "window_length": "a shorter --window-length (now {value})",
    "refit": "--refit 0",
    "batch": "smaller --batch (now {value})",
    "prompt_length": "a shorter --prompt-length (now {value})",
}
_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; on a CPU PyTorch has no class of its own for it."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)


def out_of_memory_message(error: BaseException, options: Mapping[str, object]) -> str:
    """One message; ``options`` are the verb's arguments."""
    reason = str(error).splitlines()[0] if str(error) else "allocation failed"
    lowers = [text.format(value=_shown(options[name])) for name, text in _LOWERS.items() if _counts(name, options)]
    advice = f"What lowers it: {', '.join(lowers)}." if lowers else "It takes a machine with more."
    left = "what is done is kept for --resume" if _resumable(options) else "nothing half-written is left"
    return f"Out of memory; {left}. {advice} ({reason})"


def _resumable(options: Mapping[str, object]) -> bool:
    return options.get("stream") is True and "resume" in options


def _counts(name: str, options: Mapping[str, object]) -> bool:
    """Whether an option can be lowered in this call."""
    if name == "stream":
        return options.get(name) is False
    if name == "offload":
        return options.get("stream") is True and options.get(name) is None
    if name == "batch" and options.get("with_report") is False:
        return False
    if name == "refit" and options.get(name) is None:
        method = options.get("method", "")  # no method is the default recipe, which refits
        return method is None or "+refit" in str(method)
    return name in options and options[name] != 0


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
