"""Solvers: pure (init, step) pairs run by `integrate`, and the adaptive integrator."""

from jdiff.solvers.adaptive import Solution, integrate_adaptive
from jdiff.solvers.adaptive_sde import integrate_adaptive_sde
from jdiff.solvers.base import Noise, Solver, State, integrate, white
from jdiff.solvers.brownian import brownian
from jdiff.solvers.corrector import langevin, predictor_corrector
from jdiff.solvers.exponential import ddim, dpm_solver, dpmpp_2s
from jdiff.solvers.interop import to_diffrax
from jdiff.solvers.multistep import deis, dpmpp_2m, dpmpp_3m, exponential_adams, unipc
from jdiff.solvers.ode import euler, heun, midpoint, rk4, runge_kutta
from jdiff.solvers.stochastic import ancestral, edm, euler_maruyama, stochastic_heun
from jdiff.solvers.tableaus import (
    BOGACKI_SHAMPINE,
    DORMAND_PRINCE,
    EULER,
    HEUN,
    MIDPOINT,
    PRINCE_DORMAND,
    RK4,
    TSITOURAS,
    Tableau,
)

__all__ = [
    "BOGACKI_SHAMPINE",
    "DORMAND_PRINCE",
    "EULER",
    "HEUN",
    "MIDPOINT",
    "PRINCE_DORMAND",
    "RK4",
    "TSITOURAS",
    "Noise",
    "Solution",
    "Solver",
    "State",
    "Tableau",
    "ancestral",
    "brownian",
    "ddim",
    "deis",
    "dpm_solver",
    "dpmpp_2m",
    "dpmpp_2s",
    "dpmpp_3m",
    "edm",
    "euler",
    "euler_maruyama",
    "exponential_adams",
    "heun",
    "integrate",
    "integrate_adaptive",
    "integrate_adaptive_sde",
    "langevin",
    "midpoint",
    "predictor_corrector",
    "rk4",
    "runge_kutta",
    "stochastic_heun",
    "to_diffrax",
    "unipc",
    "white",
]
