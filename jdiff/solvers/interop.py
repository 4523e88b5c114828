"""Hand an SDE or ODE of ours to diffrax: its solvers, its adjoints, its dense output."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from jdiff._array import call
from jdiff.sde import SDE

if TYPE_CHECKING:
    import diffrax

__all__ = ["to_diffrax"]


def to_diffrax(
    sde: SDE | Callable[[Any], SDE], brownian_motion: diffrax.AbstractBrownianPath | None = None
) -> diffrax.AbstractTerm:
    """Return diffrax terms for an SDE of ours (diffrax is an optional dependency: `pip install jdiff[diffrax]`).

    The state keeps its leading batch axis; diffrax's scalar t reaches the field as (batch,). diffrax then takes one
    step size for the whole batch; `jax.vmap` over examples of batch one gives each its own.

    Args:
      sde: drift, and diffusion where brownian_motion is given; or a function of diffrax's `args` that builds it. Of
        values closed over, `BacksolveAdjoint` takes no traced ones: it needs the parameters in `args`.
      brownian_motion: a diffrax Brownian path with the shape of the state; None for an ODE.

    Returns:
      diffrax.ODETerm, or MultiTerm(ODETerm, ControlTerm) with a diagonal operator. diffrax integrates SDEs forwards
      only: for sampling, write the reverse SDE in the time -t.

    Raises:
      ValueError: a diffusion without a Brownian motion, or the other way round.
      ImportError: diffrax is not installed.
    """
    try:
        import diffrax
        import lineax
    except ImportError as error:
        raise ImportError("to_diffrax needs diffrax: pip install jdiff[diffrax]") from error

    def build(args):
        built = sde if isinstance(sde, SDE) else sde(args)
        if (built.diffusion is None) != (brownian_motion is None):
            raise ValueError("a Brownian motion and a diffusion belong together: give both, or neither")
        return built

    if isinstance(sde, SDE):
        build(None)
    drift = diffrax.ODETerm(lambda t, y, args: call(build(args).drift, y, jnp.asarray(t)))
    if brownian_motion is None:
        return drift

    def diffusion(t, y, args):
        return lineax.DiagonalLinearOperator(call(build(args).diffusion, y, t))

    return diffrax.MultiTerm(drift, diffrax.ControlTerm(diffusion, brownian_motion))
