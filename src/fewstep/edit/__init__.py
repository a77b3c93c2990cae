"""Editing given pictures with a generator, without training for it."""

from fewstep.edit.zero_shot import Known, colorize, denoise, edit, inpaint, super_resolve

__all__ = ["Known", "colorize", "denoise", "edit", "inpaint", "super_resolve"]
