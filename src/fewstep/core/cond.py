"""Conditions: plain mappings from a name to a tensor whose first dimension is the batch.

``{"label": (B,) int64}`` for class-conditional models (-1 is "no class"), ``{"prompt_embeds": (B, T, C), ...}`` for
text-conditional ones. Nothing else about conditioning is known outside the network that reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.core.noise import Noise, shown
from fewstep.errors import InputError, unknown

Cond = Mapping[str, Tensor]


class Batch(NamedTuple):
    """Training material: pictures ``x`` (B, C, H, W) in [-1, 1], None where a method needs none, and conditions.

    ``noise`` (B, C, H, W) is the unit noise that a teacher made each picture from, where the data are such pairs.
    """

    x: Tensor | None
    cond: dict[str, Tensor]
    noise: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        x, noise = (None if t is None else t.to(device, non_blocking=True) for t in (self.x, self.noise))
        return Batch(x, {k: v.to(device, non_blocking=True) for k, v in self.cond.items()}, noise)


def tensors(cond: Mapping[str, Any]) -> dict[str, Tensor]:
    """``cond`` with tensors for values, each with a row per sample: lists and arrays of numbers are converted.

    Whole numbers become int64, as labels are.

    Raises:
        InputError: a name that is no text, or a value that is no row of numbers per sample.
    """
    out: dict[str, Tensor] = {}
    for name, value in cond.items():
        if not isinstance(name, str):
            raise InputError(f"a condition needs a name such as 'label', got {name!r}")
        try:
            made = value if isinstance(value, Tensor) else torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            raise InputError(f"cond[{name!r}] must be a tensor with a row per sample, got {shown(value)}") from None
        if made.ndim == 0:
            raise InputError(f"cond[{name!r}] must have a row per sample, got the single value {made.item()!r}")
        narrow = not isinstance(value, Tensor) or name == "label"
        whole = not (made.is_floating_point() or made.is_complex() or made.dtype == torch.bool)
        out[name] = made.long() if narrow and whole else made
    return out


Nulls = Mapping[str, Tensor | None]
"""What stands for "no condition": one example without batch dimension, or None where an entry is kept as it is."""


def null(cond: Cond, nulls: Nulls | None = None) -> dict[str, Tensor]:
    """The unconditional partner of ``cond``, for guidance and for condition dropout.

    ``label`` becomes -1 and ``image`` 0, the middle grey. Every other entry is from ``nulls`` (one example without
    batch dimension, such as the embedding of the empty prompt) and broadcast over the batch; None keeps it, as for the
    size that a model is told.

    Raises:
        InputError: an entry has no known null.
    """
    out: dict[str, Tensor] = {}
    for name, value in cond.items():
        if nulls is not None and name in nulls:
            own = nulls[name]
            out[name] = value if own is None else own.to(value).expand_as(value)
        elif name == "label":
            out[name] = torch.full_like(value, -1)
        elif name == "image":
            out[name] = torch.zeros_like(value)
        else:
            raise InputError(f"condition {name!r} has no null value: pass it in `nulls` (known: {sorted(nulls or {})})")
    return out


def cat(conds: Sequence[Cond]) -> dict[str, Tensor]:
    """Joins conditions along the batch.

    Raises:
        InputError: the conditions do not have the same names.
    """
    if any(set(c) != set(conds[0]) for c in conds):
        raise InputError(f"cannot join conditions with different names: {[sorted(c) for c in conds]}")
    return {name: torch.cat([c[name] for c in conds]) for name in conds[0]} if conds else {}


def take(cond: Cond | None, index: Tensor | slice) -> dict[str, Tensor]:
    """The rows ``index`` of a condition (None counts as no condition)."""
    return {} if cond is None else {name: value[index] for name, value in cond.items()}


def drop(cond: Cond, mask: Tensor, nulls: Nulls | None = None) -> dict[str, Tensor]:
    """``cond`` with the rows where ``mask`` (B,) is true replaced by their null: classifier-free guidance's dropout."""
    empty = null(cond, nulls)
    return {k: torch.where(mask.reshape(-1, *[1] * (v.ndim - 1)), empty[k], v) for k, v in cond.items()}


@dataclass(frozen=True)
class Classes:
    """Where a class-conditional generator's conditions come from: labels with these frequencies.

    Attributes:
        frequencies: share of each class, in any unit.
        names: what the classes are called, if they have names.
    """

    frequencies: tuple[float, ...]
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.frequencies) < 1 or min(self.frequencies) < 0 or not sum(self.frequencies) > 0:
            raise InputError(f"class frequencies must be >= 0 and not all 0, got {self.frequencies}")

    def draw(self, noise: Noise) -> dict[str, Tensor]:
        """One label per source, a function of its seed alone."""
        edges = torch.tensor(self.frequencies, dtype=torch.float64, device=noise.seeds.device).cumsum(0)
        place = noise.uniform((), "label", dtype=torch.float64) * edges[-1]
        return {"label": torch.searchsorted(edges, place, right=True).clamp(max=len(edges) - 1)}

    def check(self, cond: Cond) -> None:
        """Raises InputError for anything but labels (B,), whole numbers that are -1 (no class) or a class."""
        for name in cond:
            if name != "label":
                raise unknown("condition of a generator with classes", name, ("label",))
        label = cond.get("label")
        if label is None:
            return
        if label.ndim != 1 or label.is_floating_point() or label.is_complex() or label.dtype == torch.bool:
            told = f"{str(label.dtype).removeprefix('torch.')} of shape {tuple(label.shape)}"
            raise InputError(f"labels must be one whole number per sample, int64 of shape (B,), got {told}")
        wrong = label[(label < -1) | (label >= len(self.frequencies))]
        if len(wrong):
            top = len(self.frequencies) - 1
            raise InputError(f"label {int(wrong[0])} is out of range: classes are 0 to {top}, and -1 for none")
