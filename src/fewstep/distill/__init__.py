"""Distillation: one file per published method, named in ``METHODS``."""

from fewstep.distill.front import METHODS, distill
from fewstep.distill.sfd import SFD
from fewstep.distill.sid import SiD

__all__ = ["METHODS", "SFD", "SiD", "distill"]
