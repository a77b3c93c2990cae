"""Solvers: functions from a grid of levels to a Tableau, one small file per method, all named in ``SOLVERS``."""

from fewstep.core.solver import SOLVERS, build, check_grid
from fewstep.solve.calibrate import calibrate
from fewstep.solve.dpmpp import dpmpp, dpmpp1, dpmpp2m, dpmpp3m, dpmpp3m_exact
from fewstep.solve.euler import euler
from fewstep.solve.heun import heun
from fewstep.solve.ipndm import ipndm, ipndm1, ipndm2, ipndm3, ipndm4

__all__ = [
    "SOLVERS",
    "build",
    "calibrate",
    "check_grid",
    "dpmpp",
    "dpmpp1",
    "dpmpp2m",
    "dpmpp3m",
    "dpmpp3m_exact",
    "euler",
    "heun",
    "ipndm",
    "ipndm1",
    "ipndm2",
    "ipndm3",
    "ipndm4",
]
