"""Objectives from data, and the front door that runs any method in a folder."""

from fewstep.train.dmmd import DMMD, train_dmmd
from fewstep.train.edm import EDMTraining
from fewstep.train.flow_matching import FlowMatching, flow_levels, flow_sampler
from fewstep.train.run import train, untrained

__all__ = ["DMMD", "EDMTraining", "FlowMatching", "flow_levels", "flow_sampler", "train", "train_dmmd", "untrained"]
