"""Networks ``net(x, time, cond)``, each described by a frozen config that files can carry."""

from fewstep.models.mlp import ResMLP, ResMLPConfig
from fewstep.models.unet import UNet, UNetConfig

__all__ = ["ResMLP", "ResMLPConfig", "UNet", "UNetConfig"]
