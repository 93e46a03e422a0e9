"""Packages that ghostssm can do without until something needs them: what is missing is told in one spelling."""

from __future__ import annotations

from importlib.util import find_spec

from ghostssm.errors import InputError

EXTRAS = {
    "accelerate": "distill",
    "altair": "report",
    "datasets": "distill",
    "gguf": "gguf",
    "lm-eval": "lm-eval",
    "vl-convert-python": "report",
}
"""By package the extra of ghostssm that brings it."""
_MODULES = {"lm-eval": "lm_eval", "vl-convert-python": "vl_convert"}
"""Where a package's module has another name."""


def check_installed(what: str, *packages: str, kind: type[InputError] = InputError) -> None:
    """Raise an InputError, or a kind of it, if something needs packages that are not installed; none is imported."""
    missing = [package for package in packages if find_spec(_MODULES.get(package, package)) is None]
    if missing:
        raise kind(f"{what} {needs_installed(*missing)}")


def check_drawable() -> None:
    """Raise InputError if figures can't be drawn."""
    check_installed("A report", "altair", "vl-convert-python")


def needs_installed(*packages: str) -> str:
    """The end of a sentence about what needs packages that are not installed: the command that installs them."""
    wanted = dict.fromkeys(f"'ghostssm[{EXTRAS[each]}]'" if each in EXTRAS else each for each in packages)
    verb = "is" if len(packages) == 1 else "are"
    return f"needs {' and '.join(packages)}, which {verb} not installed: pip install {' '.join(wanted)}."
