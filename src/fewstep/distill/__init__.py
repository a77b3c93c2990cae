"""Distillation: one file per published method, named in ``METHODS``."""

from fewstep.distill.consistency import CD
from fewstep.distill.consistency_training import CT, ECT
from fewstep.distill.front import METHODS, distill
from fewstep.distill.progressive import Progressive, progressive
from fewstep.distill.sfd import SFD
from fewstep.distill.sid import SiD

__all__ = ["CD", "CT", "ECT", "METHODS", "SFD", "Progressive", "SiD", "distill", "progressive"]
