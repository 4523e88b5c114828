"""Fixed-step Runge-Kutta solvers for any ODE dx/dt = drift(x, t)."""

from __future__ import annotations

from jdiff._array import batch_time, call, lincomb
from jdiff.sde import SDE
from jdiff.solvers.base import Solver, State
from jdiff.solvers.tableaus import EULER, HEUN, MIDPOINT, RK4, Tableau

__all__ = ["euler", "heun", "midpoint", "rk4", "runge_kutta"]


def check_ode(sde: SDE) -> None:
    """Raise ValueError if an SDE with diffusion is handed to an ODE solver."""
    if sde.diffusion is not None:
        raise ValueError("this solver integrates ODEs, the SDE has a diffusion: see probability_flow, euler_maruyama")


def _stages(drift, tableau, x, t, s):
    """Return the slopes k_i of one step from (x, t) to s."""
    h = s - t
    slopes = [call(drift, x, t)]
    for c, row in zip(tableau.c[1:], tableau.a):
        terms = [(h * a, k) for a, k in zip(row, slopes) if a != 0]
        # t + (s - t) may be 0 where s is not.
        slopes.append(call(drift, lincomb((1.0, x), *terms), s if c == 1 else t + c * h))
    return slopes


def runge_kutta(sde: SDE, tableau: Tableau) -> Solver:
    """Return the explicit Runge-Kutta solver of a tableau: x_s = x_t + h sum_i b_i k_i, h = s - t.

    Raises:
      ValueError: the SDE has a diffusion.
    """
    check_ode(sde)

    def step(key, state, t, s):
        t, s = batch_time(t, state.x), batch_time(s, state.x)
        h = s - t
        slopes = _stages(sde.drift, tableau, state.x, t, s)
        return State(lincomb((1.0, state.x), *((h * b, k) for b, k in zip(tableau.b, slopes) if b != 0)))

    return Solver(State, step, tableau.order)


def euler(sde: SDE) -> Solver:
    """Return Euler's method: x_s = x_t + (s - t) drift(x_t, t). Order 1, one evaluation a step."""
    return runge_kutta(sde, EULER)


def midpoint(sde: SDE) -> Solver:
    """Return the explicit midpoint rule. Order 2, two evaluations a step."""
    return runge_kutta(sde, MIDPOINT)


def heun(sde: SDE) -> Solver:
    """Return Heun's method, the explicit trapezoidal rule. Order 2, two evaluations a step.

    The second-order sampler of Karras et al. 2022 (arXiv 2206.00364), alg. 1, where it runs in sigma.
    """
    return runge_kutta(sde, HEUN)


def rk4(sde: SDE) -> Solver:
    """Return the classical Runge-Kutta method. Order 4, four evaluations a step."""
    return runge_kutta(sde, RK4)
