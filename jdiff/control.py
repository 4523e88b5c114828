"""Control by a measurement: from the field of p(x_0) to fields and samplers of p(x_0 | y), y = A(x_0) + std n.

With the posterior mean x_0(x_t) of a field and its Jacobian J, Cov[x_0 | x_t] = sigma^2 / alpha J^T (Tweedie's second
formula). A guided x0-field is

    x_0 + scale Cov[x_0 | x_t] A^T u,    (Cov[y | x_t]) u = y - A(x_0),

that is x_0 + sigma^2 / alpha grad log p(y | x_t), and the methods differ in what they take for Cov[y | x_t]. x0-fields
go in and come out, since scores say nothing where alpha = 0; other kinds by `jdiff.reparameterise`. An evaluation is
one forward pass and one linearisation of the field.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jdiff._array import (
    batch_time,
    call,
    check_array,
    check_count,
    check_positive,
    check_real,
    expand,
    is_concrete,
    lincomb,
    scalars,
    sum_event,
    widened,
)
from jdiff._typing import Array, Field, Process
from jdiff.operators import LinearOperator, check_example, conjugate_gradients, solve
from jdiff.processes import time_at
from jdiff.solvers.base import Noise, Solver, State, white
from jdiff.solvers.exponential import ddim

__all__ = ["dps", "dps_sampler", "moment_matching", "pseudoinverse"]

_LEAST = 1e-3
"""alpha / sigma below which Cov = sigma^2 / alpha J^T has no digits left: the field is asked there instead."""


def dps(
    process: Process,
    denoise: Field,
    measure: Callable[[Array], Array],
    y: Array,
    std: Array | float,
    *,
    scale: Array | float = 1.0,
    least: float = _LEAST,
) -> Field:
    """Return diffusion posterior sampling: Cov[y | x_t] = std^2 I, as if x_0(x_t) were certain. One vjp.

    grad log p(y | x_t) = -1 / (2 std^2) grad_x |y - A(x_0(x_t))|^2, Chung et al. 2023 (arXiv 2209.14687), section
    3. Overconfident: for Gaussian data the samples' covariance is too small (docs/control.md), and it is stiff where
    std is small against the data; `dps_sampler` has the step size of the paper's experiments.

    Args:
      process: the forward process.
      denoise: an x0-field.
      measure: A, any differentiable function (batch, *event) -> (batch, *measured), example by example;
        `operator.forward` of a linear one.
      y: the measurements.
      std: of their noise, positive, scalar or (batch,).
      scale: of the guidance, scalar or (batch,).
      least: where alpha < least sigma the field is asked at the time where they are equal.

    Raises:
      ValueError: std or least not positive.
    """
    # By NumPy: inside jit JAX would compare a number that is known as if it were not.
    check_real(std, "std")
    if is_concrete(std) and not np.all(np.asarray(std) > 0):
        raise ValueError(f"std must be positive, got {std}: `pseudoinverse` and `moment_matching` take 0")
    return _guided(
        process, denoise, measure, y, scale, least, lambda r, t, cov, back: expand(scalars(std, r, "std"), r) ** -2 * r
    )


def pseudoinverse(
    process: Process,
    denoise: Field,
    operator: LinearOperator,
    y: Array,
    std: Array | float = 0.0,
    *,
    scale: Array | float = 1.0,
    sigma_data: float = 1.0,
    least: float = _LEAST,
) -> Field:
    """Return pseudoinverse guidance (PiGDM): Cov[y | x_t] = r^2 A A^T + std^2 I. One vjp.

    r^2 = sigma^2 d^2 / (alpha^2 d^2 + sigma^2), d = sigma_data, is Cov[x_0 | x_t] of data N(m, d^2 I), for which the
    guided field is exact. Song et al. 2023 (Pseudoinverse-guided diffusion models, ICLR), section 3, with their r of VE
    (d = 1) in the coordinates of any process.

    Args:
      process: the forward process.
      denoise: an x0-field.
      operator: A; inverses are exact where A A^T is diagonal, else by conjugate gradients.
      y: the measurements; 0 where a mask hides them.
      std: of their noise, scalar or (batch,).
      scale: of the guidance, scalar or (batch,).
      sigma_data: standard deviation of the data.
      least: as in `dps`.

    Raises:
      ValueError: sigma_data or least not positive and finite.
    """

    check_positive(sigma_data, "sigma_data")

    def weigh(r, t, cov, back):
        alpha, sigma = process.marginal(t)
        spread = (sigma * sigma_data) ** 2 / ((alpha * sigma_data) ** 2 + sigma**2)
        return solve(operator, r, spread, jnp.square(scalars(std, r, "std")))

    return _guided(process, denoise, operator, y, scale, least, weigh)


def moment_matching(
    process: Process,
    denoise: Field,
    operator: LinearOperator,
    y: Array,
    std: Array | float = 0.0,
    *,
    scale: Array | float = 1.0,
    iterations: int = 5,
    least: float = _LEAST,
) -> Field:
    """Return guidance by the field's own covariance: Cov[y | x_t] = A (sigma^2 / alpha J^T) A^T + std^2 I.

    Rozet et al. 2024 (arXiv 2405.13712), section 4.2; the covariance of Boys et al. 2023 (arXiv 2310.06721) without
    their diagonal approximation. Exact for Gaussian data, whatever their covariance, at every t. Conjugate gradients of
    `iterations` steps: iterations + 1 vjps of one linearisation. A trained network's J is neither symmetric nor
    positive, and then few iterations are steadier than many.

    Args:
      process: the forward process.
      denoise: an x0-field.
      operator: A.
      y: the measurements; 0 where a mask hides them.
      std: of their noise, scalar or (batch,).
      scale: of the guidance, scalar or (batch,).
      iterations: of the conjugate gradients.
      least: as in `dps`.

    Raises:
      ValueError: iterations < 1, least not positive and finite.
      TypeError: iterations is no integer.
    """
    check_count(iterations, "iterations")

    def weigh(r, t, cov, back):
        variance = expand(jnp.square(scalars(std, r, "std")), r)
        matrix = lambda u: operator.forward(cov(back(u))) + variance * u
        return conjugate_gradients(matrix, r, iterations)

    return _guided(process, denoise, operator, y, scale, least, weigh)


def dps_sampler(
    process: Process,
    denoise: Field,
    measure: Callable[[Array], Array],
    y: Array,
    scale: Array | float = 1.0,
    *,
    eta: Array | float = 1.0,
    noise: Noise = white,
) -> Solver:
    """Return diffusion posterior sampling with the paper's step size: a solver. One evaluation and one vjp a step.

    x_s = ddim(x_t) - scale grad_x |y - A(x_0(x_t))|, Chung et al. 2023 (arXiv 2209.14687), alg. 1 with zeta =
    scale / (2 |y - A(x_0)|). The length of a guidance step does not depend on the time step or on std: more steps
    guide more. It has no posterior that it would sample exactly. eta = 1 is ancestral sampling, as in the paper.

    Args:
      process: the forward process.
      denoise: an x0-field.
      measure: A, any differentiable function (batch, *event) -> (batch, *measured), example by example.
      y: the measurements; 0 where a mask hides them.
      scale: scalar or (batch,).
      eta: stochasticity, as in `jdiff.solvers.ddim`.
      noise: where unit normals come from.

    Raises:
      ValueError: y of another shape than a measured batch, when the solver steps.
    """

    def step(keys, state, t, s):
        x = state.x
        check_array(x)
        x0, pull = jax.vjp(lambda x: call(denoise, x, t), x)
        residual, back = _residual(measure, y, x0)
        norm = jnp.sqrt(sum_event(widened(residual) ** 2))
        uphill = pull(back(lincomb((1 / jnp.where(norm > 0, norm, 1), residual))))[0]
        state = ddim(process, lambda x, t: x0, eta, noise=noise).step(keys, state, t, s)
        return State(lincomb((1.0, state.x), (scalars(scale, x, "scale"), uphill)))

    return Solver(State, step, 1)


def _guided(process, denoise, given, y, scale, least, weigh):
    """The field of the module's formula, of an operator or a measuring function.

    weigh(residual, t, covariance, adjoint of A) -> u.
    """
    check_positive(least, "least")

    measure, known = (given.forward, given) if isinstance(given, LinearOperator) else (given, None)

    def field(x, t):
        check_array(x)
        if known is not None:
            check_example(x, known)
        t = batch_time(t, x)
        t = jnp.minimum(t, time_at(process, jnp.full_like(t, 2 * math.log(least))))
        x0, pull = jax.vjp(lambda x: call(denoise, x, t), x)
        alpha, sigma = process.marginal(t)
        covariance = lambda v: lincomb((sigma**2 / alpha, pull(v)[0]))
        residual, back = _residual(measure, y, x0)
        return lincomb((1.0, x0), (scalars(scale, x, "scale"), covariance(back(weigh(residual, t, covariance, back)))))

    return field


def _residual(measure, y, x0):
    """y - A(x_0) and the adjoint of A's derivative there."""
    measured, back = jax.vjp(measure, x0)
    check_array(measured, "what measure returns")
    check_real(y, "y")
    if jnp.shape(y) != measured.shape:
        raise ValueError(f"y must have the shape of a measured batch, {measured.shape}; got {jnp.shape(y)}")
    return y.astype(measured.dtype) - measured, lambda u: back(u)[0]
