"""Flows trained by maximum likelihood: continuous ones are fields like any other, coupling flows are maps."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

import jdiff
from experiments.build import process
from jdiff import cnf, nn, processes
from jdiff.solvers import tableaus

TABLEAUS = {
    "euler": tableaus.EULER,
    "midpoint": tableaus.MIDPOINT,
    "heun": tableaus.HEUN,
    "rk4": tableaus.RK4,
}


def continuous_loss(config: ConfigDict, field: jdiff.Field, keys: jax.Array, x: jax.Array) -> jax.Array:
    """Return (-log p(x) + kinetic int |v|^2 dt + jacobian int |dv/dx|^2 dt) / D for each example, see `jdiff.cnf`."""
    c, end = config.loss.cnf, process(config)
    terms = cnf.maximum_likelihood(
        None if c.divergence == "exact" else keys,
        end,
        field,
        x,
        jnp.linspace(end.t_min, end.t_max, c.steps + 1),
        predict=config.network.predict,
        divergence=c.divergence,
        tableau=TABLEAUS[c.solver],
        gradient=c.gradient,
    )
    return (terms.nll + c.kinetic * terms.kinetic + c.jacobian * terms.jacobian) / math.prod(x.shape[1:])


def coupling_likelihood(module: nn.CouplingFlow, params, statistics: dict, x, *, dropout=None) -> jdiff.LogLikelihood:
    """Return the exact log-density of a coupling flow, of data standardised by their statistics.

    Args:
      module: the flow.
      params: its parameters.
      statistics: mean and std, from `experiments.model.statistics`.
      x: data in model space.
      dropout: one key per example, in training.
    """
    mean, std = statistics["mean"][None], statistics["std"][None]
    y = (x - mean) / std
    if dropout is None:
        z, log_det = module.apply({"params": params}, y)
    else:
        apply = lambda key, y: module.apply({"params": params}, y[None], train=True, rngs={"dropout": key})
        z, log_det = (out[:, 0] for out in jax.vmap(apply)(dropout, y))
    log_prob = processes.prior_log_prob(jdiff.Rectified(), z) + log_det - jnp.sum(jnp.log(std))
    once = jnp.ones_like(log_prob, jnp.int32)
    return jdiff.LogLikelihood(log_prob, z, once, jnp.zeros_like(log_prob), ~jnp.isfinite(log_prob))


def coupling_samples(module: nn.CouplingFlow, params, statistics: dict, keys: jax.Array, shape) -> jax.Array:
    """Return samples in model space, one per key: the inverse of normal latents."""
    z = processes.prior_sample(keys, jdiff.Rectified(), (*keys.shape, *shape))
    y = module.apply({"params": params}, z, method="inverse")
    return statistics["mean"][None] + statistics["std"][None] * y
