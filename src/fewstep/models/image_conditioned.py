"""A network that reads a picture beside its own: up-sampled, and in further channels of its first layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.core.cond import Cond
from fewstep.core.denoiser import Precond
from fewstep.core.network import build_network, describe_network, network
from fewstep.errors import InputError

IMAGE = "image"
# Where the networks here have their first layer.
PLACES = ("enter", "proj_in", "input_blocks.0.0", "model.conv_in", "net.enter")
Upsampling = Literal["bilinear", "nearest"]


@dataclass(frozen=True)
class ImageConditionedConfig:
    """A network that reads a picture.

    Attributes:
        net: the description of the network itself.
        image: (C, h, w) of ``cond["image"]``.
        enter: name of the network's first layer, a Conv2d or a Linear.
        upsampling: of the picture, to the size of the first layer's input.
    """

    net: dict[str, Any]
    image: tuple[int, int, int]
    enter: str = "enter"
    upsampling: Upsampling = "bilinear"

    def __post_init__(self) -> None:
        image = tuple(self.image)
        object.__setattr__(self, "image", image)
        if len(image) != 3 or min(image) < 1:
            raise InputError(f"pictures to read need a shape (C, h, w), got {image}")
        if self.upsampling not in ("bilinear", "nearest"):
            raise InputError(f"unknown upsampling {self.upsampling!r}: choose bilinear or nearest")


@network("image-unet", ImageConditionedConfig)
class ImageConditioned(nn.Module):
    """Any network of ours whose first layer gets further input channels for ``cond["image"]`` (arXiv 2104.07636).

    A layer on joined channels is the sum of two layers, so the weights of the new channels stand by themselves and
    the network keeps its own. They start at 0: the network starts as the one that it was made of. Without an image in
    the condition it is that network. A first layer that is linear reads the picture as it is, since up-sampling is
    linear too.

    Raises:
        InputError: no such first layer, or one of another kind.
    """

    def __init__(self, config: ImageConditionedConfig, net: nn.Module | None = None) -> None:
        """``net`` is the network, if it is there already; otherwise it is made with fresh weights."""
        super().__init__()
        self.config = config
        self.net = build_network(config.net) if net is None else net
        self.extra = _beside(self.net, config)
        self.net.get_submodule(config.enter).register_forward_hook(_Adds(self))
        taps: dict[str, str] = getattr(self.net, "taps", {})
        self.taps = {name: f"net.{place}" for name, place in taps.items()}
        embeds: dict[str, int] = getattr(self.net, "embeds", {})
        self.embeds = {f"net.{place}": width for place, width in embeds.items()}
        self._image: Tensor | None = None

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """``x`` (B, C, H, W), ``time`` (B,), ``cond["image"]`` (B, c, h, w) -> (B, C, H, W).

        Raises:
            InputError: an image of another shape.
        """
        own = {name: value for name, value in cond.items() if name != IMAGE}
        image = cond.get(IMAGE)
        if image is not None:
            check_image(image, self.config.image)
            self._image = self.seen(image, x)
        try:
            out: Tensor = self.net(x, time, own)
            return out
        finally:
            self._image = None

    def seen(self, image: Tensor, x: Tensor) -> Tensor:
        """The picture as the new channels read it, in the dtype of ``x``."""
        if isinstance(self.extra, nn.Linear):
            return image.flatten(1).to(x.dtype)
        return upsampled(image, (x.shape[-2], x.shape[-1]), self.config.upsampling).to(x.dtype)

    def added(self, out: Tensor) -> Tensor:
        """The first layer's output with the part of the picture."""
        if self._image is None:
            return out
        part: Tensor = self.extra(self._image)
        return out + part.to(out.dtype)


class _Adds:
    """A hook on the first layer: an object, so that a copy of the network hooks its own."""

    def __init__(self, owner: ImageConditioned) -> None:
        self.owner = owner

    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return self.owner.added(out)


def _beside(net: nn.Module, config: ImageConditionedConfig) -> nn.Conv2d | nn.Linear:
    """The part of the first layer that reads the picture, with weights 0."""
    try:
        first = net.get_submodule(config.enter)
    except AttributeError:
        raise InputError(
            f"{type(net).__name__} has no layer {config.enter!r}: name its first layer with enter="
        ) from None
    made: nn.Conv2d | nn.Linear
    if isinstance(first, nn.Conv2d):
        if first.groups != 1 or first.padding_mode != "zeros":
            raise InputError(
                f"the first layer {config.enter!r} is a grouped or padded convolution: expected a plain one"
            )
        made = nn.Conv2d(
            config.image[0],
            first.out_channels,
            cast(tuple[int, int], first.kernel_size),
            cast(tuple[int, int], first.stride),
            cast(tuple[int, int], first.padding),
            cast(tuple[int, int], first.dilation),
            bias=False,
        )
    elif isinstance(first, nn.Linear):
        made = nn.Linear(math.prod(config.image), first.out_features, bias=False)
    else:
        raise InputError(
            f"the first layer {config.enter!r} of {type(net).__name__} is a {type(first).__name__}, expected a Conv2d "
            "or a Linear: name another with enter="
        )
    nn.init.zeros_(made.weight)
    return made.to(first.weight.device, first.weight.dtype)


def upsampled(image: Tensor, size: tuple[int, int], mode: Upsampling = "bilinear") -> Tensor:
    """``image`` (B, C, h, w) at ``size`` (H, W)."""
    if tuple(image.shape[-2:]) == size:
        return image
    corners = False if mode == "bilinear" else None
    return F.interpolate(image, size, mode=mode, align_corners=corners, antialias=mode == "bilinear")


def check_image(image: Tensor, shape: Sequence[int]) -> None:
    """Raises InputError unless ``image`` is (B, *shape)."""
    if tuple(image.shape[1:]) != tuple(shape):
        raise InputError(
            f"image conditions of wrong size: this network reads (B, {', '.join(map(str, shape))}), got "
            f"{tuple(image.shape)}"
        )


def image_conditioned(
    denoiser: Precond,
    image: Sequence[int],
    *,
    enter: str | None = None,
    upsampling: Upsampling = "bilinear",
) -> Precond:
    """The denoiser on a network that reads ``cond["image"]`` (B, *image) too; at first it ignores it.

    The weights are shared: copy it before it is trained. ``enter`` names the network's first layer where it is not one
    of the usual places.

    Raises:
        InputError: see :class:`ImageConditioned`.
    """
    net = denoiser.net
    if enter is None:
        modules = dict(net.named_modules())
        enter = next((place for place in PLACES if place in modules), None)
    if enter is None:
        raise InputError(f"the first layer of {type(net).__name__} is not known: name it with enter=")
    shape = cast(tuple[int, int, int], tuple(int(n) for n in image))
    config = ImageConditionedConfig(describe_network(net), shape, enter, upsampling)
    return denoiser.with_net(ImageConditioned(config, net).train(net.training))
