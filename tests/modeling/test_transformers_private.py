"""What transformers does not promise to keep is in one file, and versions that were not tried are refused."""

from __future__ import annotations

import ast
import importlib.metadata
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import ghostssm
from ghostssm.errors import InputError
from ghostssm.models.registration import NEWEST_TRANSFORMERS, OLDEST_TRANSFORMERS, check_transformers
from tests.conftest import Run

SOURCES = Path(ghostssm.__file__).parent
PRIVATE = {"models/transformers_private.py", "models/own_class/modeling_ghost.py"}
"""The second is written into checkpoints, where it has to stand alone."""
KEPT = {"transformers", "transformers.utils"}
UNDOCUMENTED = {"all_tied_weights_keys"}
OF_OTHERS = {"_version", "_buffers", "_checkpoint_offset", "_exit", "_reorder_linear_weight", "_linear_pointwise"}
"""Of torch and the system."""


def private_names(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    own = {
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self"
    }
    own |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "transformers":
            if node.module not in KEPT:
                yield f"{path.name}:{node.lineno} {node.module}"
            yield from (f"{path.name}:{node.lineno} {each.name}" for each in node.names if each.name.startswith("_"))
        elif isinstance(node, ast.Attribute) and node.attr not in OF_OTHERS | own:
            dunder = node.attr.startswith("__")
            if (node.attr.startswith("_") and not dunder) or node.attr in UNDOCUMENTED:
                yield f"{path.name}:{node.lineno} {node.attr}"


def test_no_other_file_uses_what_transformers_may_change() -> None:
    files = {path.relative_to(SOURCES).as_posix(): path for path in SOURCES.rglob("*.py")}
    assert files.keys() >= PRIVATE
    assert not [found for name in files.keys() - PRIVATE for found in private_names(files[name])]
    assert len(list(private_names(files["models/transformers_private.py"]))) > 5


def test_the_bounds_are_those_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (major, oldest), (_, newest) = OLDEST_TRANSFORMERS, NEWEST_TRANSFORMERS
    assert f"transformers>={major}.{oldest},<{major}.{newest + 1}" in project["dependencies"]


@pytest.mark.parametrize("version", ["5.22.2", "5.99.0", "6.0rc1", "4.57.6"])
def test_a_version_that_was_not_tried_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    with pytest.raises(InputError, match=f"transformers {version} is installed.*tried with 5"):
        ghostssm.__getattr__("load")  # as at its first use
    code, out, err = run("inspect", "reference")
    assert (code, out) == (2, "")
    assert "pip install 'transformers>=5.23,<5." in err.replace("\n", " ")
    assert "Traceback" not in err


def test_versions_that_were_tried_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("5.23.0", "5.23.9", ".".join(map(str, NEWEST_TRANSFORMERS)) + ".0.dev0"):
        monkeypatch.setattr(importlib.metadata, "version", lambda _, version=version: version)
        check_transformers()
