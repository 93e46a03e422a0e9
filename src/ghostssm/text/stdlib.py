"""The running Python's own standard library as a text corpus: real text that every machine already has.

Modules are split by a hash of their name, so that the split is the same on every machine and for every Python version:
one module in eight is held out for evaluation, the rest serve training and calibration.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from ghostssm.errors import TextError

HELD_OUT_ONE_IN = 8
# Left out: test suites (many distributions strip them), generated tables, and packages that newer Pythons dropped.
_SKIPPED = frozenset(
    {
        "__pycache__",
        "config",
        "dist-packages",
        "distutils",
        "encodings",
        "ensurepip",
        "idlelib",
        "lib-dynload",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)


def is_held_out(module: str) -> bool:
    """Whether a top-level module belongs to the evaluation side. ``test_json`` goes where ``json`` goes."""
    digest = hashlib.sha256(module.removeprefix("test_").encode()).digest()
    return digest[0] % HELD_OUT_ONE_IN == 0


def stdlib_texts(held_out: bool, tests: bool = False) -> list[str]:
    """The sources of one side of the split, one text per file, in the order of their paths.

    Args:
        held_out: the evaluation side, or the training and calibration side.
        tests: add the library's own test suite, where it is installed (more text to train on).

    Raises:
        TextError: no standard library sources are installed.
    """
    root = Path(sysconfig.get_path("stdlib"))
    texts = [
        path.read_text(encoding="utf-8", errors="replace")
        for module, path in _sources(root, tests)
        if is_held_out(module) == held_out
    ]
    if not texts:
        raise TextError(
            f"No Python sources under {root}; expected the standard library as .py files. "
            "Name a text file instead of 'stdlib'."
        )
    return texts


def _sources(root: Path, tests: bool) -> Iterator[tuple[str, Path]]:
    """(top-level module, file), sorted by path."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if tests and parts[0] == "test" and len(parts) > 1:
            module = parts[1].removesuffix(".py")
        elif _SKIPPED.isdisjoint(parts):
            module = parts[0].removesuffix(".py")
        else:
            continue
        yield module, path
