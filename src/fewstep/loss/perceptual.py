"""Distances between two batches of pictures, by name, and the perceptual ones (LPIPS, arXiv 1801.03924).

A distance takes two batches (B, ...) and returns (B,). Those of pixels are functions; LPIPS has a network, which a run
holds as a frozen role, so that it moves to the device and is never trained: see :func:`distance_roles`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.core.denoiser import Precond
from fewstep.core.generator import Generator, local
from fewstep.core.pipeline import Codec, TextConditions
from fewstep.core.role import Models, Role
from fewstep.errors import InputError, unknown
from fewstep.loss.huber import pseudo_huber
from fewstep.measure.features import DigitsNet, digits_extractor
from fewstep.models.frozen import network_under

Distance = Callable[[Tensor, Tensor], Tensor]
DistanceName = Literal["l2", "l1", "huber", "lpips"]
PIXELS: dict[str, Distance] = {
    "l2": lambda x, y: (x - y).flatten(1).square().mean(1),
    "l1": lambda x, y: (x - y).flatten(1).abs().mean(1),
    "huber": pseudo_huber,
}
DISTANCES = (*PIXELS, "lpips")
ROLE = "distance"
# The published network was trained on pictures of this size; smaller ones are enlarged (arXiv 2303.01469).
SIDE, LEAST = 224, 256
TINY = 1e-10
# VGG16 by the indices of its layers: the convolutions of each slice with their channels; a slice but the first begins
# with the pooling before its first convolution.
SLICES: tuple[dict[int, tuple[int, int]], ...] = (
    {0: (3, 64), 2: (64, 64)},
    {5: (64, 128), 7: (128, 128)},
    {10: (128, 256), 12: (256, 256), 14: (256, 256)},
    {17: (256, 512), 19: (512, 512), 21: (512, 512)},
    {24: (512, 512), 26: (512, 512), 28: (512, 512)},
)
WIDTHS = tuple(list(convolutions.values())[-1][1] for convolutions in SLICES)
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def layer_distance(f: Tensor, g: Tensor, weights: Tensor | None = None) -> Tensor:
    """``mean over places of sum_c w_c (f_c / |f| - g_c / |g|)^2`` (arXiv 1801.03924, eq. 1): (B,).

    ``f`` and ``g`` are (B, C), (B, C, h, w) or tokens (B, T, C), with the norm over the C channels of a place;
    ``weights`` (C,) are >= 0, ones without.
    """
    if f.ndim == 3:
        f, g = f.transpose(1, 2), g.transpose(1, 2)
    square = (_unit(f) - _unit(g)).square()
    if weights is not None:
        square = square * weights.to(square).reshape(1, -1, *[1] * (f.ndim - 2))
    return square.sum(1).reshape(len(f), -1).mean(1)


def _unit(f: Tensor) -> Tensor:
    """Channels of unit norm; the small number stands inside the root, whose slope at 0 is infinite."""
    f = f.float() if f.dtype in (torch.float16, torch.bfloat16) else f
    return f * (f.square().sum(1, keepdim=True) + TINY).rsqrt()


class LayerDistance(nn.Module):
    """The sum of :func:`layer_distance` over named layers of any network, with one pass for both batches.

    Raises:
        InputError: no layers, or one that the network does not have.
    """

    def __init__(self, net: nn.Module, layers: Sequence[str]) -> None:
        super().__init__()
        known = [name for name, _ in net.named_modules() if name]
        if not layers:
            raise InputError("a perceptual distance needs layers: name some of the network's sub-modules")
        for layer in layers:
            if layer not in known:
                raise unknown("layer", layer, known)
        self.net, self.layers = net.eval().requires_grad_(False), tuple(layers)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """``x`` and ``y`` (B, ...) as the network takes them -> (B,)."""
        found: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
            return lambda module, args, out: found.__setitem__(name, out)

        hooks = [self.net.get_submodule(name).register_forward_hook(keep(name)) for name in self.layers]
        try:
            self.net(torch.cat([x, y]))
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack([layer_distance(*found[name].chunk(2)) for name in self.layers]).sum(0)


class DigitsDistance(LayerDistance):
    """The distance in the activations of the packaged digits network, for (B, 1, 8, 8) and stacked (B, 3, 8, 8).

    The layers are its four convolution blocks and its 64 features. Stacked digits are the mean over their channels.
    """

    LAYERS = ("body.0", "body.1", "body.3", "body.4", "body.8")

    def __init__(self) -> None:
        net: DigitsNet = digits_extractor(snap=False).net
        super().__init__(net, self.LAYERS)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """See :meth:`LayerDistance.forward`."""
        single = [pictures.reshape(-1, 1, 8, 8) for pictures in (x, y)]
        return super().forward(*single).reshape(len(x), -1).mean(1)


class TapDistance(nn.Module):
    """The distance in the activations of a denoiser at its declared taps, at its lowest level and without a condition.

    For latents as for pictures: what the teacher itself makes of them.

    Raises:
        InputError: the denoiser declares no taps, or not this one.
    """

    def __init__(self, D: Precond, taps: Sequence[str] = ()) -> None:
        super().__init__()
        if not D.taps:
            raise InputError(
                f"{type(D.net).__name__} declares no taps, so its features cannot be compared: use distance l2, l1 or "
                "huber, or give features the path of LPIPS weights"
            )
        for tap in taps:
            if tap not in D.taps:
                raise unknown("feature tap", tap, D.taps)
        self.D, self.taps = D, tuple(taps or D.taps)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """``x`` and ``y`` (B, *D.shape) -> (B,)."""
        _, found = self.D.features(torch.cat([x, y]), self.D.sigma_min, {}, self.taps)
        return torch.stack([layer_distance(*found[tap].chunk(2)) for tap in self.taps]).sum(0)


class Lpips(nn.Module):
    """LPIPS on VGG16 (arXiv 1801.03924, "lin", version 0.1), in plain torch and with the published names of weights.

    Pictures in [-1, 1] are brought to the network's own scale; those below 256 pixels are enlarged to 224 as
    consistency models do (arXiv 2303.01469), unless ``resize`` is False. Fresh weights are random: see :func:`lpips`.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, *, resize: bool = True) -> None:
        super().__init__()
        self.resize = resize
        self.register_buffer("shift", torch.tensor(SHIFT).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).reshape(1, 3, 1, 1), persistent=False)
        self.net = nn.ModuleDict({f"slice{k + 1}": _slice(convs) for k, convs in enumerate(SLICES)})
        for k, width in enumerate(WIDTHS):
            # The published layer 0 is a dropout, which evaluation leaves out.
            layers = nn.Sequential(nn.Identity(), nn.Conv2d(width, 1, 1, bias=False))
            self.add_module(f"lin{k}", nn.ModuleDict({"model": layers}))
        self.eval().requires_grad_(False)

    def features(self, x: Tensor) -> list[Tensor]:
        """The five activations (relu1_2 to relu5_3) of pictures (B, 3 or 1, H, W) in [-1, 1].

        Raises:
            InputError: another number of channels, or pictures too small for four poolings without ``resize``.
        """
        if x.ndim != 4 or x.shape[1] not in (1, 3) or (min(x.shape[2:]) < 16 and not self.resize):
            raise InputError(
                f"LPIPS takes pictures (B, 3, H, W) or (B, 1, H, W), of 16 pixels or more without resize, "
                f"got {tuple(x.shape)}"
            )
        x = x.expand(-1, 3, -1, -1)
        if self.resize and min(x.shape[2:]) < LEAST:
            x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", align_corners=False)
        x, found = (x - self.shift) / self.scale, []
        for part in self.net.values():
            x = part(x)
            found.append(x)
        return found

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """``x`` and ``y`` (B, 3 or 1, H, W) in [-1, 1] -> (B,), about 0 to 1."""
        total = x.new_zeros(len(x))
        for k, activation in enumerate(self.features(torch.cat([x, y]))):
            f, g = activation.chunk(2)
            total = total + layer_distance(f, g, self.linear(k))
        return total

    def linear(self, k: int) -> Tensor:
        """(C,): the learned weights of slice ``k``."""
        return self.get_parameter(f"lin{k}.model.1.weight").flatten()


