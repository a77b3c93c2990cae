"""Control branches (arXiv 2302.05543): a trainable copy of the encoder that steers a frozen U-Net by a picture."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.core.cond import Cond
from fewstep.core.denoiser import Precond
from fewstep.core.network import build_network, describe_network, network
from fewstep.errors import InputError
from fewstep.models.diffusers import DiffusersNet
from fewstep.models.image_conditioned import IMAGE, check_image, upsampled
from fewstep.models.libraries import diffusers_class, opening, quiet
from fewstep.models.unet import UNet

# Widths of the layers of diffusers' ControlNet that read the picture, each half as large as the one before.
STEM = (16, 32, 96, 256)


@dataclass(frozen=True)
class ControlledConfig:
    """A network with a control branch.

    Attributes:
        net: the description of the network itself.
        image: (C, h, w) of ``cond["image"]``.
    """

    net: dict[str, Any]
    image: tuple[int, int, int]

    def __post_init__(self) -> None:
        image = tuple(self.image)
        object.__setattr__(self, "image", image)
        if len(image) != 3 or min(image) < 1:
            raise InputError(f"pictures to read need a shape (C, h, w), got {image}")


@network("controlled", ControlledConfig)
class Controlled(nn.Module):
    """A network whose skips and bottleneck get what a branch makes of ``cond["image"]``.

    The branch starts as a copy of the encoder behind convolutions that are 0, so that the whole starts as the network
    itself; without an image in the condition it is the network. Networks: ``unet``, and UNet2DConditionModel of
    diffusers with its ControlNetModel.

    While it is trained the network is *held*: parameters, ``state_dict`` and deep copies are those of the branch, and
    all copies share the network, which stands in memory once. :func:`whole` makes the module of both, to be saved.

    Raises:
        InputError: a network of another kind.
    """

    def __init__(
        self,
        config: ControlledConfig,
        net: nn.Module | None = None,
        branch: nn.Module | None = None,
        *,
        held: bool = False,
    ) -> None:
        """``net`` and ``branch`` are used as they are; what is None is made, the branch as a copy of the encoder."""
        super().__init__()
        self.config = config
        net = build_network(config.net) if net is None else net
        if branch is None:
            branch = _branch(net, config.image)
        if held:
            self._held = _Held(net)
        else:
            self.net = net
            taps: dict[str, str] = getattr(net, "taps", {})
            self.taps = {name: f"net.{place}" for name, place in taps.items()}
        self.branch = branch

    @property
    def base(self) -> nn.Module:
        """The network without its branch."""
        held = self.__dict__.get("_held")
        return cast(nn.Module, self._modules["net"] if held is None else held.net)

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """``x`` (B, C, H, W), ``time`` (B,), ``cond["image"]`` (B, c, h, w) -> (B, C, H, W).

        Raises:
            InputError: an image of another shape.
        """
        own = {name: value for name, value in cond.items() if name != IMAGE}
        image = cond.get(IMAGE)
        if image is None:
            out: Tensor = self.base(x, time, own)
            return out
        check_image(image, self.config.image)
        steered: Tensor = cast(Any, self.branch).steer(self.base, x, time, own, image)
        return steered


class _Held:
    """A network that is no part of the module: copies of the module share it."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def __deepcopy__(self, memo: dict[int, Any]) -> _Held:
        return self


class UNetBranch(nn.Module):
    """A copy of the encoder of a ``unet``, a stem that reads the picture, and convolutions that start at 0."""

    def __init__(self, net: UNet, image: Sequence[int]) -> None:
        super().__init__()
        self.embed, self.enter = copy.deepcopy(net.embed), copy.deepcopy(net.enter)
        self.encoder, self.middle = copy.deepcopy(net.encoder), copy.deepcopy(net.middle)
        width = net.enter.out_channels
        self.stem = nn.Sequential(
            nn.Conv2d(image[0], width, 3, padding=1), nn.SiLU(), _zero(nn.Conv2d(width, width, 3, padding=1))
        )
        sizes = [width, *(cast(Any, block).conv2.out_channels for block in [*net.encoder, net.middle[-1]])]
        self.zeros = nn.ModuleList(_zero(nn.Conv2d(size, size, 1)) for size in sizes)

    def forward(self, x: Tensor, time: Tensor, cond: Cond, image: Tensor) -> list[Tensor]:
        """One residual for each skip, and the last for the bottleneck."""
        emb = F.silu(self.embed(time, cond))
        h = self.enter(x) + self.stem(upsampled(image.to(x.dtype), (x.shape[-2], x.shape[-1])))
        found = [h]
        for block in self.encoder:
            h = block(h, emb)
            found.append(h)
        for block in self.middle:
            h = block(h, emb)
        return [zero(part) for zero, part in zip(self.zeros, [*found, h], strict=True)]

    def steer(self, net: nn.Module, x: Tensor, time: Tensor, cond: Cond, image: Tensor) -> Tensor:
        """The output of ``net`` with this branch's residuals."""
        out: Tensor = net(x, time, cond, self(x, time, cond, image))
        return out


