"""The packaged networks for CIFAR-10 at 8 and 32 pixels: small enough to travel with the library."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.errors import InputError
from fewstep.measure.features import digest, metadata_of, require_shape

# Kernel and stride of the first layer, and channels at each resolution; the last ones are the features.
LAYOUTS: dict[int, tuple[int, int, tuple[int, ...]]] = {8: (3, 1, (32, 64)), 32: (4, 2, (32, 64, 128))}
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def cifar_weights(side: int) -> Path:
    """Where the weights for pictures of ``side`` pixels, 8 or 32, lie if this installation has them."""
    return Path(__file__).parent / "weights" / f"cifar10-{side}.safetensors"


class _Residual(nn.Module):
    """Two convolutions after normalisation beside the identity, (B, C, H, W) to the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_normal(channels), _same(channels), *_normal(channels), _same(channels))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.body(x)
        return found


def _normal(channels: int) -> tuple[nn.Module, nn.Module]:
    return nn.GroupNorm(8, channels), nn.SiLU()


def _same(channels: int) -> nn.Module:
    return nn.Conv2d(channels, channels, 3, padding=1)


class CifarNet(nn.Module):
    """A small residual classifier of CIFAR-10: its pooled last layer are the features, and a linear head the classes.

    64 features and 113 000 weights at 8 pixels, 128 and 188 000 at 32. Calling it gives the features; :meth:`logits`
    gives the class scores. Group normalisation, so that the features of a picture do not depend on the others in its
    batch.

    Args:
        side: of the pictures in pixels, 8 or 32.

    Raises:
        InputError: another side.
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        if side not in LAYOUTS:
            raise InputError(f"CifarNet of {side} pixels, expected 8 or 32: resize the pictures")
        kernel, stride, channels = LAYOUTS[side]
        layers: list[nn.Module] = [nn.Conv2d(3, channels[0], kernel, stride, padding=1)]
        for before, after in pairwise(channels):
            layers += [_Residual(before), nn.Conv2d(before, after, 3, 2, padding=1)]
        if side == 8:
            layers.append(_Residual(channels[-1]))
        self.side, self.dim = side, channels[-1]
        self.body = nn.Sequential(*layers, *_normal(self.dim), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(self.dim, len(CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, dim) of pictures (B, 3, side, side) in [-1, 1]."""
        found: Tensor = self.body(images)
        return found

    def logits(self, images: Tensor) -> Tensor:
        """Class scores (B, 10), not normalised, of pictures (B, 3, side, side) in [-1, 1]."""
        found: Tensor = self.head(self.body(images))
        return found


class CifarExtractor:
    """The features of a packaged :class:`CifarNet`, and the class it sees.

    Args:
        net: the network, in evaluation mode from here on.
        fingerprint: hash of the network's weights.
        device: where the network runs. Pictures are moved there in the batches they come in; features stay there.
    """

    channels = 1

    def __init__(self, net: CifarNet, *, fingerprint: str, device: torch.device | str = "cpu") -> None:
        self.name, self.dim, self.shape = f"cifar10-{net.side}", net.dim, (3, net.side, net.side)
        self.device = torch.device(device)
        self.fingerprint = digest(f"{self.name} {fingerprint}".encode())
        self.net = net.to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, dim), float32.

        Raises:
            InputError: the pictures are not (B, 3, side, side).
        """
        found: Tensor = self.net(self._placed(images))
        return found

    @torch.no_grad()
    def classify(self, images: Tensor) -> Tensor:
        """Log-probabilities (B, 10) of the ten classes.

        Raises:
            InputError: the pictures are not (B, 3, side, side).
        """
        return self.seen(images)[1]

    @torch.no_grad()
    def seen(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and log-probabilities, as calling it and :meth:`classify` give them, by one pass."""
        features = self(images)
        return features, self.net.head(features).log_softmax(1)

    def _placed(self, images: Tensor) -> Tensor:
        require_shape(images, self.shape, self.name)
        return images.to(self.device, torch.float32)


def cifar_extractor(side: int, device: torch.device | str = "cpu") -> CifarExtractor:
    """The packaged CIFAR-10 network as an extractor.

    Args:
        side: of the pictures in pixels, 8 or 32.
        device: where it runs.

    Raises:
        InputError: another side, or one whose weights this installation lacks.
    """
    net, path = CifarNet(side), cifar_weights(side)
    if not path.is_file():
        raise InputError(
            f"this installation has no weights of extractor 'cifar10-{side}': train them with "
            f"benchmarks/train_cifar_features.py --side {side}, or choose 'pixel'"
        )
    # Stored in half precision, computed in single.
    net.load_state_dict({name: value.float() for name, value in load_file(path).items()}, strict=True)
    return CifarExtractor(net, fingerprint=digest(path.read_bytes()), device=device)


def cifar_metadata(side: int) -> dict[str, str]:
    """What the training script wrote beside the packaged weights: accuracy on the test pictures, data, seed, epochs."""
    return metadata_of(cifar_weights(side))


def known_cifar(data: Any) -> str | None:
    """The name of the network at hand that was trained on pictures like those of ``data``, or None.

    Those are colour pictures of 8 or 32 pixels whose classes are CIFAR-10's, by name and in order, as in the files of
    the Hub, or that are called CIFAR-10.
    """
    shape = tuple(data.shape)
    if shape not in {(3, side, side) for side in LAYOUTS if cifar_weights(side).is_file()}:
        return None
    called = data.name.lower().replace("-", "").replace("_", "")
    by_name = called.startswith("cifar10") and not called.startswith("cifar100")
    by_classes = tuple(getattr(data, "class_names", None) or ()) == CLASSES
    return f"cifar10-{shape[1]}" if by_name or by_classes else None