def _slice(convolutions: Mapping[int, tuple[int, int]]) -> nn.Sequential:
    """A slice of VGG16 whose layers carry the numbers that they have in the whole."""
    made = nn.Sequential()
    first = min(convolutions)
    if first:
        made.add_module(str(first - 1), nn.MaxPool2d(2))
    for at, (before, after) in convolutions.items():
        made.add_module(str(at), nn.Conv2d(before, after, 3, padding=1))
        made.add_module(str(at + 1), nn.ReLU())
    return made


def lpips(place: str | Path, *, resize: bool = True) -> Lpips:
    """LPIPS with published weights: one file, or a folder whose files together hold backbone and linear layers.

    ``.safetensors``, or ``.pth`` and ``.pt``, which are read as named tensors and never executed. Names of the backbone
    are those of the lpips package (``net.slice1.0.weight``) or of torchvision's VGG16 (``features.0.weight``);
    those of the linear layers ``lin0.model.1.weight``. A classifier is left out.

    Raises:
        InputError: nothing is there, or the weights lack a tensor, have an unknown one, or one of another shape.
    """
    from fewstep.sources.checkpoint import read_checkpoint

    place = local(place)
    files = [place]
    if place.is_dir():
        files = sorted(f for f in place.iterdir() if f.suffix in (".safetensors", ".pth", ".pt"))
    if not files or not place.exists():
        raise InputError(f"{place} holds no weights of LPIPS: expected a .safetensors or .pth, or a folder with some")
    made, found = Lpips(resize=resize), dict[str, Tensor]()
    for file in files:
        found |= _published(read_checkpoint(file), file)
    wanted = made.state_dict()
    for name, tensor in found.items():
        if name not in wanted or tensor.shape != wanted[name].shape:
            expected = tuple(wanted[name].shape) if name in wanted else "no such tensor"
            raise InputError(f"{place}: {name} is {tuple(tensor.shape)}, expected {expected}: not LPIPS on VGG16")
    lacking = sorted(wanted.keys() - found.keys())
    if lacking:
        raise InputError(
            f"{place} lacks {len(lacking)} tensors of LPIPS, the first is {lacking[0]}: put the weights of VGG16 "
            "and of the linear layers into one folder"
        )
    made.load_state_dict(found)
    negative = [k for k in range(len(WIDTHS)) if bool((made.linear(k) < 0).any())]
    if negative:
        raise InputError(f"{place}: lin{negative[0]} has weights below 0, which LPIPS has not: the file is another's")
    return made


