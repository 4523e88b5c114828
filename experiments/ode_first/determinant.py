"""Section 1: from the Jacobian determinant of one small step to d log p/dt = -div v."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import pyplot as plt

import jdiff
from experiments.ode_first import common


def step_determinant(v, x, h):
    """Return log|det(I + h J)| of the map x -> x + h v(x), and h tr J, for each example."""
    jacobian = jax.vmap(jax.jacfwd(v))(x)
    determinant = jnp.linalg.det(jnp.eye(x.shape[1])[None] + h * jacobian)
    return jnp.log(jnp.abs(determinant)), h * jnp.trace(jacobian, axis1=1, axis2=2)


def density_by_layers(velocity, x, ts, prior_log_prob):
    """Return log p(x) of the model that maps x to the prior by the layers x + h v(x, t), one for each step of ts."""

    def layer(carry, ends):
        x, log_det = carry
        t, s = ends
        move = lambda x: velocity(x[None], t)[0]
        return (x + (s - t) * jax.vmap(move)(x), log_det + step_determinant(move, x, s - t)[0]), None

    (z, log_det), _ = jax.lax.scan(layer, (x, jnp.zeros_like(x[:, 0])), (ts[:-1], ts[1:]))
    return prior_log_prob(z) + log_det


def measure(points: int = 64, layers=(25, 50, 100, 200, 400), t: float = 0.4) -> dict:
    """Measure the order of one step, of many steps, and the error of `jdiff.log_likelihood`, on Rectified."""
    process = common.PROCESSES["Rectified"]
    data = common.mixture(process)
    velocity = common.velocity(process, data)
    x = data.sample(jax.random.key(0), points)

    h = 2.0 ** -np.arange(1, 11)
    v = lambda x: velocity(x[None], t)[0]
    step = jax.jit(lambda x, h: step_determinant(v, x, h))
    step_error = np.array([np.mean(np.abs(np.subtract(*step(x, size)))) for size in h])

    # At t_max = 1 the process is its prior exactly, so nothing but the steps is approximate.
    truth = data.log_prob(x, process.t_min)
    prior = lambda z: jdiff.processes.prior_log_prob(process, z)
    model = jax.jit(lambda x, ts: density_by_layers(velocity, x, ts, prior))
    many = [model(x, np.linspace(process.t_min, process.t_max, n + 1)) for n in layers]
    layer_error = np.array([np.mean(np.abs(log_p - truth)) for log_p in many])
    solve = jax.jit(
        lambda x: jdiff.log_likelihood(
            None, process, data.denoise, x, predict="x0", divergence="exact", rtol=1e-9, atol=1e-9
        )
    )
    found = solve(x)
    numbers = {
        "order of |log|det(I + hJ)| - h tr J|": common.slope(h[3:], step_error[3:]),
        "order of log p by layers": common.slope(1 / np.array(layers), layer_error),
        f"mean error of log p, {layers[-1]} layers": layer_error[-1],
        "largest error of jdiff.log_likelihood": common.largest(found.log_prob - truth),
        "evaluations of jdiff.log_likelihood": int(np.max(found.evaluations)),
    }
    return {
        "numbers": numbers,
        "h": h,
        "step_error": step_error,
        "layers": np.array(layers),
        "layer_error": layer_error,
        "cells": _cells(velocity, 0.6),
    }


def _cells(velocity, t, h=0.15, cells=20, half=2.0):
    """Return the corners of square cells before and after one step, and div v in their middles."""
    corners = common.lattice(cells + 1, half)
    moved = corners + h * np.asarray(jax.jit(velocity)(corners, t))
    middles = common.lattice(cells, half - half / cells)
    _, trace = jax.jit(lambda x: step_determinant(lambda x: velocity(x[None], t)[0], x, 1.0))(middles)
    shape = (cells + 1, cells + 1, 2)
    return corners.reshape(shape), moved.reshape(shape), np.asarray(trace).reshape(cells, cells)


def draw(found: dict) -> plt.Figure:
    """Draw the cells moved by one step, and the two errors over the step."""
    figure, (cells, one, many) = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    before, after, divergence = found["cells"]
    most = np.abs(divergence).max()
    for corners, style in ((before, {"color": "0.75", "linewidth": 0.5}), (after, {"color": "0.2", "linewidth": 0.7})):
        cells.plot(corners[..., 0], corners[..., 1], **style)
        cells.plot(corners[..., 0].T, corners[..., 1].T, **style)
    filled = cells.pcolormesh(*np.moveaxis(after, -1, 0), divergence, cmap="RdBu_r", vmin=-most, vmax=most, alpha=0.8)
    figure.colorbar(filled, ax=cells, label="div v")
    cells.set(title="cells (grey) moved by x + h v(x, t)\nt = 0.6, h = 0.15", xlabel="x", ylabel="y", aspect="equal")

    h, error = found["h"], found["step_error"]
    one.loglog(h, error, "o-", label="mean over data")
    one.loglog(h, error[-1] * (h / h[-1]) ** 2, "k:", label="h²")
    one.set(title="one step: |log|det(I + hJ)| - h tr J|, nats", xlabel="h")
    layers, error = found["layers"], found["layer_error"]
    many.loglog(layers, error, "o-", label="determinants of N layers x + h v")
    many.loglog(layers, error[-1] * layers[-1] / layers, "k:", label="1/N")
    evaluations = found["numbers"]["evaluations of jdiff.log_likelihood"]
    solver = found["numbers"]["largest error of jdiff.log_likelihood"]
    many.axhline(solver, color="C1", label=f"jdiff.log_likelihood (largest error;\n{evaluations} evaluations)")
    many.set(title="whole trajectory: error of log p(x), nats", xlabel="layers N")
    many.set_ylim(1e-10, 1)
    common.plain_ticks(many.xaxis, layers)
    for axes in (one, many):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9, loc="upper left" if axes is one else "center")
    return figure
