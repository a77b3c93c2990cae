"""fewstep: make a trained image generator fast and small, and prove that it is still good."""

from fewstep import data, distill, export, grid, guide, measure, models, solve, sources, train
from fewstep.core.cond import Batch, Classes, Cond
from fewstep.core.denoiser import CountingDenoiser, Denoiser, Precond, edm
from fewstep.core.exact import Mixture
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.path import COSINE, DDPM, EDM, FLOW, TRIG, VP, Path, to_x0
from fewstep.core.sample import Sampler, Step, sample, trajectory
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError, NonFiniteError
from fewstep.guide import CFG, guided
from fewstep.solve.calibrate import calibrate
from fewstep.sources import load
from fewstep.tracing import trace

__version__ = "0.1.0"

__all__ = [
    "CFG",
    "COSINE",
    "DDPM",
    "EDM",
    "FLOW",
    "TRIG",
    "VP",
    "Batch",
    "Classes",
    "Cond",
    "CountingDenoiser",
    "Denoiser",
    "Generator",
    "InputError",
    "Mixture",
    "Noise",
    "NonFiniteError",
    "Path",
    "Precond",
    "Sampler",
    "Step",
    "Tableau",
    "calibrate",
    "data",
    "distill",
    "edm",
    "export",
    "grid",
    "guide",
    "guided",
    "load",
    "measure",
    "models",
    "sample",
    "solve",
    "sources",
    "to_x0",
    "trace",
    "train",
    "trajectory",
]
