"""How a recurrent state is stored between two tokens: its dtype, scales and rounding, as a readable reference.

Arithmetic is float32 throughout; a state is rounded when it is stored. int8, fp8 (e4m3) and int4 have a float32 scale
for every (head, row of head_dim): the row's largest magnitude after the update, its peak, over the format's largest
number. The other formats are plain tensors.

A scaled state is one tensor of bytes, (b, h, head_bytes): of every head the codes, channel by channel, in each of them
row by row; then the rows' peaks in float32; both padded to 16 bytes. So a cache reorders, resets and moves it like any
other; zeros are a state of zeros. int4 has two numbers to a byte: channel k in the lower half, channel k + ceil(n / 2)
in the upper.

In tiers every head has a number of channels in 8 bits, then a number in 4, and stores none of the others; both tiers
share a row's peak. Such a state is (b, bytes): head by head what (b, h, head_bytes) has, of another size for each.

Shape letters as in `ghostssm.ops.ssd`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ghostssm.errors import InputError, unknown_name

_ALIGNMENT = 16
_LEAST_PEAK = 1e-30
"""Rows whose largest magnitude is smaller are stored as zeros; the inverse of their scale would overflow."""
_Word = TypeVar("_Word", int, Tensor)
_WORD = 0xFFFFFFFF
_GOLDEN = 0x9E3779B1

Tiers = tuple[tuple[int, int], ...]
"""For every head of a mixer how many of its state's first channels are stored in 8 bits, and of the next in 4."""


