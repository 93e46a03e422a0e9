"""Checkpoints made to run code, read other files, or fill the memory."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import ghostssm
from ghostssm.checkpoint.weights import stored_tensors
from ghostssm.errors import ModelError
from ghostssm.files import tensors
from ghostssm.files.tensors import FLOAT_DTYPES, read_header, read_tensor
from tests.checkpoint.test_bad_checkpoints import edit_config
from tests.checkpoint.test_round_trip import logits_of, mamba_ssm_folder
from tests.conftest import tiny_model
from tests.programs import in_process

FolderOf = Callable[..., Path]
ENTRY = {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]}


def header_file(path: Path, header: bytes | dict[str, Any], data: int = 64) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(data))
    return path


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": ENTRY}, "end at byte"),
        ({"a": ENTRY, "b": ENTRY | {"data_offsets": [16, 48]}}, "overlap"),
        ({"a": ENTRY, "b": ENTRY}, "overlap"),
        ({"a": ENTRY, "b": ENTRY | {"data_offsets": [40, 72]}}, "gap"),
        ({"a": ENTRY, "b": ENTRY | {"data_offsets": [64, 32]}}, "has -32 bytes"),
        ({"a": ENTRY | {"shape": [2, 2**62]}}, "expected"),
        ({"a": ENTRY | {"shape": [2**62, 2**62, 0], "data_offsets": [0, 64]}}, "expected 0"),
        ({"a": ENTRY | {"shape": [-2, -4]}}, "no dtype, shape"),
        ({"a": ENTRY | {"shape": [2.0, 4]}}, "no dtype, shape"),
        ({"a": ENTRY | {"data_offsets": [0, 32, 64]}}, "3 data_offsets"),
        ({"a": ENTRY | {"data_offsets": [0, 2**70]}}, "no dtype, shape"),
        ({"a": ENTRY | {"surprise": 1}}, "no dtype, shape"),
        ({"a": None}, "no dtype, shape"),
        ({"__metadata__": {"a": 1}}, "metadata"),
        (b'{"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}, "a": {}}', "'a' is there twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[1]", "holds list"),
        (b"\xff{}", "can't be read as JSON"),
        (b'{"\\ud800": {}}', "can't be read as JSON"),
    ],
)
def test_headers(tmp_path: Path, header: bytes | dict[str, Any], message: str) -> None:
    file = header_file(tmp_path / "model.safetensors", header)
    with pytest.raises(ModelError, match=message):
        read_header(file, ModelError)


@pytest.mark.parametrize("length", [2**64 - 1, 2**40, 100 << 20])
def test_a_header_of_absurd_length(tmp_path: Path, length: int) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(length.to_bytes(8, "little"))
        file.truncate(200 << 20)
    with pytest.raises(ModelError, match="header"):
        read_header(tmp_path / "model.safetensors", ModelError)


def test_tensors_are_read_as_the_format_has_them(tmp_path: Path) -> None:
    tensors = {
        f"{dtype}-{shape}": torch.rand(shape).to(dtype)
        for dtype in FLOAT_DTYPES.values()
        for shape in ((), (3,), (2, 5), (0, 4), (2, 1, 3))
    }
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    header = read_header(file, ModelError)
    assert header.keys() == tensors.keys()
    for name, tensor in tensors.items():
        found = read_tensor(file, name, header[name], ModelError)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)


def test_a_file_that_is_truncated_meanwhile(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"a": torch.rand(1000)}, file)
    header = read_header(file, ModelError)
    os.truncate(file, 2000)
    with pytest.raises(ModelError, match=r"truncated while a was read: found 1928 of 4000"):
        read_tensor(file, "a", header["a"], ModelError)
    file.unlink()
    with pytest.raises(ModelError, match="can't be read"):
        read_tensor(file, "a", header["a"], ModelError)


def pickled_tensors() -> dict[str, torch.Tensor]:
    """Views of one storage, in any order of their numbers, and what is empty or of few bytes."""
    whole = torch.rand(40, 30)
    return {
        "whole": whole,
        "rows": whole[10:20],
        "turned": whole.T,
        "steps": whole[3::4, 2:20:3],
        "half": torch.rand(7).half(),
        "bfloat": torch.rand(3).bfloat16(),
        "empty": torch.zeros(0, 3),
        "number": torch.tensor(2.5),
        "parameter": torch.nn.Parameter(torch.rand(4)),
    }


@pytest.mark.parametrize("written_by", ["torch.save", "an old torch.save", "another program"])
def test_pickled_tensors_are_read_as_torch_reads_them(tmp_path: Path, written_by: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    file = folder / "pytorch_model.bin"
    torch.save(pickled_tensors(), file, _use_new_zipfile_serialization=written_by != "an old torch.save")
    if written_by == "another program":  # which aligns nothing
        with zipfile.ZipFile(file) as old:
            members = {info.filename: old.read(info) for info in old.infolist()}
        with zipfile.ZipFile(file, "w") as new:
            for name, content in members.items():
                new.writestr(name, content)
    expected = torch.load(file, weights_only=True)
    for name, tensor in stored_tensors(folder).items():
        found = tensor.read()
        assert found.dtype == expected[name].dtype, name
        assert torch.equal(found, expected[name]), name
        assert found.untyped_storage().nbytes() == found.nbytes, name


def test_a_pickle_file_that_is_cut_short_while_it_is_read(tmp_path: Path) -> None:
    """Between its pickle and its numbers: were the file mapped, a signal would end the process."""
    file = mamba_ssm_folder(tmp_path, None) / "pytorch_model.bin"
    program = (
        "import os, pathlib, sys\n"
        "from ghostssm.checkpoint.weights import stored_tensors\n"
        "from ghostssm.errors import ModelError\n"
        "file = pathlib.Path(sys.argv[1])\n"
        "tensors = stored_tensors(file.parent)\n"
        "os.truncate(file, 4096)\n"
        "try:\n"
        "    for tensor in tensors.values():\n"
        "        tensor.read()\n"
        "except ModelError as error:\n"
        "    print(error)\n"
    )
    ended = in_process(program, file)
    assert ended.returncode == 0, ended.stderr
    assert "was truncated while backbone." in ended.stdout


def test_one_pickled_tensor_is_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = mamba_ssm_folder(tmp_path, None)
    asked: list[int] = []
    read = tensors.read_at

    def noted(file: Path, name: str, start: int, shape: tuple[int, ...], *rest: Any) -> torch.Tensor:
        asked.append(shape[0])
        return read(file, name, start, shape, *rest)

    monkeypatch.setattr("ghostssm.checkpoint.pickles.read_at", noted)
    stored = stored_tensors(folder)
    assert not asked
    stored["backbone.layers.1.mixer.D"].read()
    assert asked == [8]


@pytest.mark.parametrize("dialect", ["transformers", "mamba_ssm"])
def test_a_loaded_model_outlives_its_files(folder_of: FolderOf, tmp_path: Path, dialect: str) -> None:
    """A weight that is still mapped from a truncated file would kill the process."""
    folder = folder_of() if dialect == "transformers" else mamba_ssm_folder(tmp_path, None)
    checkpoint = ghostssm.load(str(folder))
    before = logits_of(checkpoint.model)
    for path in folder.iterdir():
        os.truncate(path, 0)
    assert torch.equal(logits_of(checkpoint.model), before)


def shards(folder: Path) -> tuple[Path, dict[str, Any]]:
    tiny_model().save_pretrained(folder, max_shard_size="40KB")
    index = folder / "model.safetensors.index.json"
    return index, json.loads(index.read_text())


def test_shards_that_contradict_their_index(tmp_path: Path) -> None:
    index, document = shards(tmp_path)
    places = document["weight_map"]
    first, second = sorted(set(places.values()))[:2]
    name = next(name for name, file in places.items() if file == first)
    for changes, message in (
        ({name: second}, f"{name} is in {first}, expected in {second}"),
        ({"surplus": first}, f"surplus is in no shard, expected in {first}"),
        ({name: "../" + first}, "plain names"),
        ({name: "/etc/passwd"}, "plain names"),
        ({name: "config.json"}, "plain names"),
        ({name: ""}, "plain names"),
        ({name: "\0.safetensors"}, "plain names"),
        ({name: "x" * 300 + ".safetensors"}, "plain names"),
        ({name: "x.safetensors"}, "missing weight files"),
        ({name: 3}, "not a shard index"),
    ):
        index.write_text(json.dumps({"weight_map": places | changes}))
        with pytest.raises(ModelError, match=message):
            ghostssm.load(str(tmp_path))
    index.write_text(json.dumps(document)[:-2] + f', "{name}": "{second}"}}}}')
    with pytest.raises(ModelError, match="is there twice"):
        ghostssm.load(str(tmp_path))


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    _, document = shards(tmp_path)
    first, second = sorted(set(document["weight_map"].values()))[:2]
    tensors = safetensors.torch.load_file(tmp_path / second)
    name = next(iter(safetensors.torch.load_file(tmp_path / first)))
    safetensors.torch.save_file(tensors | {name: torch.zeros(2)}, tmp_path / second)
    with pytest.raises(ModelError, match=f"{name} is in {second} and in {first}"):
        ghostssm.load(str(tmp_path))


def test_of_a_whole_file_and_an_index_the_file_counts_as_in_transformers(tmp_path: Path) -> None:
    shards(tmp_path / "a")
    tiny_model(seed=1).save_pretrained(tmp_path / "b")
    shutil.copy(tmp_path / "b" / "model.safetensors", tmp_path / "a")
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "a").eval()
    assert torch.equal(logits_of(ghostssm.load(str(tmp_path / "a")).model), logits_of(stock))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"])
def test_links_out_of_the_folder(folder_of: FolderOf, tmp_path: Path, name: str) -> None:
    folder = folder_of()
    outside = tmp_path / "outside"
    shutil.move(folder / name, outside)
    (folder / name).symlink_to(outside)
    with pytest.raises(ModelError, match=f"{name} is a link to .*outside"):
        ghostssm.load(str(folder))
    (folder / name).unlink()
    shutil.move(outside, folder / "inside")
    (folder / name).symlink_to("inside")
    ghostssm.load(str(folder))


def test_the_hub_caches_own_links_pass_and_no_others(folder_of: FolderOf, tmp_path: Path) -> None:
    entry = tmp_path / "models--org--name"
    snapshot = entry / "snapshots" / "0123"
    (entry / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in folder_of().iterdir():
        shutil.move(path, entry / "blobs" / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    ghostssm.load(str(snapshot))
    shutil.move(entry / "blobs" / "config.json", tmp_path / "elsewhere")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../../elsewhere")
    with pytest.raises(ModelError, match="is a link to"):
        ghostssm.load(str(snapshot))


def test_a_linked_folder_is_a_folder(folder_of: FolderOf, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder_of())
    ghostssm.load(str(tmp_path / "link"))


def test_pipes_and_loops_of_links(folder_of: FolderOf) -> None:
    folder = folder_of()
    (folder / "tokenizer.model").symlink_to("tokenizer.model")
    with pytest.raises(ModelError, match=r"tokenizer\.model"):
        ghostssm.load(str(folder))
    (folder / "tokenizer.model").unlink()
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(ModelError, match="no regular file"):
        ghostssm.load(str(folder))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 4000},
        {"num_hidden_layers": 1e9},
        {"hidden_size": 2**30, "num_heads": 2**28},
        {"vocab_size": 2**31 - 1},
        {"vocab_size": 10**30},
        {"state_size": 2**31 - 1},
        {"state_size": -16},
        {"hidden_size": -32},
        {"hidden_size": float("nan")},
        {"hidden_size": 32.5},
        {"conv_kernel": 2**31 - 1},
        {"conv_kernel": 0},
        {"time_step_limit": [0.0]},
        {"time_step_limit": [0.0, float("nan")]},
        {"time_step_limit": {"__float__": "NaN"}},
        {"model_type": ["mamba2"]},
        {"model_type": "ghost_mamba2", "num_hidden_layers": 2**31 - 1},
        {"model_type": "ghost_mamba2", "state_sizes": [16, 16, 2**31 - 1]},
    ],
)
def test_configs_are_refused_in_no_time_and_memory(folder_of: FolderOf, changes: dict[str, Any]) -> None:
    folder = folder_of()
    edit_config(folder, **changes)
    begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ghostssm.InputError):
        ghostssm.load(str(folder))
    assert time.perf_counter() - begun < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10


def test_a_description_without_weights_ends_soon(folder_of: FolderOf) -> None:
    folder = folder_of()
    (folder / "model.safetensors").unlink()
    edit_config(folder, num_hidden_layers=10**6)
    with pytest.raises(ModelError, match="num_hidden_layers is 1000000, expected at most"):
        ghostssm.describe(str(folder))


@pytest.mark.parametrize(
    "value", [{"d_model": [0]}, {"vocab_size": "x"}, {"n_layer": -1}, {"pad_vocab_size_multiple": 0}, {"d_model": True}]
)
def test_mamba_ssm_sizes(tmp_path: Path, value: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="expected a positive integer"):
        ghostssm.load(str(mamba_ssm_folder(tmp_path, None, **value)))


CODE = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\nclass Thing: pass\n"


@pytest.mark.parametrize("model_type", ["mamba2", "strange"])
def test_code_in_the_folder_is_never_run(folder_of: FolderOf, model_type: str, tmp_path: Path) -> None:
    folder = folder_of()
    (folder / "evil.py").write_text(CODE.replace("__file__", repr(str(folder / "evil.py"))))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(CODE)
    classes = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")
    entries = {"auto_map": dict.fromkeys(classes, "evil.Thing"), "trust_remote_code": True}
    edit_config(folder, **entries, model_type=model_type, attn_implementation="nobody/kernels")
    for name in ("tokenizer_config.json", "generation_config.json"):
        document = json.loads((folder / name).read_text())
        document |= entries | {"auto_map": {"AutoTokenizer": ["evil.Thing", "evil.Thing"]}}
        (folder / name).write_text(json.dumps(document))
    if model_type == "mamba2":
        checkpoint = ghostssm.load(str(folder))
        assert "evil" not in checkpoint.model.config.to_json_string()
    else:
        with pytest.raises(ModelError):
            ghostssm.load(str(folder))
    assert not list(tmp_path.rglob("ran"))


def test_configs_and_tokenizers_name_no_other_files(folder_of: FolderOf, tmp_path: Path) -> None:
    folder = folder_of()
    (tmp_path / "config.4.0.0.json").write_text(json.dumps({"state_size": 3, "model_type": "mamba2"}))
    edit_config(folder, configuration_files=["../config.4.0.0.json"])
    assert ghostssm.load(str(folder)).model.config.state_size == 16
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fast_tokenizer_files": ["../tokenizer.4.0.0.json"]}))
    with pytest.raises(ModelError, match="fast_tokenizer_files"):
        ghostssm.load(str(folder))


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw[: len(raw) // 2],
        lambda raw: b"[" * 50_000,
        lambda raw: b"",
        lambda raw: b"{}",
        lambda raw: raw.replace(b'"type": "BPE"', b'"type": "XYZ"'),
        lambda raw: raw.replace(b'"Ab": 1', b'"Ab": -1').replace(b'": 2,', b'": 1000000000,'),
    ],
)
def test_broken_tokenizers(folder_of: FolderOf, change: Callable[[bytes], bytes]) -> None:
    folder = folder_of()
    path = folder / "tokenizer.json"
    raw = change(path.read_bytes())
    assert raw != path.read_bytes()
    path.write_bytes(raw)
    with pytest.raises(ModelError, match="tokenizer"):
        ghostssm.load(str(folder))


def pickled(path: Path, value: Any) -> None:
    """A .bin as torch.save writes it, with a pickle of our own."""
    torch.save({"a": torch.zeros(2)}, path)
    with zipfile.ZipFile(path) as old:
        members = {info.filename: old.read(info) for info in old.infolist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, content in members.items():
            new.writestr(name, pickle.dumps(value, protocol=2) if name.endswith("data.pkl") else content)


class Huge:
    """Allocates a tebibyte when unpickled, which weights_only allows."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (bytearray, (1 << 40,))


