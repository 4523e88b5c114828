"""Section 4: from a chosen path of densities, no diffusion, to a velocity that follows it."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates
from jax.scipy.stats import norm
from matplotlib import pyplot as plt
from scipy import sparse, stats
from scipy.sparse.linalg import spsolve

import jdiff
from experiments.ode_first import common

HALF = 4.0  # the box of the 2-D example is [-HALF, HALF]^2


def fading_cdf(x, t):
    """Return the distribution function of the path that fades: (1 - t) data + t noise, in 1-D."""
    weights, means, stds = common.LINE
    data = jnp.sum(weights[None] * norm.cdf(x, means.T, stds[None]), axis=1, keepdims=True)
    return (1 - t[:, None]) * data + t[:, None] * norm.cdf(x)


def velocity_from_cdf(cdf):
    """Return the only velocity in 1-D that moves mass as cdf(x, t) says: v = -(dF/dt) / (dF/dx)."""

    def velocity(x, t):
        _, in_time = jax.jvp(lambda t: cdf(x, t), (t,), (jnp.ones_like(t),))
        _, density = jax.jvp(lambda x: cdf(x, t), (x,), (jnp.ones_like(x),))
        return -in_time / density

    return velocity


def velocity_on_faces(p, dp_dt, h):
    """Solve div(p grad phi) = -dp/dt on square cells of side h, no flow through the walls; return grad phi.

    p and dp_dt have shape (n, n); the two arrays returned are the velocities through the inner faces, (n - 1, n) and
    (n, n - 1).
    """
    n = len(p)
    difference = sparse.diags_array([-1.0, 1.0], offsets=[0, 1], shape=(n - 1, n)) / h
    one = sparse.eye_array(n)
    gradient = sparse.vstack([sparse.kron(difference, one), sparse.kron(one, difference)])
    on_faces = 0.5 * np.concatenate([(p[1:] + p[:-1]).ravel(), (p[:, 1:] + p[:, :-1]).ravel()])
    # The transposed gradient is minus the divergence, so this matrix is -div(p grad .).
    matrix = (gradient.T @ sparse.diags_array(on_faces) @ gradient).tocsc()
    phi = np.zeros(n * n)  # known up to a constant: the first is 0
    phi[1:] = spsolve(matrix[1:, 1:], dp_dt.ravel()[1:])
    through = gradient @ phi
    return through[: n * (n - 1)].reshape(n - 1, n), through[n * (n - 1) :].reshape(n, n - 1)


def interpolate(along_x, along_y, ts, h):
    """Return the field through velocities on faces, (times, n - 1, n) and (times, n, n - 1), linear in x, y and t."""
    # The velocity through the walls is 0.
    along_x, along_y = jnp.pad(along_x, ((0, 0), (1, 1), (0, 0))), jnp.pad(along_y, ((0, 0), (0, 0), (1, 1)))

    def field(x, t):
        time = jnp.interp(t, ts, jnp.arange(len(ts), dtype=t.dtype))
        faces = (x + HALF) / h  # in units of cells, from the wall
        at = lambda values, i, j: map_coordinates(values, [time, i, j], order=1, mode="nearest")
        vx = at(along_x, faces[:, 0], faces[:, 1] - 0.5)
        return jnp.stack([vx, at(along_y, faces[:, 0] - 0.5, faces[:, 1])], axis=1)

    return field


def _line(particles):
    """Carry samples of the noise down to t = 0 along the exact 1-D velocity."""
    flow = jdiff.SDE(velocity_from_cdf(fading_cdf))
    start = np.random.default_rng(0).normal(size=(particles, 1))
    ts = np.linspace(1, 0, 41)
    go = jax.jit(lambda x, t, s: jdiff.solvers.integrate_adaptive(flow, x, t, s, rtol=1e-8, atol=1e-8).x)
    states = [start]
    for t, s in itertools.pairwise(ts):
        states.append(np.asarray(go(states[-1], t, s)))
    levels = np.stack([fading_cdf(x, np.full(particles, t))[:, 0] for x, t in zip(states, ts)])
    ks = [stats.kstest(level, "uniform") for level in levels]
    return ts, np.stack(states)[..., 0], common.largest(levels - levels[:1]), ks


def _cells(n):
    """Return noise and data in 2-D on n x n cells: a normal, and a ring with three lobes, each with 2 % spread evenly.

    The even part keeps p away from 0, where the velocity is (flux) / p.
    """
    x = common.lattice(n, HALF - HALF / n)
    radius, angle = np.hypot(*x.T), np.arctan2(x[:, 1], x[:, 0])
    ring = np.exp(-0.5 * ((radius - 2) / 0.35) ** 2) * (1 + 0.8 * np.cos(3 * angle))
    area = (2 * HALF / n) ** 2
    made = [(0.98 * p / (p.sum() * area) + 0.02 / (2 * HALF) ** 2) for p in (np.exp(-0.5 * radius**2), ring)]
    return [p.reshape(n, n) for p in made]


def _plane(n, times, steps, particles):
    """Solve for the velocity at some times, carry samples of the noise to t = 0, count them in coarse cells."""
    noise, data = _cells(n)
    h = 2 * HALF / n
    ts = np.linspace(0, 1, times) ** 2  # finer at the data, where some densities fade to little
    density = lambda t: (1 - t) * data + t * noise
    faces = [velocity_on_faces(density(t), noise - data, h) for t in ts]
    along_x, along_y = (np.stack(each) for each in zip(*faces))

    rng = np.random.default_rng(1)
    cells = rng.choice(n * n, size=particles, p=noise.ravel() * h**2)
    start = (np.stack(np.divmod(cells, n), axis=1) + rng.uniform(size=(particles, 2))) * h - HALF
    grid = np.linspace(1, 0, steps + 1) ** 2

    @jax.jit
    def carry(x, along_x, along_y):
        flow = jdiff.SDE(interpolate(along_x, along_y, ts, h))
        return jdiff.solvers.integrate(None, jdiff.solvers.heun(flow), x, grid, path=True)[1]

    path = np.asarray(carry(start, along_x, along_y))
    shown = []
    for step in (0, int(steps * (1 - np.sqrt(0.3))), steps):
        p, x = density(grid[step]), path[step]
        statistic, freedom = _chi2(x, p, h)
        v = velocity_on_faces(p, noise - data, h)
        shown.append({"t": grid[step], "x": x, "p": p, "v": v, "chi2": statistic, "cells": freedom})
    return shown


def _chi2(x, p, h, coarse=16):
    """Return chi2 and its degrees of freedom for the particles' counts in coarse x coarse cells, against p."""
    fine = len(p) // coarse
    count = np.histogram2d(*x.T, bins=coarse, range=[(-HALF, HALF)] * 2)[0]
    want = p.reshape(coarse, fine, coarse, fine).sum((1, 3)) * h**2 * len(x)
    # A cell needs some counts for chi2; those with few are one cell together.
    enough = want >= 10
    count, want = (np.append(c[enough], c[~enough].sum()) for c in (count, want))
    keep = want > 0
    return float(np.sum((count - want)[keep] ** 2 / want[keep])), int(keep.sum()) - 1


