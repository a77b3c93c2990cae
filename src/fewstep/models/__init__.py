"""Networks ``net(x, time, cond)``, each described by a frozen config that files can carry."""

from fewstep.models.adm import ADM, ADMConfig
from fewstep.models.control import Controlled, ControlledConfig
from fewstep.models.diffusers import DiffusersConfig, DiffusersNet
from fewstep.models.discriminator import Discriminator, DiscriminatorConfig
from fewstep.models.edm2 import EDM2Config, EDM2UNet
from fewstep.models.extended import Extended, ExtendedConfig
from fewstep.models.get import GET, GETConfig, OneLevel, ViT, ViTConfig
from fewstep.models.guided import GuidedUNet, GuidedUNetConfig
from fewstep.models.image_conditioned import ImageConditioned, ImageConditionedConfig
from fewstep.models.k_unet import KUNet, KUNetConfig
from fewstep.models.mlp import ResMLP, ResMLPConfig
from fewstep.models.router import Routed, RoutedConfig
from fewstep.models.song_unet import SongUNet, SongUNetConfig
from fewstep.models.unet import UNet, UNetConfig

__all__ = [
    "ADM",
    "GET",
    "ADMConfig",
    "Controlled",
    "ControlledConfig",
    "DiffusersConfig",
    "DiffusersNet",
    "Discriminator",
    "DiscriminatorConfig",
    "EDM2Config",
    "EDM2UNet",
    "Extended",
    "ExtendedConfig",
    "GETConfig",
    "GuidedUNet",
    "GuidedUNetConfig",
    "ImageConditioned",
    "ImageConditionedConfig",
    "KUNet",
    "KUNetConfig",
    "OneLevel",
    "ResMLP",
    "ResMLPConfig",
    "Routed",
    "RoutedConfig",
    "SongUNet",
    "SongUNetConfig",
    "UNet",
    "UNetConfig",
    "ViT",
    "ViTConfig",
]
