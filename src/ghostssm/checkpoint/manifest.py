"""ghostssm.json: what a checkpoint was made from and with, the hash of every file, and a probe of the model.

The hashes tell of accidents, not of attackers, who can write a manifest as well.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ghostssm.errors import CONVERT, ModelError
from ghostssm.files.reading import confined, read_json_object

MANIFEST_FILE = "ghostssm.json"
PAGE_FILE = "report.html"
"""A report in a checkpoint's folder; it may be written after the manifest, which does not list it."""
RECORD_FILE = "report.json"
"""What the report shows besides the plan and the manifest."""
_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "scipy", "numba")
"""Whose versions a result may depend on."""
_PROBE_TOKENS = 16
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}
_HALF_TOLERANCE = 0.1


@dataclass(frozen=True)
class Probe:
    """What a model makes of a few tokens: enough to see that it is the same model.

    Those of ghostssm are computed in float32, or float64 of such weights, whatever the dtype of the weights: in half
    precision they would differ more between processors, and may not be finite.

    Attributes:
        token_ids: the input, one sequence.
        mean, deviation, largest: of the logits at every position.
        tolerance: by how many standard deviations of a position's logits mean and largest may differ elsewhere, and by
            which share the deviation may; processors and versions round differently.
        dtype: that the logits were computed in.
    """

    token_ids: Sequence[int]
    mean: Sequence[float]
    deviation: Sequence[float]
    largest: Sequence[float]
    tolerance: float
    dtype: str

    @classmethod
    def of(cls, model: PreTrainedModel, token_ids: Sequence[int] | None = None) -> Probe | None:
        """Run a model on some tokens, or on tokens of our choice; None if its logits are not finite."""
        ids = probe_tokens(model.config.vocab_size) if token_ids is None else token_ids
        tokens = torch.tensor([list(ids)], device=model.device)
        with torch.inference_mode():
            logits = model(input_ids=tokens, return_dict=True, use_cache=False).logits[0]
        return cls.of_logits(ids, logits, model.dtype)

    @classmethod
    def of_logits(cls, token_ids: Sequence[int], logits: Tensor, dtype: torch.dtype) -> Probe | None:
        """From the logits (l, vocab) of a model in a dtype; None if they are not finite."""
        logits = logits.double()
        if not torch.isfinite(logits).all():
            return None
        return cls(
            tuple(token_ids),
            tuple(logits.mean(-1).tolist()),
            tuple(logits.std(-1).tolist()),
            tuple(logits.amax(-1).tolist()),
            _TOLERANCES.get(dtype, _HALF_TOLERANCE),
            str(dtype).removeprefix("torch."),
        )

    def difference(self, other: Probe) -> float:
        """The largest difference at any position, in standard deviations of its logits."""
        pairs = ((self.mean, other.mean), (self.deviation, other.deviation), (self.largest, other.largest))
        return max(
            abs(found - wanted) / max(deviation, 1e-12)
            for ours, others in pairs
            for wanted, found, deviation in zip(ours, others, self.deviation, strict=True)
        )


@dataclass(frozen=True)
class Overflow:
    """Where a model's numbers leave the range of the dtype that its weights are stored in.

    Attributes:
        dtype: without ``torch.``. part: the first block, or the head, whose output is not finite.
    """

    dtype: str
    part: str

    @property
    def text(self) -> str:
        wider, convert = "bfloat16 or float32", f"{CONVERT} (or f32)"
        if self.dtype == "bfloat16":
            wider, convert = "float32", CONVERT.replace("bf16", "f32")
        return (
            f"In {self.dtype}, in which the weights are stored, the output of {self.part} is not finite; in float32 it "
            f"is. Run the model in {wider}, or convert it: {convert}."
        )


def probe_tokens(vocabulary: int) -> list[int]:
    """The tokens that a new probe is taken with."""
    return [7919 * (place + 1) % vocabulary for place in range(_PROBE_TOKENS)]


def file_records(folder: Path) -> dict[str, dict[str, Any]]:
    """SHA-256, hexadecimal, and size of every file in a folder except the manifest, by path within it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST_FILE)
    return {
        path.relative_to(folder).as_posix(): {"sha256": file_hash(path), "bytes": path.stat().st_size} for path in paths
    }


def file_hash(path: Path) -> str:
    """SHA-256 of a file, hexadecimal.

    Raises:
        ModelError: a link out of its folder, or no regular file.
    """
    total = hashlib.sha256()
    with confined(path, ModelError).open("rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def write_manifest(
    folder: Path,
    facts: Mapping[str, Any],
    probe: Probe | None,
    overflow: Overflow | None,
    place: Path | None = None,
) -> None:
    """Write the manifest of a folder whose other files are all written; ``facts`` come first.

    Args:
        place: folder to write it into; that folder itself if not given.
    """
    document = {
        **{key: value for key, value in facts.items() if key != "overflow"},
        **({} if overflow is None else {"overflow": asdict(overflow)}),
        "versions": versions(),
        "probe": None if probe is None else asdict(probe),
        "files": file_records(folder),
    }
    ((place or folder) / MANIFEST_FILE).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder.

    Raises:
        ModelError: there is none, or it is broken.
    """
    try:
        return read_json_object(folder / MANIFEST_FILE, ModelError)
    except FileNotFoundError:
        raise ModelError(
            f"{folder} holds no {MANIFEST_FILE}; expected a checkpoint that ghostssm wrote, which says what it holds."
        ) from None


def versions() -> dict[str, str | None]:
    """Of Python and the packages that a result may depend on; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
