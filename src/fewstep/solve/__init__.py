"""Solvers: functions from a grid of levels to a Tableau, one small file per method, all named in ``SOLVERS``.

Beside them stand the samplers that are no table (their weights depend on the state) and :func:`calibrate`, the front
door of everything that is searched or learned.
"""

from fewstep.core.solver import SOLVERS, build, check_grid
from fewstep.solve.adaptive import AdaptiveDPM
from fewstep.solve.amed import AMED, amed_table
from fewstep.solve.calibrate import calibrate
from fewstep.solve.consistency import consistency, tcd
from fewstep.solve.deis import deis
from fewstep.solve.dpm import dpm1, dpm2, dpm3, dpm_multistep, dpm_single, fast_orders
from fewstep.solve.dpmpp import dpmpp, dpmpp1, dpmpp2m, dpmpp3m, dpmpp3m_exact
from fewstep.solve.dpmpp_sde import dpmpp2m_sde, dpmpp3m_sde, dpmpp_sde
from fewstep.solve.dpmpp_single import dpmpp2s, dpmpp3s
from fewstep.solve.epd import epd_table
from fewstep.solve.euler import ddim, euler
from fewstep.solve.gaussian import GaussianStart
from fewstep.solve.heun import edm_stochastic, heun
from fewstep.solve.iddpm import LearnedVariance
from fewstep.solve.invert import Aidi, aidi, ddim_invert
from fewstep.solve.ipndm import ipndm, ipndm1, ipndm2, ipndm3, ipndm4, ipndm_v
from fewstep.solve.lms import lms
from fewstep.solve.particle_flow import ParticleFlow
from fewstep.solve.res import res, res_multistep
from fewstep.solve.stochastic import dpm2_ancestral, dpmpp2s_ancestral, euler_ancestral
from fewstep.solve.unipc import unipc

__all__ = [
    "AMED",
    "SOLVERS",
    "AdaptiveDPM",
    "Aidi",
    "GaussianStart",
    "LearnedVariance",
    "ParticleFlow",
    "aidi",
    "amed_table",
    "build",
    "calibrate",
    "check_grid",
    "consistency",
    "ddim",
    "ddim_invert",
    "deis",
    "dpm1",
    "dpm2",
    "dpm2_ancestral",
    "dpm3",
    "dpm_multistep",
    "dpm_single",
    "dpmpp",
    "dpmpp1",
    "dpmpp2m",
    "dpmpp2m_sde",
    "dpmpp2s",
    "dpmpp2s_ancestral",
    "dpmpp3m",
    "dpmpp3m_exact",
    "dpmpp3m_sde",
    "dpmpp3s",
    "dpmpp_sde",
    "edm_stochastic",
    "epd_table",
    "euler",
    "euler_ancestral",
    "fast_orders",
    "heun",
    "ipndm",
    "ipndm1",
    "ipndm2",
    "ipndm3",
    "ipndm4",
    "ipndm_v",
    "lms",
    "res",
    "res_multistep",
    "tcd",
    "unipc",
]
