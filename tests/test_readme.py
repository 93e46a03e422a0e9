"""What the README shows runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM
from typer.main import get_command

from ghostssm.cli.main import app

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_elsewhere")
def test_python_example() -> None:
    example = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)[0]
    exec(compile(example, "README.md", "exec"), {})
    assert AutoModelForCausalLM.from_pretrained("pruned").config.state_size == 32


def test_the_verbs_and_options_that_it_names_exist() -> None:
    verbs = get_command(app).commands  # type: ignore[attr-defined]
    shells = re.findall(r"```sh\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    commands = re.findall(r"^ghostssm (\w+)(.*)$", "\n".join(shells), flags=re.MULTILINE)
    assert {verb for verb, _ in commands} >= {"prune", "compare", "inspect", "evaluate", "generate"}
    for verb, rest in commands:
        known = {name for option in verbs[verb].params for name in option.opts}
        assert set(re.findall(r"--[\w-]+", rest)) <= known