class DiffusersBranch(nn.Module):
    """A ControlNetModel of diffusers, in ``model``, made of a UNet2DConditionModel.

    A picture larger than the latents by a power of 2 is read at its own size, as published; any other is resized to
    the latents first.
    """

    def __init__(self, net: DiffusersNet, image: Sequence[int]) -> None:
        super().__init__()
        unet: Any = net.model
        if unet.config.time_cond_proj_dim:
            raise InputError("a UNet2DConditionModel that is told its guidance has no ControlNetModel in diffusers")
        size = unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        halvings = [k for k in range(12) if (height << k, width << k) == tuple(image[1:])]
        self.halvings = halvings[0] if halvings else 0
        stem = (*STEM, *(256,) * 8)[: self.halvings + 1]
        kind = diffusers_class("ControlNetModel")
        with quiet(), opening("this configuration", "ControlNetModel"):
            self.model = kind.from_unet(unet, conditioning_embedding_out_channels=stem, conditioning_channels=image[0])
        first = next(unet.parameters())
        self.model.to(first.device, first.dtype)

    def steer(self, net: nn.Module, x: Tensor, time: Tensor, cond: Cond, image: Tensor) -> Tensor:
        """The output of ``net`` with this branch's residuals."""
        base = cast(DiffusersNet, net)
        dtype = next(base.model.parameters()).dtype
        given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in cond.items()}
        seen = upsampled(image.to(dtype), (x.shape[-2] << self.halvings, x.shape[-1] << self.halvings))
        down, middle = base.family.call(_Reader(base.model, self.model, seen), x.to(dtype), time, given)
        added = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return base.family.call(_With(base.model, added), x.to(dtype), time, given)[:, : x.shape[1]]


class _With:
    """A network of diffusers called with more arguments."""

    def __init__(self, model: Any, more: dict[str, Any]) -> None:
        self.model, self.more, self.config = model, more, model.config

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.model(*args, **options, **self.more)


class _Reader:
    """A ControlNetModel called as its network is; both of its results stand first."""

    def __init__(self, unet: Any, model: Any, image: Tensor) -> None:
        self.model, self.image, self.config = model, image, unet.config

    def __call__(self, *args: Any, **options: Any) -> Any:
        return (self.model(*args, **options, controlnet_cond=self.image),)


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    """The convolution with weights and bias 0."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


def steerable(net: nn.Module) -> None:
    """Raises InputError for a network that has no control branch."""
    known = type(net) is UNet or (isinstance(net, DiffusersNet) and net.config.class_name == "UNet2DConditionModel")
    if not known:
        name = net.config.class_name if isinstance(net, DiffusersNet) else type(net).__name__
        raise InputError(
            f"a {name} has no control branch: expected a U-Net of kind 'unet' or diffusers' UNet2DConditionModel; "
            "image_conditioned() makes any other network read pictures"
        )


def _branch(net: nn.Module, image: Sequence[int]) -> nn.Module:
    """A fresh branch for a network, on its device."""
    steerable(net)
    made = UNetBranch(net, image) if isinstance(net, UNet) else DiffusersBranch(cast(DiffusersNet, net), image)
    return made.to(next(net.parameters()).device)


def controlled(denoiser: Precond, image: Sequence[int], *, held: bool = False) -> Precond:
    """The denoiser with a fresh branch that reads ``cond["image"]`` (B, *image); at first it changes nothing.

    The weights of the network are shared. ``held`` leaves them out of the module, see :class:`Controlled`. The stem of
    the branch is drawn from torch's generator.

    Raises:
        InputError: see :func:`steerable`.
    """
    steerable(denoiser.net)
    shape = cast(tuple[int, int, int], tuple(int(n) for n in image))
    made = Controlled(ControlledConfig(describe_network(denoiser.net), shape), denoiser.net, held=held)
    return denoiser.with_net(made.train(denoiser.training))


def whole(denoiser: Precond) -> Precond:
    """A held :class:`Controlled` as a module of network and branch, which files hold; nothing is copied.

    Raises:
        InputError: the denoiser's network has no branch.
    """
    net = denoiser.net
    if not isinstance(net, Controlled):
        raise InputError(f"a {type(net).__name__} has no control branch")
    return denoiser.with_net(Controlled(net.config, net.base, net.branch))
