"""The tokenizer that is there is the one that is used, and the one that is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import ghostssm
from ghostssm.errors import ModelError
from ghostssm.evaluation.recall import last_words
from tests.conftest import VOCABULARY, Run, random_windows, tiny_model

TEXTS = [
    "the  history of the world",
    " a space",
    "two\n\nlines\tand a tab",
    "é ü ñ 日本",
    "12345 don't",
    "<s> the </s>",
]
FolderOf = Callable[..., Path]


def metaspace() -> Tokenizer:
    """As Mistral's: spaces are a letter, a text begins with one and with <s>, what is unknown falls back to bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"athes", "he", "\u2581t"]
    vocabulary = {piece: index for index, piece in enumerate([*pieces, "\u2581the"])}
    vocabulary |= {f"filler{index}": index for index in range(len(vocabulary), VOCABULARY)}
    merges = [("h", "e"), ("\u2581", "t"), ("\u2581t", "he")]
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    return made


def byte_level() -> Tokenizer:
    """Of bytes, digits apart, with as many tokens as the model."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<|pad|>", "<s>", "</s>", *alphabet, "\u0120t", "12", "he"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    vocabulary |= {f"filler{index}": index for index in range(len(vocabulary), VOCABULARY)}
    made = Tokenizer(models.BPE(vocabulary, [("\u0120", "t"), ("1", "2"), ("h", "e")]))
    made.add_special_tokens(["<|pad|>", "<s>", "</s>"])
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    made.decoder = decoders.ByteLevel()
    return made


KINDS = {"metaspace": metaspace, "byte-level": byte_level}
CONFIGS: dict[str, dict[str, Any] | None] = {
    "absent": None,
    "without a class": {"bos_token": "<s>", "eos_token": "</s>", "model_max_length": 77},
    "of another class": {"tokenizer_class": "GPTNeoXTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"},
    "of code elsewhere": {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}},
    "right": {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "extra": 1},
}


@pytest.fixture
def bare(tmp_path: Path) -> FolderOf:
    """A model with tokenizer.json, and a tokenizer_config.json if there is one."""

    def save(made: Tokenizer, entries: dict[str, Any] | None = None, name: str = "bare") -> Path:
        folder = tmp_path / name
        tiny_model(bos_token_id=1, eos_token_id=2, pad_token_id=0).save_pretrained(folder)
        made.save(str(folder / "tokenizer.json"))
        if entries is not None:
            (folder / "tokenizer_config.json").write_text(json.dumps(entries))
        return folder

    return save


def assert_reads_as(reader: Any, made: Tokenizer) -> None:
    """The same ids and texts, and no token more."""
    for text in TEXTS:
        ids = made.encode(text).ids
        assert reader(text)["input_ids"] == ids
        assert reader.decode(ids) == made.decode(ids, skip_special_tokens=False)
    assert len(reader) == VOCABULARY


def pruned(folder: Path) -> tuple[ghostssm.Checkpoint, ghostssm.Plan]:
    checkpoint = ghostssm.load(str(folder))
    plan = ghostssm.Calibration(checkpoint.model, random_windows(1, 40)).plan("ghost", 5)
    ghostssm.apply_plan(checkpoint.model, plan)
    return checkpoint, plan


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_file_is_read_and_copied_as_it_is(bare: FolderOf, tmp_path: Path, kind: str, config: str) -> None:
    made, entries = KINDS[kind](), CONFIGS[config]
    folder = bare(made, entries)
    checkpoint, plan = pruned(folder)
    assert_reads_as(checkpoint.tokenizer, made)
    ids = checkpoint.model.config.bos_token_id, checkpoint.model.config.eos_token_id
    for written in (
        ghostssm.save(checkpoint, plan, tmp_path / "out"),
        ghostssm.export_checkpoint(checkpoint, tmp_path / "exported"),
        ghostssm.export_checkpoint(checkpoint, tmp_path / "theirs", dialect="mamba_ssm"),
    ):
        assert (written / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
        assert_reads_as(AutoTokenizer.from_pretrained(written), made)
        stored = json.loads((written / "tokenizer_config.json").read_text())
        assert stored["tokenizer_class"] == "PreTrainedTokenizerFast"
        if config == "right":
            assert stored == entries
        else:
            assert {**stored, **(entries or {})} == stored | (entries or {})
            assert (stored["bos_token"], stored["eos_token"], stored["pad_token"]) == (
                "<s>",
                "</s>",
                made.id_to_token(0),
            )
            assert "auto_map" not in stored
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (stored["bos_token_id"], stored["eos_token_id"]) == ids == (1, 2)
    assert_reads_as(ghostssm.load(str(tmp_path / "out")).tokenizer, made)


@pytest.mark.parametrize("stream", [(), ("--stream",)])
def test_commands_say_which_class_they_wrote(
    run: Run, bare: FolderOf, text_file: Path, tmp_path: Path, stream: tuple[str, ...]
) -> None:
    folder, out = bare(metaspace()), tmp_path / "out"
    options = ("--state-size", 8, "--calibration", text_file, "--windows", 2, "--window-length", 32, "--refit", 0)
    code, _, err = run("prune", folder, *options, *stream, "--output", out)
    assert code == 0
    assert f"{folder} has no word on its class" in err
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert_reads_as(AutoTokenizer.from_pretrained(out), metaspace())
    assert run("verify", out)[0] == 0
    code, found, _ = run("export", out, "--format", "transformers", "--output", tmp_path / "again", "--json")
    assert (code, json.loads(found)["notes"]) == (0, [])
    code, found, _ = run("export", folder, "--format", "transformers", "--output", tmp_path / "dense", "--json")
    assert "names PreTrainedTokenizerFast" in json.loads(found)["notes"][0]


def test_all_files_of_a_tokenizer_are_copied_as_they_are(bare: FolderOf, tmp_path: Path) -> None:
    folder = bare(byte_level(), CONFIGS["right"])
    (folder / "additional_chat_templates").mkdir()
    for name in ("special_tokens_map.json", "added_tokens.json", "chat_template.json"):
        (folder / name).write_text("{ }")
    for name in ("merges.txt", "chat_template.jinja", "additional_chat_templates/tool.jinja", "tokenizer.model"):
        (folder / name).write_text(f"{{# {name} #}}")
    (folder / "tokenizer.py").write_text("code")
    written = ghostssm.save(*pruned(folder), tmp_path / "out")
    beside = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".py"]
    beside = [path for path in beside if "config" not in path.stem or "tokenizer" in path.stem]
    for path in (path for path in beside if path.suffix != ".safetensors"):
        assert (written / path.relative_to(folder)).read_bytes() == path.read_bytes()
    assert not (written / "tokenizer.py").exists()
    assert ghostssm.verify(written).passed


def test_a_named_tokenizer_is_copied_from_its_folder(bare: FolderOf, folder_of: FolderOf, tmp_path: Path) -> None:
    other = bare(metaspace())
    checkpoint = ghostssm.load(str(folder_of()), tokenizer=str(other))
    assert_reads_as(checkpoint.tokenizer, metaspace())
    written = ghostssm.export_checkpoint(checkpoint, tmp_path / "out")
    assert (written / "tokenizer.json").read_bytes() == (other / "tokenizer.json").read_bytes()
    assert_reads_as(AutoTokenizer.from_pretrained(written), metaspace())


def test_a_tokenizer_of_the_hub_is_read_as_its_file_says(
    bare: FolderOf, folder_of: FolderOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, asked = bare(metaspace()), []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: asked.append(name) or str(other))
    checkpoint = ghostssm.load(str(folder_of()), tokenizer="org/name")
    assert asked == ["org/name"]
    assert_reads_as(checkpoint.tokenizer, metaspace())
    written = ghostssm.export_checkpoint(checkpoint, tmp_path / "out")
    assert (written / "tokenizer.json").read_bytes() == (other / "tokenizer.json").read_bytes()


def test_what_was_changed_in_memory_is_written(bare: FolderOf, tmp_path: Path) -> None:
    checkpoint = ghostssm.load(str(bare(metaspace())))
    checkpoint.require_tokenizer().chat_template = "{{ messages }}"
    written = ghostssm.export_checkpoint(checkpoint, tmp_path / "out")
    read = AutoTokenizer.from_pretrained(written)
    assert read.chat_template == "{{ messages }}"
    assert_reads_as(read, metaspace())


def test_a_tokenizer_made_in_memory_takes_nothing_from_the_working_folder(
    bare: FolderOf, folder_of: FolderOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = ghostssm.load(str(folder_of()))
    made = PreTrainedTokenizerFast(tokenizer_object=byte_level())
    monkeypatch.chdir(bare(metaspace()))
    checkpoint = ghostssm.Checkpoint(checkpoint.model, made, checkpoint.source)
    written = ghostssm.export_checkpoint(checkpoint, tmp_path / "out")
    assert_reads_as(AutoTokenizer.from_pretrained(written), byte_level())


def test_ends_of_text_come_from_the_config_only_if_they_are_special(bare: FolderOf) -> None:
    folder = bare(byte_level())
    tokenizer = ghostssm.load(str(folder)).require_tokenizer()
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<|pad|>")
    path = folder / "config.json"
    letter = byte_level().token_to_id("a")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token_id": letter, "eos_token_id": [2, 5]}))
    tokenizer = ghostssm.load(str(folder)).require_tokenizer()
    assert (tokenizer.bos_token, tokenizer.eos_token) == (None, "</s>")
    assert_reads_as(tokenizer, byte_level())


def test_truncation_and_padding_in_the_file_cut_no_text(bare: FolderOf) -> None:
    made = byte_level()
    folder = bare(made)
    made.enable_truncation(4)
    made.enable_padding(length=64, pad_token="<|pad|>")
    made.save(str(folder / "tokenizer.json"))
    assert_reads_as(ghostssm.load(str(folder)).tokenizer, byte_level())


def test_gguf_takes_a_tokenizer_that_is_a_file_only(bare: FolderOf, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    written = ghostssm.export_gguf(ghostssm.load(str(bare(byte_level()))), tmp_path / "model.gguf")
    fields = gguf.GGUFReader(written.path).fields
    assert fields["tokenizer.ggml.pre"].contents() == "starcoder"
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 2
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokens == [byte_level().id_to_token(index) for index in range(VOCABULARY)]
    with pytest.raises(ModelError, match="byte fallback"):
        ghostssm.export_gguf(ghostssm.load(str(bare(metaspace(), name="other"))), tmp_path / "other.gguf")


def test_sentencepiece_alone_names_what_to_install(
    folder_of: FolderOf, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = folder_of()
    for path in folder.glob("tokenizer*"):
        path.unlink()
    (folder / "tokenizer.model").write_bytes(b"")
    monkeypatch.setattr("ghostssm.checkpoint.tokenizer.is_sentencepiece_available", lambda: False)
    monkeypatch.setattr("ghostssm.checkpoint.tokenizer.is_protobuf_available", lambda: True)
    with pytest.raises(ModelError, match=r"pip install sentencepiece\. .*tokenizer\.json"):
        ghostssm.load(str(folder))


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sentencepiece_gives_its_own_ids_or_is_refused(folder_of: FolderOf, tmp_path: Path, kind: str) -> None:
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs sentencepiece and protobuf")
    pytest.importorskip("google.protobuf")
    folder = folder_of(vocab_size=400)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    lines = [f"the history of {word} worlds, {word}" for word in ("many", "new", "other", "older", "all", "the")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 9),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=300,
        model_type=kind,
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    if kind == "unigram":  # transformers' class merges pairs
        with pytest.raises(ModelError, match="other ids than sentencepiece"):
            ghostssm.load(str(folder))
        return
    own = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    checkpoint = ghostssm.load(str(folder))
    written = ghostssm.export_checkpoint(checkpoint, tmp_path / "out")
    for reader in (checkpoint.require_tokenizer(), AutoTokenizer.from_pretrained(written)):
        for text in ("the history of  worlds", "é\n\nother"):
            assert reader(text, add_special_tokens=False)["input_ids"] == own.encode(text)
    assert (written / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()


def test_a_vocabulary_without_a_class_is_refused(folder_of: FolderOf) -> None:
    folder = folder_of()
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    for path in folder.glob("tokenizer*"):
        path.unlink()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ModelError, match=r"nothing says how text is cut.*tokenizer\.json"):
        ghostssm.load(str(folder))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    ids = ghostssm.load(str(folder)).require_tokenizer()("é a")["input_ids"]
    assert ids == [vocabulary[symbol] for symbol in ("\u00c3", "\u00a9", "\u0120", "a")]


@pytest.mark.parametrize("kind", KINDS)
def test_generate_goes_on_as_transformers_does(run: Run, bare: FolderOf, kind: str) -> None:
    """Ids with the beginning of text, where the tokenizer adds it, and the greedy continuation."""
    folder = bare(KINDS[kind](), CONFIGS["right"])
    reader = AutoTokenizer.from_pretrained(folder)
    inputs = reader("the  sheet", return_tensors="pt")
    assert (inputs["input_ids"][0, 0] == 1) == (kind == "metaspace")
    stock = AutoModelForCausalLM.from_pretrained(folder)
    expected = stock.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=0)[0]
    assert len(expected) > inputs["input_ids"].shape[1] + 4
    code, out, _ = run("generate", folder, "--prompt", "the  sheet", "--max-new-tokens", 24)
    assert code == 0
    assert out.rstrip("\n") == reader.decode(expected, skip_special_tokens=True).rstrip("\n")


def test_last_words_take_the_word_as_it_stands_in_the_passage(bare: FolderOf) -> None:
    """A word tokenised alone would begin with two spaces."""
    tokenizer = ghostssm.load(str(bare(metaspace()))).require_tokenizer()
    model = tiny_model()
    ids = torch.tensor([metaspace().encode("a sheet the", add_special_tokens=False).ids])
    word = metaspace().token_to_id("\u2581the")
    assert ids[0, -1] == word
    with torch.inference_mode():
        expected = -model(ids).logits[0, -2].log_softmax(-1)[word]
    assert last_words(model, tokenizer, ["a sheet the"]).losses.item() == pytest.approx(expected.item(), rel=1e-4)
