"""Inception-v3 as the Frechet inception distance uses it (weights of 2015-12-05), in plain torch.

It is not torchvision's network: average pooling leaves the padding out, the last block pools by maximum, and there are
1008 classes. Names of weights are those of pytorch-fid's and torch-fidelity's files.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.core.state import load_weights
from fewstep.errors import InputError, unknown
from fewstep.measure.features import digest
from fewstep.measure.resize import RESIZES, levels
from fewstep.measure.weight_files import weights_file

SIDE, CLASSES = 299, 1008
Kernel = int | tuple[int, int]


class Unit(nn.Module):
    """Convolution without bias, batch normalisation and ReLU."""

    def __init__(self, before: int, after: int, kernel: Kernel, stride: int = 1, padding: Kernel = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(after, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """(B, before, H, W) -> (B, after, H', W')."""
        return F.relu(self.bn(self.conv(x)), inplace=True)


def _wide(before: int, after: int) -> Unit:
    return Unit(before, after, (1, 7), padding=(0, 3))


def _tall(before: int, after: int) -> Unit:
    return Unit(before, after, (7, 1), padding=(3, 0))


class Block(nn.Module):
    """Branches side by side, whose results are joined in the order of ``names``.

    Args:
        branches: the chain of units of each branch, by the names that the weights have.
        pool: "average", "maximum", or "halve" (maximum with stride 2 and no unit behind it).
    """

    def __init__(self, branches: list[dict[str, Unit]], pool: str, pooled: Unit | None = None) -> None:
        super().__init__()
        self.chains, self.pool = [list(branch) for branch in branches], pool
        for branch in branches:
            for name, unit in branch.items():
                self.add_module(name, unit)
        if pooled is not None:
            self.branch_pool = pooled

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, sum of the branches, H', W')."""
        found = []
        for chain in self.chains:
            y = x
            for name in chain:
                # Units a and b of one place stand side by side.
                if name.endswith("b") and name[:-1] + "a" in chain:
                    continue
                y = self._at(name, y)
            found.append(y)
        if self.pool == "halve":
            return torch.cat([*found, F.max_pool2d(x, 3, 2)], 1)
        if self.pool == "maximum":
            around = F.max_pool2d(x, 3, 1, 1)
        else:
            around = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return torch.cat([*found, self.branch_pool(around)], 1)

    def _at(self, name: str, y: Tensor) -> Tensor:
        unit: nn.Module = self.get_submodule(name)
        if not name.endswith("a"):
            return unit(y)
        return torch.cat([unit(y), self.get_submodule(name[:-1] + "b")(y)], 1)


def _block_a(before: int, pooled: int) -> Block:
    three = {"branch3x3dbl_1": Unit(before, 64, 1), "branch3x3dbl_2": Unit(64, 96, 3, padding=1)}
    return Block(
        [
            {"branch1x1": Unit(before, 64, 1)},
            {"branch5x5_1": Unit(before, 48, 1), "branch5x5_2": Unit(48, 64, 5, padding=2)},
            {**three, "branch3x3dbl_3": Unit(96, 96, 3, padding=1)},
        ],
        "average",
        Unit(before, pooled, 1),
    )


def _block_b(before: int) -> Block:
    double = {"branch3x3dbl_1": Unit(before, 64, 1), "branch3x3dbl_2": Unit(64, 96, 3, padding=1)}
    return Block([{"branch3x3": Unit(before, 384, 3, 2)}, {**double, "branch3x3dbl_3": Unit(96, 96, 3, 2)}], "halve")


def _block_c(before: int, mid: int) -> Block:
    seven = {"branch7x7_1": Unit(before, mid, 1), "branch7x7_2": _wide(mid, mid), "branch7x7_3": _tall(mid, 192)}
    double = {"branch7x7dbl_1": Unit(before, mid, 1), "branch7x7dbl_2": _tall(mid, mid)}
    double |= {"branch7x7dbl_3": _wide(mid, mid), "branch7x7dbl_4": _tall(mid, mid), "branch7x7dbl_5": _wide(mid, 192)}
    return Block([{"branch1x1": Unit(before, 192, 1)}, seven, double], "average", Unit(before, 192, 1))


def _block_d(before: int) -> Block:
    seven = {"branch7x7x3_1": Unit(before, 192, 1), "branch7x7x3_2": _wide(192, 192), "branch7x7x3_3": _tall(192, 192)}
    three = {"branch3x3_1": Unit(before, 192, 1), "branch3x3_2": Unit(192, 320, 3, 2)}
    return Block([three, {**seven, "branch7x7x3_4": Unit(192, 192, 3, 2)}], "halve")


