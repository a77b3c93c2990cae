"""Guidance: wrappers ``Denoiser -> Denoiser``, so that no network, solver or method knows of it."""

from fewstep.guide.cfg import CFG, guided

__all__ = ["CFG", "guided"]
