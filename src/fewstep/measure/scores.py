"""Scores by what a classifier or a text encoder sees: Inception score, and how well pictures fit their prompts."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fewstep.errors import InputError

SPLITS = 10


class Split(NamedTuple):
    """A score and its standard error."""

    value: float
    error: float

    @classmethod
    def of(cls, values: Tensor) -> Split:
        """The mean of values (N,), and its own error."""
        error = float(values.std()) / len(values) ** 0.5 if len(values) > 1 else float("nan")
        return cls(float(values.mean()), error)


class InceptionScore:
    """The exponential of the mean divergence of class probabilities from their mean (arXiv 1606.03498), streaming.

    As published, the pictures fall into ten splits, here by the remainder of their ids, and the mean over the splits is
    the score. It knows nothing of the real pictures, and means something only for the classes of its network.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(SPLITS, dtype=torch.float64)
        self.entropies = torch.zeros(SPLITS, dtype=torch.float64)
        self.shares: Tensor | None = None

    def update(self, log_probabilities: Tensor, ids: Tensor) -> InceptionScore:
        """Takes in log-probabilities (B, classes) of pictures with ids (B,). Returns itself."""
        logs = log_probabilities.detach().cpu().double()
        if self.shares is None:
            self.shares = torch.zeros(SPLITS, logs.shape[1], dtype=torch.float64)
        own = ids % SPLITS
        self.counts.index_add_(0, own, torch.ones(len(own), dtype=torch.float64))
        self.entropies.index_add_(0, own, (logs.exp() * logs).sum(1))
        self.shares.index_add_(0, own, logs.exp())
        return self

    def all_reduce(self) -> InceptionScore:
        """Joins the pictures of all processes. Returns itself."""
        assert self.shares is not None
        for held in (self.counts, self.entropies, self.shares):
            dist.all_reduce(held)
        return self

    def score(self) -> Split:
        """The mean over the splits, at least 1, and its standard error.

        Raises:
            InputError: a split without pictures.
        """
        if self.shares is None or bool((self.counts < 1).any()):
            raise InputError(
                f"Inception score of {int(self.counts.sum())} pictures, expected some in each of {SPLITS} splits: "
                f"give more pictures"
            )
        mean = self.shares / self.counts[:, None]
        values = (self.entropies / self.counts - torch.special.xlogy(mean, mean).sum(1)).exp()
        return Split(float(values.mean()), float(values.std() / SPLITS**0.5))


def clip_values(images: Tensor, prompts: Tensor) -> Tensor:
    """(N,) float64: ``100 max(cos, 0)`` between pictures and their prompts (arXiv 2104.08718).

    Args:
        images: (N, dim) embeddings of length 1.
        prompts: (N, dim), of the prompt of each picture.

    Raises:
        InputError: embeddings of different shapes.
    """
    if images.shape != prompts.shape:
        raise InputError(
            f"CLIP score of embeddings {tuple(images.shape)} and {tuple(prompts.shape)}, expected as many prompts as "
            f"pictures"
        )
    return 100 * (images.double() * prompts.double()).sum(1).clamp(min=0)


def clip_score(images: Tensor, prompts: Tensor) -> Split:
    """Mean of :func:`clip_values` and its standard error.

    Raises:
        InputError: no pictures, or embeddings of different shapes.
    """
    if not len(images):
        raise InputError("CLIP score of 0 pictures, expected at least 1: give more pictures")
    return Split.of(clip_values(images, prompts))