def _block_e(before: int, pool: str) -> Block:
    def split(name: str) -> dict[str, Unit]:
        return {
            f"{name}a": Unit(384, 384, (1, 3), padding=(0, 1)),
            f"{name}b": Unit(384, 384, (3, 1), padding=(1, 0)),
        }

    three = {"branch3x3_1": Unit(before, 384, 1), **split("branch3x3_2")}
    double = {"branch3x3dbl_1": Unit(before, 448, 1), "branch3x3dbl_2": Unit(448, 384, 3, padding=1)}
    return Block(
        [{"branch1x1": Unit(before, 320, 1)}, three, {**double, **split("branch3x3dbl_3")}],
        pool,
        Unit(before, 192, 1),
    )


class Inception(nn.Module):
    """The network; fresh weights are random. Calling it gives the 2048 pooled features."""

    dim = 2048

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Unit(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Unit(32, 32, 3)
        self.Conv2d_2b_3x3 = Unit(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Unit(64, 80, 1)
        self.Conv2d_4a_3x3 = Unit(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _block_a(192, 32), _block_a(256, 64), _block_a(288, 64)
        self.Mixed_6a, self.Mixed_6b = _block_b(288), _block_c(768, 128)
        self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = _block_c(768, 160), _block_c(768, 160), _block_c(768, 192)
        self.Mixed_7a = _block_d(768)
        self.Mixed_7b, self.Mixed_7c = _block_e(1280, "average"), _block_e(2048, "maximum")
        self.fc = nn.Linear(2048, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 2048) of pictures (B, 3, 299, 299), whose level 0 is -1 and 128 is 0."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"):
            x = self.get_submodule(f"Mixed_{name}")(x)
        return x.mean((2, 3))

    def logits(self, features: Tensor) -> Tensor:
        """(B, 1008) class scores of pooled features without the bias, as the Inception score takes them."""
        return features @ self.fc.weight.T


class InceptionExtractor:
    """The 2048 pooled features of :class:`Inception`, and its class probabilities.

    Args:
        net: the network, in evaluation mode from here on.
        weights: sha256 of its weights.
        resize: "tf1", "clean" or "pytorch": see :mod:`fewstep.measure.resize`.
        device: where the network runs.

    Raises:
        InputError: an unknown resize.
    """

    dim = 2048

    def __init__(
        self, net: Inception, *, weights: str, resize: str = "tf1", device: torch.device | str = "cpu"
    ) -> None:
        if resize not in RESIZES:
            raise unknown("resize", resize, RESIZES)
        self.name, self.resize, self.weights = "inception", resize, weights
        self.device = torch.device(device)
        self.fingerprint = digest(f"inception {resize} {weights}".encode())
        self.net = net.to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, 2048), float32, of pictures (B, 3 or 1, H, W) in [-1, 1] of any size.

        Raises:
            InputError: another number of channels.
        """
        x = RESIZES[self.resize](levels(images.to(self.device)), SIDE)
        # pytorch-fid scales 0..255 to -1..1, the others subtract and divide by 128.
        return self.net(x / 127.5 - 1 if self.resize == "pytorch" else (x - 128) / 128)

    @torch.no_grad()
    def seen(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, 2048) and log-probabilities (B, 1008), by one pass."""
        features = self(images)
        return features, self.net.logits(features).log_softmax(-1)


def inception_extractor(
    place: str | Path,
    *,
    resize: str = "tf1",
    sha256: str | None = None,
    device: torch.device | str = "cpu",
    cache: str | Path | None = None,
) -> InceptionExtractor:
    """The FID network with published weights.

    Args:
        place: ``pt_inception-2015-12-05-6726825d.pth``, or the same as safetensors: a path or an address, see
            :func:`fewstep.measure.weight_files.weights_file`. Nothing in the file is executed.
        resize: "tf1" as EDM and torch-fidelity, "clean" as clean-fid, "pytorch" as pytorch-fid.
        sha256: the checksum, or its first digits; without one, those that end the file's name.
        device: where it runs.
        cache: where a fetched file is kept.

    Raises:
        InputError: no such file, another checksum, weights of another network, or an unknown resize.
    """
    from fewstep.sources.checkpoint import read_checkpoint

    if resize not in RESIZES:
        raise unknown("resize", resize, RESIZES)
    path, found = weights_file(place, sha256=sha256, cache=cache)
    with torch.device("meta"):
        net = Inception()
    tensors = {k: v.float() for k, v in read_checkpoint(path).items() if not k.endswith("num_batches_tracked")}
    net = net.to_empty(device="cpu")
    # Counters of training, which some files hold and others do not.
    tensors |= {k: torch.zeros_like(v) for k, v in net.state_dict().items() if k.endswith("num_batches_tracked")}
    if "fc.weight" in tensors and tensors["fc.weight"].shape[0] == 1000:
        raise InputError(f"{path} holds torchvision's Inception-v3 with 1000 classes: FID needs the one with 1008")
    load_weights(net, tensors, path)
    return InceptionExtractor(net, weights=found, resize=resize, device=device)
