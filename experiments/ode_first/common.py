"""What the sections share: the 2-D data, the processes, points on a lattice, slopes."""

from __future__ import annotations

import jax.numpy as jnp
import matplotlib
import numpy as np

import jdiff
from jdiff import analytic

matplotlib.use("Agg")

WEIGHTS, STDS = np.array([0.5, 0.3, 0.2]), np.array([0.5, 0.35, 0.25])
MEANS = np.array([[-1.2, -0.4], [1.0, 1.1], [0.9, -1.2]])
# The same data seen from one side: sections that draw x against t.
LINE = np.array([0.55, 0.45]), np.array([[-1.2], [1.0]]), np.array([0.35, 0.25])

PROCESSES = {
    "VP": jdiff.VP(),
    "SubVP": jdiff.SubVP(),
    "VE": jdiff.VE(),
    "EDM": jdiff.EDM(),
    "Cosine": jdiff.Cosine(),
    "Rectified": jdiff.Rectified(),
}


def mixture(process: jdiff.Process) -> analytic.Analytic:
    """Return the closed forms of a mixture of three Gaussians in 2-D."""
    return analytic.gaussian_mixture(process, WEIGHTS, MEANS, STDS)


def line(process: jdiff.Process) -> analytic.Analytic:
    """Return the closed forms of a mixture of two Gaussians in 1-D."""
    return analytic.gaussian_mixture(process, *LINE)


def velocity(process: jdiff.Process, data: analytic.Analytic) -> jdiff.Field:
    """Return the probability flow's velocity, from the exact denoiser (finite where alpha = 0)."""
    return jdiff.probability_flow(process, data.denoise, predict="x0").drift


def at_noise(process: jdiff.Process, ratio: float):
    """Return the time at which sigma/alpha has a value."""
    return jdiff.processes.time_at(process, jnp.asarray(-2 * np.log(ratio)))


def reach(process: jdiff.Process, t) -> float:
    """Return the half-width of a box that holds the mixture at t."""
    alpha, sigma = (float(c) for c in process.marginal(t))
    return 2.2 * alpha + 3.5 * float(np.hypot(0.25 * alpha, sigma))


def lattice(points: int, half: float) -> np.ndarray:
    """Return points^2 points of [-half, half]^2, shape (points^2, 2), the first coordinate slowest."""
    axis = np.linspace(-half, half, points)
    return np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)


def slope(h, error) -> float:
    """Return the order p of error ~ h^p, by least squares in the logarithms."""
    return float(np.polyfit(np.log(h), np.log(error), 1)[0])


def plain_ticks(axis, values) -> None:
    """Label a logarithmic axis at the given values only."""
    axis.set_ticks(values, [f"{v:g}" for v in values])
    axis.set_ticks([], minor=True)


def shade(axes, p, half, **style):
    """Draw a density, shape (n, n), the first coordinate to the right."""
    axis = np.linspace(-half, half, len(p))
    axes.contourf(axis, axis, p.T, levels=np.linspace(0, 1.25 * p.max(), 16), cmap="Blues", **style)
    axes.set_aspect("equal")


def largest(x) -> float:
    """Return the largest magnitude."""
    return float(np.max(np.abs(x)))