@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_that_allocate(tmp_path: Path, legacy: bool) -> None:
    folder = mamba_ssm_folder(tmp_path, None)
    path = folder / "pytorch_model.bin"
    if legacy:
        torch.save({"a": Huge()}, path, _use_new_zipfile_serialization=False)
    else:
        pickled(path, {"a": Huge()})
    with pytest.raises(ModelError, match="bytearray"):
        ghostssm.load(str(folder))


def test_pickled_tensors_that_claim_more_than_is_stored(tmp_path: Path) -> None:
    folder = mamba_ssm_folder(tmp_path, None)
    path = folder / "pytorch_model.bin"
    state = torch.load(path, weights_only=True)
    torch.save(state | {"backbone.embedding.weight": torch.zeros(1).expand(288, 32)}, path)
    with pytest.raises(ModelError, match="smaller storage"):
        ghostssm.load(str(folder))
    shared = torch.zeros(100_000)
    torch.save({f"tensor{index}": shared for index in range(100)}, path)
    with pytest.raises(ModelError, match="share storage"):
        ghostssm.load(str(folder))


@pytest.fixture
def fuzzing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
    import fuzz_readers

    yield fuzz_readers
    sys.modules.pop("fuzz_readers")


def test_fuzzed_files(fuzzing: Any, tmp_path: Path) -> None:
    """A short run of tools/fuzz_readers.py."""
    watching = fuzzing.watch(tmp_path)
    readers = fuzzing.targets(tmp_path)
    with watching.on():  # the oracle works
        Path(__file__).read_bytes()
    assert watching.events == [f"opened {Path(__file__).resolve()}"]
    for target in readers.values():
        tried, accepted = fuzzing.fuzz(target, tmp_path, watching, 60, seed=0)
        assert tried >= 60
        assert accepted < tried


def test_loading_opens_nothing_outside_the_folder(fuzzing: Any, folder_of: FolderOf) -> None:
    folder = folder_of()
    ghostssm.load(str(folder))  # what is imported late is imported now
    watching = fuzzing.watch(folder)
    with watching.on():
        ghostssm.load(str(folder))
    assert watching.events == []
