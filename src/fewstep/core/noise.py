"""Keyed noise: a pure function of (seed, sample, key), never of global state, batch size, rank or resume point.

A counter-based generator (splitmix64, doi 10.1145/2714064.2660195) evaluated as integer tensor arithmetic: the same
bits on every device, with no Python loop over samples.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import InputError

Seed = int | Sequence[int] | Tensor


def _signed(value: int) -> int:
    """The low 64 bits of ``value`` as the signed number int64 tensors hold."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


_BITS = (1 << 64) - 1
_CONSTANTS = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_GAMMA, _M1, _M2 = (_signed(c) for c in _CONSTANTS)


def _mix(z: Tensor) -> Tensor:
    """splitmix64's finaliser; int64 products wrap, and the masks make the shifts logical."""
    z = (z >> 30).bitwise_and_((1 << 34) - 1).bitwise_xor_(z).mul_(_M1)
    z = (z >> 27).bitwise_and_((1 << 37) - 1).bitwise_xor_(z).mul_(_M2)
    return (z >> 31).bitwise_and_((1 << 33) - 1).bitwise_xor_(z)


def _mixed(z: int) -> int:
    """:func:`_mix` of one number, unsigned."""
    z &= _BITS
    z = (z ^ z >> 30) * _CONSTANTS[1] & _BITS
    z = (z ^ z >> 27) * _CONSTANTS[2] & _BITS
    return z ^ z >> 31


def _word(part: int | str) -> int:
    """A key part as 64 stable bits (Python's own hash of a string changes from process to process)."""
    if isinstance(part, str):
        return _signed(int.from_bytes(blake2b(part.encode(), digest_size=8).digest(), "little"))
    return _signed(part * 0x2545F4914F6CDD1D + 1)


def shown(value: Any) -> str:
    """A wrong value on one short line, for messages: a tensor's own text has many."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:80]}..."


def whole(name: str, value: Any) -> int:
    """A whole number as Python's, from Python, numpy or a tensor of one number.

    Raises:
        InputError: it is none; a truth value, a float and a text are none.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except (TypeError, ValueError):
        raise InputError(f"{name} must be a whole number, got {shown(value)}") from None


def seeds_of(seed: Any) -> int | list[int]:
    """One seed for all samples, or a list with one for each, as Python's whole numbers.

    Raises:
        InputError: something in it is no whole number.
    """
    if isinstance(seed, str | bytes):
        raise InputError(f"a seed must be a whole number, or a list of them, got {shown(seed)}")
    if getattr(seed, "ndim", 0) == 1:
        seed = seed.tolist()
    return [whole("a seed", s) for s in seed] if isinstance(seed, Sequence) else whole("a seed", seed)


@dataclass(frozen=True)
class Noise:
    """A batch of independent noise sources, one 64-bit seed per sample.

    ``noise.normal((3, 32, 32), step, "churn")`` is (B, 3, 32, 32): row i depends on ``seeds[i]`` and the key alone.
    """

    seeds: Tensor

    @classmethod
    def of(cls, seed: Seed, ids: Tensor | int, device: torch.device | str = "cpu") -> Noise:
        """Sources for samples ``ids`` (a tensor of numbers, or a count) of one ``seed``.

        A sequence of seeds gives each sample its own; picture 0 of ``seed=7`` and of ``seed=[7]`` are the same.

        Raises:
            InputError: a seed that is no whole number.
        """
        index = torch.arange(ids) if isinstance(ids, int) else ids
        index = index.to(device, torch.int64)
        seeds = seeds_of(seed)
        if isinstance(seeds, int):
            return cls(_mix((index * _GAMMA).add_(_signed(_mixed(_word(seeds))))))
        own = torch.tensor([_word(s) for s in seeds], dtype=torch.int64, device=device)
        return cls(_mix(_mix(own)[index]))

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: slice | Tensor) -> Noise:
        """The sources of some of the samples."""
        return Noise(self.seeds[index])

    def fold(self, *key: int | str) -> Noise:
        """New sources, a function of these and ``key``: for passing a named part of the randomness on."""
        seeds = self.seeds
        for part in key:
            # A part of a key is the same for all samples: it is mixed as a number, not as a tensor.
            seeds = _mix(seeds + _signed(_mixed(_word(part)) * _CONSTANTS[0]))
        return Noise(seeds)

    def bits(self, count: int, *key: int | str) -> Tensor:
        """(B, count) uniformly distributed int64."""
        counter = torch.arange(1, count + 1, device=self.seeds.device) * _GAMMA if count != 1 else _GAMMA
        return _mix(self.fold(*key).seeds[:, None] + counter)

    def uniform(self, shape: Sequence[int], *key: int | str, dtype: torch.dtype = torch.float32) -> Tensor:
        """(B, *shape) in [0, 1)."""
        # As many bits as the dtype holds exactly: rounding would reach 1, and 2^24 is infinite in half precision.
        digits = min(24, 1 - int(math.log2(torch.finfo(dtype).eps)))
        bits = self.bits(math.prod(shape), *key) >> (64 - digits) & ((1 << digits) - 1)
        return (bits.to(dtype) * 2.0**-digits).reshape(len(self), *shape)

    def normal(self, shape: Sequence[int], *key: int | str, dtype: torch.dtype = torch.float32) -> Tensor:
        """(B, *shape) standard normal, by Box and Muller: each 64-bit word gives two numbers."""
        count = math.prod(shape)
        bits = self.bits((count + 1) // 2, *key)
        wide = torch.float32 if bits.device.type == "mps" else torch.float64
        radius = (((bits >> 32 & 0xFFFFFFFF).to(wide) + 0.5) * 2.0**-32).log_().mul_(-2).sqrt_()
        angle = (bits & 0xFFFFFFFF).to(wide) * (2 * math.pi * 2.0**-32)
        made = torch.empty(len(self), bits.shape[1], 2, dtype=dtype, device=bits.device)
        made[..., 0] = angle.cos().mul_(radius)
        made[..., 1] = angle.sin_().mul_(radius)
        return made.reshape(len(self), -1)[:, :count].reshape(len(self), *shape)

    def integers(self, low: int, high: int, shape: Sequence[int], *key: int | str) -> Tensor:
        """(B, *shape) int64 in [low, high)."""
        bits = self.bits(math.prod(shape), *key) >> 11 & ((1 << 53) - 1)
        return (low + (bits.to(torch.float64) * 2.0**-53 * (high - low)).long()).reshape(len(self), *shape)
