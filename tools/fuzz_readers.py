"""Feed the readers of configs, shard indexes, safetensors headers and plans with broken and hostile files.

    python tools/fuzz_readers.py --inputs 100000

Inputs are mutations of valid files (entries replaced, removed, doubled, nested; bytes flipped, cut, repeated) and
arbitrary JSON and bytes. For each of them a reader may succeed or raise a GhostError; anything else is a failure, and
so is opening a file outside the input's folder, starting a process, or connecting to anything. Memory is bounded by a
limit on the address space. Prints the number of inputs per reader, how many were accepted, and the time.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import resource
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import Mamba2Config, Mamba2ForCausalLM

import ghostssm
from ghostssm.checkpoint.loading import stored_tensors
from ghostssm.models.mixer import Projection
from ghostssm.plan.decision import Decision, Selection
from ghostssm.plan.plan import Plan
from ghostssm.plan.provenance import CalibrationText, Provenance

EXTRA_MEMORY = 3 << 30
_WATCHED = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect", "pty.spawn")
_NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3.5, float("nan"), float("inf"), 1e308, 2**31 - 1, 2**31, 2**63, 2**64, 10**30),
    *(
        -(2**63),
        "",
        "0",
        "16",
        "\0",
        "\ud800",
        "../x",
        "../../../etc/passwd",
        "/etc/passwd",
        "a/b",
        "model",
        "x" * 5000,
    ),
    *([], {}, [[]], [0], [-1], [True], ["a"], [0] * 2000, {"": ""}, {"__float__": "NaN"}, {"a": {"a": {"a": []}}}),
)
_NAMES = ("x", "../x", "auto_map", "quantization_config", "__metadata__", "num_layers", "projected", "changed")


@dataclass
class Watch:
    """What happened while a reader was at work: opened paths outside the folder, and processes or connections."""

    folder: Path
    allowed: tuple[str, ...]
    events: list[str] = field(default_factory=list)
    active: bool = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if not path.startswith((str(self.folder), *self.allowed)):
                self.events.append(f"opened {path}")
        elif event.startswith(_WATCHED):
            self.events.append(f"{event} {arguments!r}")

    @contextmanager
    def on(self) -> Iterator[None]:
        self.events.clear()
        self.active = True
        try:
            yield
        finally:
            self.active = False


def watch(folder: Path) -> Watch:
    """Watch this process from now on; only Python's own files and ghostssm's may be opened beside the folder."""
    own, zipped = Path(ghostssm.__file__).parent, [place for place in sys.path if place.endswith(".zip")]
    watching = Watch(
        folder.resolve(),
        tuple(
            str(Path(p).resolve())
            for p in (*sysconfig.get_paths().values(), *zipped, own, "/dev/null", "/proc/meminfo")
        ),
    )
    sys.addaudithook(watching)
    return watching


@dataclass(frozen=True)
class Target:
    """One reader: the file that is fuzzed, its valid contents, and the call that reads it."""

    file: str
    document: Any
    read: Callable[[Path], object]
    encode: Callable[[Any], bytes]


def as_json(document: Any) -> bytes:
    return json.dumps(document).encode()


def as_header(document: Any) -> bytes:
    """A safetensors file of 64 bytes of data with a header."""
    raw = as_json(document)
    return len(raw).to_bytes(8, "little") + raw + bytes(64)


def targets(folder: Path) -> dict[str, Target]:
    """Valid files in the folder, and the readers to try."""
    config = Mamba2Config(
        vocab_size=32, hidden_size=8, num_hidden_layers=2, state_size=4, head_dim=4, num_heads=4, n_groups=2
    )
    model = folder / "model"
    Mamba2ForCausalLM(config).save_pretrained(model)
    sharded = folder / "sharded"
    Mamba2ForCausalLM(config).save_pretrained(sharded, max_shard_size="2KB")
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    theirs = {"d_model": 8, "n_layer": 2, "vocab_size": 32, "ssm_cfg": {"layer": "Mamba2", "d_state": 4, "headdim": 4}}
    names = [f"backbone.layers.{index}.mixer" for index in range(2)]
    plan = Plan(
        method="output",
        model_type="mamba2",
        n_groups=2,
        state_size=4,
        decisions={
            name: Decision(Selection(((0, 1), (2, 3))), Projection(torch.rand(2, 2, 1), torch.rand(2, 2, 1)))
            for name in names
        },
        scores={name: torch.rand(2, 4, dtype=torch.float64) for name in names},
        changes={f"{names[0]}.D": torch.rand(4)},
        provenance=Provenance(2, "equal", 1, 8, CalibrationText("text", "00", "00", 4, 16, 1)),
    )
    (folder / "plan").mkdir()
    plan.save(folder / "plan")
    (folder / "tensors").mkdir()
    entries = {
        "a": {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]},
        "b": {"dtype": "BF16", "shape": [16], "data_offsets": [32, 64]},
        "c": {"dtype": "F64", "shape": [0, 3], "data_offsets": [64, 64]},
        "__metadata__": {"format": "pt"},
    }

    def read_all(path: Path) -> None:
        tensors = stored_tensors(path.parent)
        for tensor in tensors.values():
            tensor.read()
        if path.suffix == ".safetensors":  # the format's own reader takes it too
            with safetensors.safe_open(path, framework="pt") as file:
                assert set(file.keys()) == tensors.keys()

    (folder / "theirs").mkdir()
    stored = json.loads((model / "config.json").read_text())
    return {
        "config": Target("model/config.json", stored, lambda p: ghostssm.describe(str(p.parent)), as_json),
        "mamba_ssm config": Target("theirs/config.json", theirs, lambda p: ghostssm.describe(str(p.parent)), as_json),
        "index": Target("sharded/model.safetensors.index.json", index, read_all, as_json),
        "header": Target("tensors/model.safetensors", entries, read_all, as_header),
        "plan": Target("plan/plan.json", json.loads((folder / "plan/plan.json").read_text()), Plan.read, as_json),
    }


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(_NASTY)
JSON_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)


def mutated_document(document: Any, chance: random.Random, value: Any) -> Any:
    """A copy with one to three entries, anywhere, replaced, removed, doubled or nested."""
    changed = copy.deepcopy(document)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        places: list[tuple[Any, Any]] = []
        waiting = [changed]
        while waiting:
            at = waiting.pop()
            keys = list(at) if isinstance(at, dict) else range(len(at)) if isinstance(at, list) else ()
            places += [(at, key) for key in keys]
            waiting += [at[key] for key in keys]
        if not places:
            return value
        owner, key = chance.choice(places)
        match chance.randrange(6):
            case 0:
                del owner[key]
            case 1:
                other, where = chance.choice(places)
                owner[key] = copy.deepcopy(other[where]) if key in _keys(owner) and where in _keys(other) else None
            case 2:
                owner[key] = [owner[key]] if chance.random() < 0.5 else {"x": owner[key]}
            case 3 if isinstance(owner, dict):
                owner[chance.choice(_NAMES)] = copy.deepcopy(value)
            case 4:
                owner[key] = copy.deepcopy(chance.choice(_NASTY))
            case _:
                owner[key] = copy.deepcopy(value)
    return changed


def _keys(owner: Any) -> Any:
    return owner if isinstance(owner, dict) else range(len(owner))


def mutated_bytes(raw: bytes, chance: random.Random) -> bytes:
    """Bytes flipped, cut, repeated, or put in."""
    changed = bytearray(raw)
    for _ in range(chance.choice((1, 1, 2, 8))):
        at, length = chance.randrange(len(changed) + 1), chance.choice((1, 2, 8, 64))
        match chance.randrange(5):
            case 0:
                changed[at : at + length] = chance.randbytes(length)
            case 1:
                del changed[at : at + length]
            case 2:
                changed[at:at] = changed[at : at + length] * chance.choice((1, 2, 100))
            case 3:
                changed[at:at] = chance.choice((b"[" * 2000, b'{"a":' * 2000, b"9" * 5000, b"NaN", b"\\ud800", b"\0"))
            case _:
                del changed[at:]
    return bytes(changed)


def inputs(target: Target) -> st.SearchStrategy[bytes]:
    """Arbitrary JSON and bytes, and mutations of the valid file."""

    @st.composite
    def mutation(draw: st.DrawFn) -> bytes:
        chance = random.Random(draw(st.integers(0, 2**32)))
        value = draw(JSON_VALUES)
        raw = target.encode(mutated_document(target.document, chance, value))
        if chance.random() < 0.15 and raw.startswith(b"{"):  # the first entry once more, at the end
            first = raw[1:].split(b", ", 1)[0]
            raw = raw[:-1] + b", " + first + b"}"
        return mutated_bytes(raw, chance) if chance.random() < 0.25 else raw

    return st.one_of(mutation(), mutation(), mutation(), JSON_VALUES.map(target.encode), st.binary(max_size=200))


def fuzz(target: Target, folder: Path, watching: Watch, count: int, seed: int) -> tuple[int, int]:
    """Inputs tried and accepted.

    Raises:
        AssertionError: a reader raised something else than GhostError, or did something that a reader must not do.
    """
    tried = accepted = 0
    path = folder / target.file

    def one(raw: bytes) -> None:
        nonlocal tried, accepted
        path.write_bytes(raw)
        with watching.on():
            try:
                target.read(path)
                accepted += 1
            except ghostssm.GhostError as error:
                str(error)
            except (Exception, RecursionError) as error:
                raise AssertionError(f"{type(error).__name__}: {error}, for {raw[:2000]!r}") from error
        assert not watching.events, (watching.events, raw[:2000])
        tried += 1

    wanted = settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    round_number = 0
    while tried < count:  # hypothesis may find that it has nothing new to try
        from hypothesis import seed as seeded

        seeded(seed + round_number)(wanted(given(inputs(target))(one)))()
        round_number += 1
    path.write_bytes(target.encode(target.document))
    return tried, accepted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        readers = targets(folder)
        for target in readers.values():
            (folder / target.file).write_bytes(target.encode(target.document))
            target.read(folder / target.file)
        watching = watch(folder)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + EXTRA_MEMORY, used + EXTRA_MEMORY))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        total = 0
        for reader, target in readers.items():
            start = time.perf_counter()
            tried, accepted = fuzz(target, folder, watching, -(-options.inputs // len(readers)), options.seed)
            total += tried
            print(f"{reader}: {tried} inputs, {accepted} accepted, {time.perf_counter() - start:.0f} s", flush=True)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{total} inputs in {time.perf_counter() - begun:.0f} s, memory grew by {grown:.0f} MiB, no failure")


if __name__ == "__main__":
    main()
