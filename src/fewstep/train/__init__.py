"""Objectives from data, and the front door that runs any method in a folder."""

from fewstep.train.edm import EDMTraining
from fewstep.train.run import train, untrained

__all__ = ["EDMTraining", "train", "untrained"]