@dataclass(frozen=True)
class StateFormat:
    """A dtype of the state; compared by value, since a copy of a model has copies of these.

    Attributes:
        kind: number by which compiled loops and kernels know the format.
        bits: per number. largest: magnitude that a row's largest is scaled to; None without scales.
        mantissa, bias: of a floating-point format, bits and exponent bias.
        dtype: torch's, None for int4.
    """

    name: str
    kind: int
    bits: int
    dtype: torch.dtype | None
    largest: float | None = None
    mantissa: int = 0
    bias: int = 0

    @property
    def scaled(self) -> bool:
        return self.largest is not None

    @property
    def scale_bytes(self) -> int:
        """Per row."""
        return 4 if self.scaled else 0

    def row_bytes(self, n: int) -> int:
        """Of a row's numbers."""
        return -(-n * self.bits // 8)

    def state_bytes(self, rows: int, n: int) -> int:
        """Of so many rows of n numbers, scales included and padding left out."""
        return rows * (self.row_bytes(n) + self.scale_bytes)

    def tiers_of(self, heads: int, n: int) -> Tiers:
        """How many channels of each head a scaled format has in 8 and in 4 bits."""
        return ((0, n) if self.bits == 4 else (n, 0),) * heads

    def places(self, heads: int, p: int, n: int) -> tuple[list[int], list[int]]:
        """Of every head of a stored scaled state the first byte of its codes and of its peaks."""
        codes, peaks, place = [], [], 0
        for wide, narrow in self.tiers_of(heads, n):
            codes.append(place)
            peaks.append(place + _padded(p * (INT8.row_bytes(wide) + INT4.row_bytes(narrow))))
            place = peaks[-1] + _padded(4 * p)
        return codes, peaks

    def model_bytes(self, rows: int, sizes: Sequence[int], tiers: Sequence[Tiers] = ()) -> int:
        """Of one sequence over all mixers of a model, scales included and padding left out.

        Args:
            rows: of each of them. sizes: of their states. tiers: of the mixers; empty if the model says nothing of it.

        Raises:
            InputError: this is the format of tiers, and there are none.
        """
        return sum(self.state_bytes(rows, size) for size in sizes)

    @classmethod
    def of(cls, given: str | torch.dtype | StateFormat) -> StateFormat:
        """By name or torch dtype.

        Raises:
            InputError: there is no such format.
        """
        if isinstance(given, StateFormat):
            return given
        for state_format in (*FORMATS.values(), TIERS):
            if given == state_format.name or (given is not None and given == state_format.dtype):
                return state_format
        raise unknown_name("state dtype", str(given), FORMATS)


@dataclass(frozen=True)
class TieredFormat(StateFormat):
    """The states of one mixer in tiers.

    Attributes:
        tiers: None before the mixer is known.
    """

    tiers: Tiers | None = None

    def model_bytes(self, rows: int, sizes: Sequence[int], tiers: Sequence[Tiers] = ()) -> int:
        forms = [self.for_tiers(each) for each in tiers] or [self.for_tiers(None)]
        return sum(form.state_bytes(rows, size) for form, size in zip(forms, sizes, strict=True))

    def for_tiers(self, tiers: Tiers | None) -> TieredFormat:
        """Of one mixer.

        Raises:
            InputError: it has none.
        """
        if tiers is None:
            raise InputError(
                "The state dtype is tiers, but the model does not say how many channels it keeps in how many bits; "
                "expected a model for which `ghostssm prune --method balanced` chose tiers, with --state-bytes or "
                f"--max-excess-loss, or one of {', '.join(FORMATS)}."
            )
        return replace(self, tiers=tiers)

    def state_bytes(self, rows: int, n: int) -> int:
        """Of a mixer's rows, head by head as many, however many channels they had; scales included."""
        assert self.tiers is not None
        return rows // len(self.tiers) * sum(tier_bytes(wide, narrow) for wide, narrow in self.tiers)

    def tiers_of(self, heads: int, n: int) -> Tiers:
        assert self.tiers is not None
        return self.tiers


def tier_bytes(wide: int, narrow: int) -> int:
    """Of a row with so many numbers in 8 and in 4 bits, its scale included.

    A row of none needs no scale: the room that `StateFormat.places` leaves for it is padding.
    """
    return INT8.row_bytes(wide) + INT4.row_bytes(narrow) + (INT8.scale_bytes if wide + narrow else 0)


FLOAT32 = StateFormat("float32", 0, 32, torch.float32)
BFLOAT16 = StateFormat("bfloat16", 1, 16, torch.bfloat16, mantissa=7, bias=127)
FLOAT16 = StateFormat("float16", 2, 16, torch.float16, mantissa=10, bias=15)
INT8 = StateFormat("int8", 3, 8, torch.int8, largest=127.0)
FP8 = StateFormat("fp8", 4, 8, torch.float8_e4m3fn, largest=448.0, mantissa=3, bias=7)
INT4 = StateFormat("int4", 5, 4, None, largest=7.0)
FORMATS = {each.name: each for each in (FLOAT32, BFLOAT16, FLOAT16, INT8, FP8, INT4)}
TIERS = TieredFormat("tiers", 6, 8, None, largest=127.0)
"""For models that say how many channels of each head are kept in how many bits."""


@dataclass(frozen=True)
class StateStorage:
    """How a model stores its states: the format, and how it rounds.

    Attributes:
        stochastic: to one of the two neighbours, each as likely as it is near, so that the mean is the number itself;
            else to the nearest, ties to even.
        seed: of the random numbers, each of which depends on seed, layer, sequence, token, head, row and column only.
        layer: of the model. sequence: number of a batch's first sequence. token: how many tokens came before.
    """

    format: StateFormat = FLOAT32
    stochastic: bool = False
    seed: int = 0
    layer: int = 0
    sequence: int = 0
    token: int = 0

    @classmethod
    def of(cls, dtype: str | torch.dtype | StateFormat, rounding: str = "nearest", seed: int = 0) -> StateStorage:
        """As users say it.

        Raises:
            InputError: an unknown dtype or rounding, or stochastic rounding of float32.
        """
        if rounding not in ("nearest", "stochastic"):
            raise InputError(f"The state rounding is {rounding!r}; expected nearest or stochastic.")
        form = StateFormat.of(dtype)
        if rounding == "stochastic" and form == FLOAT32:
            raise InputError(
                "A float32 state is not rounded; expected a narrower state dtype with stochastic rounding."
            )
        return cls(form, rounding == "stochastic", seed)

    @property
    def rounds(self) -> bool:
        return self.format != FLOAT32

    @property
    def key(self) -> int:
        """Of seed and layer, 32 bits."""
        low, high = self.seed & _WORD, self.seed >> 32 & _WORD
        return _mix(_mix(_mix(low) + high) + self.layer)

    def at(self, layer: int, token: int) -> StateStorage:
        return replace(self, layer=layer, token=token)

    def with_tiers(self, tiers: Tiers | None) -> StateStorage:
        """For a mixer with these tiers, if the format is one of tiers.

        Raises:
            InputError: it is, and the mixer has none.
        """
        if not isinstance(self.format, TieredFormat):
            return self
        return replace(self, format=self.format.for_tiers(tiers))


FLOAT32_STORAGE = StateStorage()
"""The state as it is computed."""


def quantise(state: Tensor, storage: StateStorage) -> Tensor:
    """A state as it is stored.

    Args:
        state: (b, h, p, n), float32, after the token ``storage.token``.

    Returns:
        (b, h, head_bytes) uint8 if the format is scaled, (b, bytes) uint8 if it has tiers, else (b, h, p, n) in the
        format's dtype. Numbers beyond float16's largest are stored as that.
    """
    state, form = state.float(), storage.format
    if not storage.rounds:
        return state.contiguous()
    if isinstance(form, TieredFormat):
        return _in_tiers(state, storage, form)
    if form.largest is None:
        assert form.dtype is not None
        bound = torch.finfo(form.dtype).max
        return _to_minifloat(state.clamp(-bound, bound), storage).contiguous()
    peak = _peaks(state)
    if form == FP8:
        codes = _to_minifloat(state * _inverse(peak, form.largest), storage).view(torch.uint8)
    else:
        noise = _uniform(storage, state) - 0.5 if storage.stochastic else torch.zeros(())
        codes = _integers(state, peak, noise, form)
    return _stored(codes, peak)


def _stored(codes: Tensor, peak: Tensor) -> Tensor:
    """The bytes of codes (..., p, bytes of a row) and peaks (..., p, 1)."""
    parts = [codes.transpose(-1, -2).flatten(-2), peak.view(torch.uint8).flatten(-2)]
    return torch.cat([F.pad(part, (0, _padded(part.shape[-1]) - part.shape[-1])) for part in parts], dim=-1)


def _peaks(rows: Tensor) -> Tensor:
    """The largest magnitude of each row (..., n), (..., 1); 0 for what is stored as zeros."""
    peak = rows.abs().amax(-1, keepdim=True)
    return torch.where(peak >= _LEAST_PEAK, peak, 0.0)


def _inverse(peak: Tensor, largest: float) -> Tensor:
    return torch.where(peak > 0, largest / peak, 0.0)


def _integers(rows: Tensor, peak: Tensor, noise: Tensor, form: StateFormat) -> Tensor:
    """The bytes of rows (..., n) in int8 or int4."""
    assert form.largest is not None
    scaled = rows * _inverse(peak, form.largest) + noise
    codes = scaled.clamp(-form.largest, form.largest).round().to(torch.int8).view(torch.uint8)
    if form == INT8:
        return codes
    half = -(-codes.shape[-1] // 2)
    upper = F.pad(codes[..., half:], (0, 2 * half - codes.shape[-1]))
    return (codes[..., :half] & 15) | (upper << 4)


def _in_tiers(state: Tensor, storage: StateStorage, form: TieredFormat) -> Tensor:
    """A state in tiers; each tier of a row draws its random numbers as if it were alone."""
    assert form.tiers is not None
    noises = _uniform(storage, state) - 0.5 if storage.stochastic else torch.zeros(()).expand(state.shape)
    parts = []
    for head, (wide, narrow) in enumerate(form.tiers):
        rows, noise = state[:, head, :, : wide + narrow], noises[:, head]
        peak = _peaks(F.pad(rows, (0, 1)))
        codes = [
            _integers(rows[..., :wide], peak, noise[..., :wide], INT8),
            _integers(rows[..., wide:], peak, noise[..., :narrow], INT4),
        ]
        parts.append(_stored(torch.cat(codes, dim=-1), peak))
    return torch.cat(parts, dim=-1)


def _of_tiers(stored: Tensor, form: TieredFormat, p: int, n: int) -> Tensor:
    """`dequantise` of a state in tiers: zeros in channels that are not stored."""
    assert form.tiers is not None
    state = stored.new_zeros(stored.shape[0], len(form.tiers), p, n, dtype=torch.float32)
    for head, (wide, narrow), codes_at, peaks_at in zip(count(), form.tiers, *form.places(len(form.tiers), p, n)):
        codes, peak = _codes_and_peaks(stored, codes_at, peaks_at, p, wide + INT4.row_bytes(narrow))
        eight, four = (peak * torch.tensor(1 / each, dtype=torch.float32) for each in (127.0, 7.0))
        state[:, head, :, :wide] = codes[..., :wide].contiguous().view(torch.int8).float() * eight
        state[:, head, :, wide : wide + narrow] = _halves(codes[..., wide:], narrow) * four
    return state


def _codes_and_peaks(stored: Tensor, codes_at: int, peaks_at: int, p: int, width: int) -> tuple[Tensor, Tensor]:
    """Of heads (..., bytes) the codes (..., p, width), uint8, and the peaks (..., p, 1), float32."""
    codes = stored[..., codes_at : codes_at + p * width].unflatten(-1, (width, p)).transpose(-1, -2)
    peak = stored[..., peaks_at : peaks_at + 4 * p].contiguous().view(torch.float32)[..., None]
    return codes, peak


def dequantise(stored: Tensor, form: StateFormat, p: int, n: int) -> Tensor:
    """A stored state's numbers, (b, h, p, n), float32."""
    if isinstance(form, TieredFormat):
        return _of_tiers(stored, form, p, n)
    if form.largest is None:
        return stored.float()
    (codes_at,), (peaks_at,) = form.places(1, p, n)
    codes, peak = _codes_and_peaks(stored, codes_at, peaks_at, p, form.row_bytes(n))
    if form == FP8:
        numbers = codes.contiguous().view(torch.float8_e4m3fn).float()
    elif form == INT8:
        numbers = codes.contiguous().view(torch.int8).float()
    else:
        numbers = _halves(codes, n)
    scales = peak * torch.tensor(1 / form.largest, dtype=torch.float32)
    restored: Tensor = numbers * scales
    return restored


def _halves(codes: Tensor, n: int) -> Tensor:
    """The n numbers of int4 rows."""
    halves = torch.cat([codes << 4, codes & 0xF0], dim=-1)[..., :n]
    return halves.contiguous().view(torch.int8).float() / 16


def _to_minifloat(values: Tensor, storage: StateStorage) -> Tensor:
    """Floats in the format's dtype; none is beyond its largest number by more than rounding."""
    form = storage.format
    assert form.dtype is not None
    if storage.stochastic:
        exponent = torch.frexp(values).exponent - 1
        step = torch.exp2((exponent.clamp_min(1 - form.bias) - form.mantissa).double())
        noise = _words(storage, values) >> (9 + form.mantissa)
        noise = noise / 2.0 ** (23 - form.mantissa)
        below = torch.floor(values.double().abs() / step + noise) * step
        values = torch.copysign(below.clamp_max(torch.finfo(form.dtype).max), values).float()
    return values.to(form.dtype)


def _uniform(storage: StateStorage, like: Tensor) -> Tensor:
    """In [0, 1), float32, 24 bits each."""
    return (_words(storage, like) >> 8).float() / (1 << 24)


def _words(storage: StateStorage, like: Tensor) -> Tensor:
    """A random word of 32 bits for every number of a state (b, h, p, n), int64."""
    b, h, p, n = like.shape
    sequence = torch.arange(storage.sequence, storage.sequence + b, device=like.device)[:, None, None, None]
    rows = torch.arange(h * p, device=like.device).view(h, p, 1)
    columns = torch.arange(n, device=like.device) * _GOLDEN & _WORD
    word = _mix(_mix(_mix(storage.key + sequence) + storage.token) + rows)
    return _mix(word ^ columns)


def _mix(word: _Word) -> _Word:
    """A bijection of 32-bit words in which every bit depends on all (C. Wellons, "hash prospector", lowbias32)."""
    word = word & _WORD
    word = (word ^ (word >> 16)) * 0x7FEB352D & _WORD
    word = (word ^ (word >> 15)) * 0x846CA68B & _WORD
    return word ^ (word >> 16)


def _padded(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT
