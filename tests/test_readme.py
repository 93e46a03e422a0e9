"""What the README and the documentation show runs as it stands.

Python blocks of a page run one after the other in one namespace. A block that needs a network or a large model has a
comment ``<!-- compiled only: why -->`` before it. Every command line is parsed by the command's own parser.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from transformers import AutoModelForCausalLM
from typer.main import get_command

from ghostssm.cli.main import app
from ghostssm.methods import base
from ghostssm.text import sources
from ghostssm.text.stdlib import stdlib_texts

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"(<!-- compiled only: [^>]+ -->\n)?```python\n(.*?)```", re.DOTALL)
WITH_PYTHON = [page for page in PAGES if _BLOCK.search(page.read_text(encoding="utf-8"))]
GROUP: Any = get_command(app)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In an empty folder; methods that a page registers are forgotten."""
    monkeypatch.chdir(tmp_path)
    known = dict(base._METHODS)
    yield
    base._METHODS.clear()
    base._METHODS.update(known)


@pytest.mark.usefixtures("_elsewhere")
@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_python_blocks(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page.name != "README.md":  # a few modules show that the code runs; to tokenise all of them takes seconds
        monkeypatch.setattr(sources, "stdlib_texts", lambda held_out: stdlib_texts(held_out)[:30])
    names: dict[str, Any] = {}
    for only_compiled, source in _BLOCK.findall(page.read_text(encoding="utf-8")):
        code = compile(source, name_of(page), "exec")
        if not only_compiled:
            exec(code, names)
    if page.name == "README.md":
        assert AutoModelForCausalLM.from_pretrained("pruned").config.state_size == 32


def shell_commands(page: Path) -> list[list[str]]:
    """The arguments of every ``ghostssm`` command in the page's shell blocks."""
    blocks = re.findall(r"```(?:sh|bash|console)\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("ghostssm ")]


def parse(arguments: list[str]) -> None:
    """Raise typer's error for a command line that it refuses."""
    verb, *rest = arguments
    assert verb in GROUP.commands, f"there is no verb {verb!r}"
    with GROUP.commands[verb].make_context(verb, rest):
        pass


@pytest.mark.parametrize("page", [page for page in PAGES if shell_commands(page)], ids=name_of)
def test_command_lines_parse(page: Path) -> None:
    for arguments in shell_commands(page):
        parse(arguments)


def test_a_command_line_that_is_wrong_does_not_parse() -> None:
    for wrong in (
        ["prune", "m", "--nope", "1", "--output", "o"],
        ["prune", "m"],
        ["compare", "m", "--state-size", "x"],
    ):
        with pytest.raises((typer.BadParameter, Exception)) as refused:  # typer's own classes have no public base
            parse(wrong)
        assert type(refused.value).__module__.startswith(("typer", "click"))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_verbs_and_options_in_running_text_exist(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for verb, rest in re.findall(r"`ghostssm ([a-z]+)([^`]*)`", text):
        assert verb in GROUP.commands
        known = {name for option in GROUP.commands[verb].params for name in (*option.opts, *option.secondary_opts)}
        assert set(re.findall(r"--[\w-]+", rest)) <= known | {"--help"}
