"""Solvers: pure (init, step) pairs run by `integrate`, and the adaptive integrator."""

from jdiff.solvers.adaptive import BOGACKI_SHAMPINE, DORMAND_PRINCE, TSITOURAS, Solution, integrate_adaptive
from jdiff.solvers.base import Noise, Solver, State, integrate, white
from jdiff.solvers.corrector import langevin, predictor_corrector
from jdiff.solvers.exponential import ddim, dpmpp_2m
from jdiff.solvers.interop import to_diffrax
from jdiff.solvers.ode import euler, heun, midpoint, rk4, runge_kutta
from jdiff.solvers.stochastic import ancestral, euler_maruyama
from jdiff.solvers.tableaus import Tableau

__all__ = [
    "BOGACKI_SHAMPINE",
    "DORMAND_PRINCE",
    "TSITOURAS",
    "Noise",
    "Solution",
    "Solver",
    "State",
    "Tableau",
    "ancestral",
    "ddim",
    "dpmpp_2m",
    "euler",
    "euler_maruyama",
    "heun",
    "integrate",
    "integrate_adaptive",
    "langevin",
    "midpoint",
    "predictor_corrector",
    "rk4",
    "runge_kutta",
    "to_diffrax",
    "white",
]
