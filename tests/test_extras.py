"""What is not installed is told in one spelling, which names extras that there are."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

from ghostssm.errors import InputError, TextError
from ghostssm.extras import EXTRAS, check_installed, needs_installed

ROOT = Path(__file__).parents[1]
_SPELLING = re.compile(r"pip install\s+'ghostssm\[([\w-]+)\]'")


def test_every_extra_brings_its_packages() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for package, extra in EXTRAS.items():
        assert package in [re.split(r"[\[<>=]", each)[0] for each in extras[extra]]


def test_packages_of_one_extra_are_installed_by_one_name() -> None:
    assert needs_installed("gguf") == "needs gguf, which is not installed: pip install 'ghostssm[gguf]'."
    both = needs_installed("altair", "vl-convert-python", "pandas")
    assert both.startswith("needs altair and vl-convert-python and pandas, which are not installed: ")
    assert both.endswith(": pip install 'ghostssm[report]' pandas.")


def test_only_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_installed("This", "pytest", "safetensors")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"^This needs lm-eval, which .* 'ghostssm\[lm-eval\]'\.$"):
        check_installed("This", "pytest", "lm-eval")
    with pytest.raises(TextError, match=r"^This needs no_such_package, .*: pip install no_such_package\.$"):
        check_installed("This", "no_such_package", kind=TextError)


def test_there_is_one_spelling_everywhere() -> None:
    """Of messages, helps and pages; other packages, such as engines, have a name of their own."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for path in [*ROOT.glob("src/**/*.py"), *ROOT.glob("docs/**/*.md")]:
        text = path.read_text()
        assert set(_SPELLING.findall(text)) <= set(extras), path
        assert not re.search(r"pip install '?\.\[", text) or path.name == "index.md", path  # which installs the project
        assert not re.search(rf"pip install '?({'|'.join(EXTRAS)})\b", text), path