def _published(tensors: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """The tensors by this module's names, without what a file may hold beside them."""
    owner = {at: f"net.slice{k + 1}.{at}" for k, convolutions in enumerate(SLICES) for at in convolutions}
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        head, _, rest = name.partition(".")
        if head in ("classifier", "lins"):
            # The package's own files hold the linear layers twice.
            continue
        if head == "scaling_layer":
            own = SHIFT if rest == "shift" else SCALE
            if tensor.numel() != 3 or float((tensor.flatten().double() - torch.tensor(own)).abs().max()) > 1e-5:
                raise InputError(f"{file}: {name} is {tensor.flatten().tolist()}, expected {own}")
            continue
        if head == "features":
            at, _, kind = rest.partition(".")
            name = f"{owner.get(int(at), name) if at.isdigit() else name}.{kind}"
        if head.startswith("lin") and rest == "model.0.weight":
            name = f"{head}.model.1.weight"
        made[name] = tensor.float()
    return made


class Decoded(nn.Module):
    """A distance of pictures for the latents of a codec, whose decoder the gradient goes through."""

    def __init__(self, distance: nn.Module, codec: Codec) -> None:
        super().__init__()
        self.distance, self.codec = distance, codec

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """``x`` and ``y`` (B, ...) latents -> (B,); ``y``, a target, has no gradient."""
        with torch.no_grad():
            target = self.codec.decode(y)
        found: Tensor = self.distance(self.codec.decode(x), target)
        return found


def distance_of(
    name: str,
    shape: Sequence[int],
    features: str = "own",
    *,
    codec: Codec | None = None,
    teacher: Precond | None = None,
) -> Distance:
    """The distance ``name`` (l2, l1, huber or lpips) for samples of ``shape``.

    ``features`` matters to lpips alone: "own" is the packaged network, which knows digits; "teacher" the taps of the
    denoiser ``teacher``, for latents too; anything else is the path of published weights, see :func:`lpips`. With a
    ``codec`` those see the decoded pictures. torchmetrics' LPIPS is no choice, because it needs torchvision.

    Raises:
        InputError: an unknown name, no packaged network for these samples, or what :func:`lpips` says.
    """
    if name not in DISTANCES:
        raise unknown("distance", name, DISTANCES)
    if name != "lpips":
        return PIXELS[name]
    if features == "teacher":
        if teacher is None:
            raise InputError("distance 'lpips' with features 'teacher' needs a teacher with a network")
        return TapDistance(teacher)
    if features == "own":
        if codec is not None or tuple(shape) not in ((1, 8, 8), (3, 8, 8)):
            what = f"latents {tuple(shape)}" if codec is not None else f"pictures {tuple(shape)}"
            raise InputError(
                f"distance 'lpips' has no packaged features for {what}, only for digits (1, 8, 8) and (3, 8, 8): "
                "set features to the path of LPIPS weights or to 'teacher', or use distance 'huber'"
            )
        return DigitsDistance()
    if codec is None and (len(shape) != 3 or shape[0] not in (1, 3)):
        raise InputError(
            f"LPIPS compares pictures of 1 or 3 channels, got samples {tuple(shape)} without a codec to decode them: "
            "use features 'teacher', or distance 'huber'"
        )
    made = lpips(features)
    return made if codec is None else Decoded(made, codec)


def distance_roles(name: str, teacher: Generator, features: str = "own") -> dict[str, Role]:
    """The frozen role that holds the network of a distance; empty where it has none. See :func:`distance_in`.

    Raises:
        InputError: see :func:`distance_of`.
    """
    network = None
    if name == "lpips" and features == "teacher":
        if isinstance(teacher.conds, TextConditions):
            raise InputError(
                "features 'teacher' asks the teacher without a condition, and this one needs a prompt: use distance "
                "'huber', or the path of LPIPS weights"
            )
        network = network_under(teacher.denoiser)
    made = distance_of(name, teacher.denoiser.shape, features, codec=teacher.codec, teacher=network)
    return {ROLE: Role(lambda: made)} if isinstance(made, nn.Module) else {}


def distance_in(m: Models, name: str) -> Distance:
    """The distance ``name`` in a run whose roles hold those of :func:`distance_roles`."""
    return m.networks[ROLE] if name == "lpips" else PIXELS[name]
