"""Distillation: one file per published method, named in ``METHODS``."""

from fewstep.distill.adversarial_consistency import AdversarialCD
from fewstep.distill.boot import BOOT
from fewstep.distill.codi import CoDi
from fewstep.distill.consistency import CD
from fewstep.distill.consistency_training import CT, ECT
from fewstep.distill.ctm import CTM
from fewstep.distill.disback import DisBack
from fewstep.distill.dmd import DMD
from fewstep.distill.dmd2 import DMD2
from fewstep.distill.emd import EMD
from fewstep.distill.f_distill import FDistill
from fewstep.distill.flash_diffusion import FlashDiffusion
from fewstep.distill.front import METHODS, distill
from fewstep.distill.get import GETDistillation
from fewstep.distill.icd import ICD
from fewstep.distill.imagine_flash import ImagineFlash
from fewstep.distill.mean_flow import MeanFlow
from fewstep.distill.msd import MSD
from fewstep.distill.progressive import Progressive, progressive
from fewstep.distill.reflow import Reflow
from fewstep.distill.sana_sprint import SanaSprint
from fewstep.distill.scflow import SCFlow
from fewstep.distill.scm import SCM
from fewstep.distill.score_forgetting import ScoreForgetting
from fewstep.distill.sdxs import SDXS
from fewstep.distill.several import distill_steps
from fewstep.distill.sfd import SFD, SFDOne, SFDv
from fewstep.distill.sid import SiD
from fewstep.distill.sida import SiDA
from fewstep.distill.slimflow import SlimFlow
from fewstep.distill.snoopi import SNOOPI
from fewstep.distill.swiftbrush import SwiftBrush
from fewstep.distill.tad_sr import TADSR
from fewstep.distill.tdd import TDD
from fewstep.distill.vsd import VSD

__all__ = [
    "BOOT",
    "CD",
    "CT",
    "CTM",
    "DMD",
    "DMD2",
    "ECT",
    "EMD",
    "ICD",
    "METHODS",
    "MSD",
    "SCM",
    "SDXS",
    "SFD",
    "SNOOPI",
    "TADSR",
    "TDD",
    "VSD",
    "AdversarialCD",
    "CoDi",
    "DisBack",
    "FDistill",
    "FlashDiffusion",
    "GETDistillation",
    "ImagineFlash",
    "MeanFlow",
    "Progressive",
    "Reflow",
    "SCFlow",
    "SFDOne",
    "SFDv",
    "SanaSprint",
    "ScoreForgetting",
    "SiD",
    "SiDA",
    "SlimFlow",
    "SwiftBrush",
    "distill",
    "distill_steps",
    "progressive",
]
