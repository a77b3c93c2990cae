"""Feature extractors: what a picture is turned into before two sets of pictures are compared.

Every score here is a statement about one extractor, so an extractor carries a name and a fingerprint of its weights,
and the cached statistics of the real data are filed under that fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from math import prod
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.errors import InputError

WEIGHTS = Path(__file__).parent / "weights" / "digits.safetensors"


@runtime_checkable
class Extractor(Protocol):
    """Pictures (B, C, H, W), float in [-1, 1], to features (B, dim) float32.

    ``fingerprint`` is a hash of everything that decides the features (weights and settings): two extractors with the
    same fingerprint must give the same features, because cached reference statistics are found by it.
    """

    name: str
    dim: int
    fingerprint: str

    def __call__(self, images: Tensor) -> Tensor:
        """The features (B, dim), float32, of ``images`` (B, C, H, W) in [-1, 1]."""
        ...


@runtime_checkable
class Classifier(Extractor, Protocol):
    """An extractor that also says what it sees: needed for label accuracy and mode coverage."""

    channels: int

    def classify(self, images: Tensor) -> Tensor:
        """Log-probabilities (B, 10), or (B, channels, 10) where every channel is a digit of its own."""
        ...


def snap_digits(images: Tensor) -> Tensor:
    """Pictures in [-1, 1] rounded to the 17 grey levels (0, 1, ..., 16, as level / 8 - 1) that the digits data have.

    A generator's output is continuous and the data are not; without rounding, a score would partly measure that.
    """
    return (((images + 1) * 8).round() / 8 - 1).clamp(-1, 1)


class DigitsNet(nn.Module):
    """A small convolutional classifier of 8x8 one-channel digits: 64 penultimate features, 10 classes, 82 000 weights.

    Calling it gives the features; :meth:`logits` gives the class scores. Group normalisation, so that the features of a
    picture do not depend on the others in its batch.
    """

    dim = 64

    def __init__(self) -> None:
        super().__init__()

        def block(before: int, after: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(8, after), nn.SiLU())

        self.body = nn.Sequential(
            *(block(1, 32), block(32, 32), nn.AvgPool2d(2)),
            *(block(32, 64), block(64, 64), nn.AvgPool2d(2)),
            *(nn.Flatten(), nn.Linear(256, self.dim), nn.SiLU()),
        )
        self.head = nn.Linear(self.dim, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, 64) of pictures (B, 1, 8, 8) in [-1, 1]."""
        return self.body(images)

    def logits(self, images: Tensor) -> Tensor:
        """Class scores (B, 10), not normalised, of pictures (B, 1, 8, 8) in [-1, 1]."""
        return self.head(self.body(images))


def require_shape(images: Tensor, shape: tuple[int, int, int], name: str) -> None:
    """Raises InputError unless ``images`` are (B, *shape)."""
    if images.ndim != 4 or tuple(images.shape[1:]) != shape:
        raise InputError(
            f"extractor {name!r} got images {tuple(images.shape)}, expected (B, {', '.join(map(str, shape))}): "
            f"pass a batch of such pictures or choose an extractor made for yours"
        )


class DigitsExtractor:
    """64 features of a packaged :class:`DigitsNet` per channel, for digits (1 channel) and stacked digits (3 channels).

    Args:
        net: the network, in evaluation mode from here on.
        channels: number of digits in a picture, one per channel; features of the channels are concatenated.
        snap: round pictures to the data's 17 grey levels first (see :func:`snap_digits`).
        fingerprint: hash of the network's weights.
        device: where the network runs. Pictures are moved there in the batches they come in; features stay there.
    """

    def __init__(
        self, net: DigitsNet, *, channels: int, snap: bool, fingerprint: str, device: torch.device | str = "cpu"
    ) -> None:
        self.name = "digits" if channels == 1 else "stacked-digits"
        self.channels, self.snap, self.device = channels, snap, torch.device(device)
        self.dim = channels * net.dim
        self.fingerprint = digest(f"{self.name} {channels} {snap} {fingerprint}".encode())
        self.net = net.to(self.device).eval().requires_grad_(False)

    def _single(self, images: Tensor) -> Tensor:
        require_shape(images, (self.channels, 8, 8), self.name)
        images = images.to(self.device, torch.float32)
        return (snap_digits(images) if self.snap else images).reshape(-1, 1, 8, 8)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, 64 * channels), float32.

        Raises:
            InputError: the pictures are not (B, channels, 8, 8).
        """
        return self.net(self._single(images)).reshape(len(images), self.dim)

    @torch.no_grad()
    def classify(self, images: Tensor) -> Tensor:
        """Log-probabilities of the ten digits: (B, 10), or (B, channels, 10) for stacked digits.

        Raises:
            InputError: the pictures are not (B, channels, 8, 8).
        """
        return self.seen(images)[1]

    @torch.no_grad()
    def seen(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and log-probabilities, as calling it and :meth:`classify` give them, by one pass."""
        features = self.net(self._single(images))
        scores = self.net.head(features).log_softmax(1)
        shape = (len(images), 10) if self.channels == 1 else (len(images), self.channels, 10)
        return features.reshape(len(images), self.dim), scores.reshape(shape)


class PixelExtractor:
    """The pixels themselves as features, flattened: nothing is overlooked and nothing is understood.

    Args:
        shape: (C, H, W) of the pictures.
        snap: round to the grey levels of the digits data first (see :func:`snap_digits`).

    Raises:
        InputError: more than 4096 pixels, whose covariance would be too large to be useful.
    """

    def __init__(self, shape: tuple[int, int, int], *, snap: bool = False) -> None:
        self.name, self.shape, self.snap = "pixel", (shape[0], shape[1], shape[2]), snap
        self.dim = prod(shape)
        if self.dim > 4096:
            raise InputError(
                f"pixel features of shape {tuple(shape)} have {self.dim} dimensions, expected at most 4096: "
                f"leave the metric 'pixel_fd' out or shrink the pictures first"
            )
        self.fingerprint = digest(f"pixel {self.shape} {snap}".encode())

    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, C * H * W), float32.

        Raises:
            InputError: the pictures do not have this extractor's shape.
        """
        require_shape(images, self.shape, self.name)
        images = images.detach().float()
        return (snap_digits(images) if self.snap else images).flatten(1)


def digest(content: bytes) -> str:
    """16 hex digits of the sha256 of some bytes."""
    return hashlib.sha256(content).hexdigest()[:16]


def digits_extractor(device: torch.device | str = "cpu", *, channels: int = 1, snap: bool = True) -> DigitsExtractor:
    """The packaged digits network as an extractor.

    Args:
        device: where it runs.
        channels: digits per picture: 1 for the digits data, 3 for stacked digits.
        snap: round pictures to the data's 17 grey levels first (see :func:`snap_digits`).
    """
    net = DigitsNet()
    net.load_state_dict(load_file(WEIGHTS), strict=True)
    fingerprint = digest(WEIGHTS.read_bytes())
    return DigitsExtractor(net, channels=channels, snap=snap, fingerprint=fingerprint, device=device)


def digits_metadata() -> dict[str, str]:
    """What the training script wrote beside the packaged weights: held-out accuracy, split, seeds."""
    return metadata_of(WEIGHTS)


def metadata_of(path: Path) -> dict[str, str]:
    """The metadata in the head of a safetensors file."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size)).get("__metadata__", {})
