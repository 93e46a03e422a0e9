"""Chat templates in GGUF, under the keys of llama.cpp's own converter, wherever a checkpoint has them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ghostssm
from ghostssm.errors import ModelError

gguf = pytest.importorskip("gguf", reason="needs gguf: pip install 'ghostssm[gguf]'")

FolderOf = Callable[..., Path]
PLAIN, TOOLS = "{{ messages[0].content }}", "{{ tools }}"


def templates_in(folder: Path) -> dict[str, Any]:
    """What is written of the templates in a folder."""
    written = ghostssm.export_gguf(ghostssm.load(str(folder)), folder.with_suffix(".gguf"))
    fields = gguf.GGUFReader(written.path).fields.items()
    return {
        name.removeprefix("tokenizer."): field.contents() for name, field in fields if "tokenizer.chat_template" in name
    }


def in_config(folder: Path, value: Any) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": value}))


def test_none(folder_of: FolderOf) -> None:
    assert templates_in(folder_of()) == {}


def test_in_the_tokenizers_config(folder_of: FolderOf) -> None:
    folder = folder_of()
    in_config(folder, PLAIN)
    assert templates_in(folder) == {"chat_template": PLAIN}


def test_several_in_the_tokenizers_config(folder_of: FolderOf) -> None:
    folder = folder_of()
    names = {"default": PLAIN, "tool_use": TOOLS, "rag-1": "{{ documents }}"}
    in_config(folder, [{"name": name, "template": template} for name, template in names.items()])
    assert templates_in(folder) == {
        "chat_template": PLAIN,
        "chat_template.tool_use": TOOLS,
        "chat_template.rag_1": "{{ documents }}",
        "chat_templates": ["rag_1", "tool_use"],
    }


def test_in_files_of_their_own(folder_of: FolderOf) -> None:
    folder = folder_of()
    (folder / "chat_template.jinja").write_text(PLAIN)
    assert templates_in(folder) == {"chat_template": PLAIN}
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(TOOLS)
    folder.with_suffix(".gguf").unlink()
    expected = {"chat_template": PLAIN, "chat_template.tool_use": TOOLS, "chat_templates": ["tool_use"]}
    assert templates_in(folder) == expected


def test_none_that_is_the_default(folder_of: FolderOf) -> None:
    folder = folder_of()
    in_config(folder, [{"name": "tool_use", "template": TOOLS}])
    assert templates_in(folder) == {"chat_template.tool_use": TOOLS, "chat_templates": ["tool_use"]}


def test_names_that_gguf_does_not_tell_apart(folder_of: FolderOf, tmp_path: Path) -> None:
    folder = folder_of()
    in_config(folder, [{"name": name, "template": name} for name in ("tool-use", "tool_use")])
    written = ghostssm.export_gguf(ghostssm.load(str(folder)), tmp_path / "out.gguf")
    assert written.notes == ("the chat template 'tool_use' is left out: in GGUF another one has the name tool_use",)


def test_the_older_file(folder_of: FolderOf) -> None:
    folder = folder_of()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": PLAIN}))
    assert templates_in(folder) == {"chat_template": PLAIN}


def test_a_broken_one_is_refused(folder_of: FolderOf) -> None:
    folder = folder_of()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": [{"name": "tool_use"}]}))
    with pytest.raises(ModelError, match="expected texts by name"):
        templates_in(folder)
    assert not folder.with_suffix(".gguf").exists()