def _p_value(at):
    return float(stats.chi2.sf(at["chi2"], at["cells"]))


def measure(particles=20_000, n=96, times=33, steps=100, plane_particles=40_000) -> dict:
    """Measure how well particles follow the two paths: Kolmogorov-Smirnov in 1-D, chi2 of counts in cells in 2-D."""
    ts, states, drift, ks = _line(particles)
    shown = _plane(n, times, steps, plane_particles)
    numbers = {
        "1-D: largest change of F(x_t, t) along a trajectory": drift,
        "1-D: KS statistic at t = 0": float(ks[-1].statistic),
        "1-D: KS p-value at t = 0": float(ks[-1].pvalue),
    }
    for at in shown:
        name = f"2-D, t = {at['t']:.3g}"
        numbers |= {
            f"{name}: chi2 / degrees of freedom": at["chi2"] / at["cells"],
            f"{name}: degrees of freedom": at["cells"],
            f"{name}: p-value": _p_value(at),
        }
    return {"numbers": numbers, "ts": ts, "states": states, "shown": shown}


def draw(found: dict) -> plt.Figure:
    """Draw the 1-D path with its trajectories, and density, velocity and particles of the 2-D one."""
    figure, axes = plt.subplots(2, 4, figsize=(15.5, 7.4), layout="constrained")
    ts, states = found["ts"], found["states"]
    x = np.linspace(-3, 3, 300)[:, None]
    for step, shade in ((0, 0.35), (20, 0.6), (40, 0.95)):
        t = np.full(300, ts[step])
        _, density = jax.jvp(lambda x, t=t: fading_cdf(x, t), (x,), (np.ones_like(x),))
        color = plt.cm.Blues(shade)
        axes[0, 0].plot(x[:, 0], density[:, 0], color=color, label=f"p, t = {ts[step]:.1f}")
        axes[0, 0].hist(states[step], bins=80, range=(-3, 3), density=True, color=color, alpha=0.3)
    axes[0, 0].set(title="1-D: p, and particles moved by v = -(dF/dt)/p", xlabel="x")
    axes[0, 0].legend(loc="upper left", fontsize=8)
    chosen = np.argsort(states[0])[:: len(states[0]) // 60]
    axes[1, 0].plot(ts, states[:, chosen], color="0.2", linewidth=0.6)
    axes[1, 0].set(title="1-D: trajectories", xlabel="t (noise at 1, data at 0)", ylabel="x", ylim=(-3, 3))
    for column, at in enumerate(found["shown"], start=1):
        top, bottom = axes[:, column]
        n = len(at["p"])
        common.shade(top, at["p"], HALF - HALF / n)
        # The flux rather than the velocity, which is large where hardly anything is.
        vx, vy = np.pad(at["v"][0], ((1, 1), (0, 0))), np.pad(at["v"][1], ((0, 0), (1, 1)))
        flux = at["p"] * np.stack([vx[1:] + vx[:-1], vy[:, 1:] + vy[:, :-1]]) / 2
        some = slice(n // 48, None, n // 24)
        middles = ((np.arange(n) + 0.5) * 2 * HALF / n - HALF)[some]
        top.quiver(middles, middles, *(f[some, some].T for f in flux), color="C3", pivot="mid", width=0.005)
        top.set(title=f"2-D, t = {at['t']:.2g}: p and its flux, to larger t")
        bottom.hist2d(*at["x"].T, bins=48, range=[(-HALF, HALF)] * 2, cmap="Blues", cmin=1)
        bottom.set(
            title=f"particles: chi2/dof = {at['chi2'] / at['cells']:.2f} (p = {_p_value(at):.2g})", aspect="equal"
        )
        for panel in (top, bottom):
            panel.set(xlim=(-3.2, 3.2), ylim=(-3.2, 3.2))
    return figure
