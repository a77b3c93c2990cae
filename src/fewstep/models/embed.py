"""What a network is told beside the picture: the time and the class."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fewstep.core.cond import Cond
from fewstep.errors import InputError


class Embedding(nn.Module):
    """Time and class -> (B, width). Classes are 0 .. classes-1; -1 is "no class" and has a row of its own."""

    def __init__(self, width: int, classes: int, *, bands: int = 64, top: float = 16.0) -> None:
        super().__init__()
        self.classes = classes
        # Geometric frequencies: c_noise = ln(sigma)/4 lies in about [-2, 2], where the smoothness must be moderate.
        self.register_buffer("frequencies", torch.logspace(-1, math.log10(top), bands // 2), persistent=False)
        self.time = nn.Sequential(nn.Linear(bands, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(classes + 1, width) if classes else None
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=0.1)

    def forward(self, time: Tensor, cond: Cond) -> Tensor:
        """``time`` (B,), ``cond["label"]`` (B,) int64 when there are classes (absent counts as "no class").

        Raises:
            InputError: a label where the network has no classes.
        """
        frequencies: Tensor = self.frequencies  # type: ignore[assignment]
        phase = time[:, None] * frequencies * math.pi
        waves = torch.cat([phase.cos(), phase.sin()], 1).to(next(self.time.parameters()).dtype)
        out: Tensor = self.time(waves)
        label = cond.get("label")
        if self.label is None:
            if label is not None:
                raise InputError("this network has no classes: leave the label out of the condition")
            return out
        if label is None:
            label = torch.full((len(time),), -1, device=time.device)
        return out + self.label(torch.where(label < 0, self.classes, label))
