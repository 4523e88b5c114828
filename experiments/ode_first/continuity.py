"""Section 2: dp/dt + div(p v) = 0 for each process."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import pyplot as plt

from experiments.ode_first import common


def divergence(flux, x, h):
    """Return div flux at the points x, shape (batch,), by central differences of spacing h."""
    steps = h * jnp.eye(x.shape[1])[:, None]
    return sum((flux(x + e)[:, i] - flux(x - e)[:, i]) / (2 * h) for i, e in enumerate(steps))


def exact_divergence(flux, x):
    """Return div flux at the points x, shape (batch,), by automatic differentiation."""
    jacobian = jax.vmap(jax.jacfwd(lambda x: flux(x[None])[0]))(x)
    return jnp.trace(jacobian, axis1=1, axis2=2)


def continuity_terms(process, x, t, h=None):
    """Return dp/dt and div(p v) at the points x, the second by finite differences of spacing h where h is given."""
    data = common.mixture(process)
    velocity = common.velocity(process, data)
    density = lambda x, t: jnp.exp(data.log_prob(x, t))
    flux = lambda x: density(x, t)[:, None] * velocity(x, t)
    _, dp_dt = jax.jvp(lambda t: density(x, t), (t,), (jnp.ones_like(t),))
    return dp_dt, exact_divergence(flux, x) if h is None else divergence(flux, x, h)


def measure(points: int = 64, grids=(32, 64, 128, 256), ratio: float = 0.5, processes=None) -> dict:
    """Measure |dp/dt + div(p v)| over |dp/dt| (largest values) at the time where sigma/alpha = ratio."""
    numbers, drawn = {}, {}
    for name, process in (processes or common.PROCESSES).items():
        t = common.at_noise(process, ratio)
        half = common.reach(process, t)
        x = common.lattice(points, half)
        residual = lambda terms: common.largest(terms[0] + terms[1]) / common.largest(terms[0])
        differences = jax.jit(lambda x, t, h, process=process: continuity_terms(process, x, t, h))
        spacings = 2 * half / np.array(grids)
        errors = [residual(differences(x, t, h)) for h in spacings]
        exact = jax.jit(lambda x, t, process=process: continuity_terms(process, x, t))(x, t)
        numbers |= {
            f"{name}: t": float(t),
            f"{name}: largest |dp/dt|": common.largest(exact[0]),
            f"{name}: residual, {grids[-1]} spacings a side": errors[-1],
            f"{name}: order": common.slope(spacings[-3:], errors[-3:]),
            f"{name}: residual, automatic differentiation": residual(exact),
        }
        drawn[name] = half, float(t), errors, np.asarray(exact[0]).reshape(points, points)
    return {"numbers": numbers, "grids": np.array(grids), "drawn": drawn}


def draw(found: dict) -> plt.Figure:
    """Draw density and velocity of each process, one time derivative, and the residuals."""
    figure, axes = plt.subplots(2, 4, figsize=(15, 7.4), layout="constrained")
    for panel, (name, (half, t, _, _)) in zip(axes[:, :3].flat, found["drawn"].items()):
        process = common.PROCESSES[name]
        data = common.mixture(process)
        fine, coarse = common.lattice(120, half), common.lattice(25, half)
        common.shade(panel, np.exp(data.log_prob(fine, t)).reshape(120, 120), half)
        # Far out the velocity is large and moves nothing.
        log_p = np.asarray(data.log_prob(coarse, t))
        v = np.asarray(common.velocity(process, data)(coarse, t))
        coarse, v = (each[log_p > log_p.max() - 4] for each in (coarse, v))
        panel.quiver(*coarse.T, *v.T, color="C3", pivot="mid", width=0.005)
        panel.set(title=f"{name}, t = {t:.3f}\nlongest arrow: |v| = {np.linalg.norm(v, axis=1).max():.2g}")
        panel.set(xlim=(-0.8 * half, 0.8 * half), ylim=(-0.8 * half, 0.8 * half))
    half, _, _, change = found["drawn"]["Rectified"]
    most, axis = common.largest(change), np.linspace(-half, half, len(change))
    shown = axes[0, 3].contourf(axis, axis, change.T, levels=np.linspace(-most, most, 20), cmap="RdBu_r")
    figure.colorbar(shown, ax=axes[0, 3], ticks=plt.MaxNLocator(5))
    axes[0, 3].set(title="Rectified: dp/dt = -div(p v)", aspect="equal")
    axes[0, 3].set(xlim=(-0.8 * half, 0.8 * half), ylim=(-0.8 * half, 0.8 * half))
    last, grids = axes[1, 3], found["grids"]
    for (name, (_, _, errors, _)), marker in zip(found["drawn"].items(), "o^sDvx"):
        last.loglog(grids, errors, marker=marker, label=name, alpha=0.8)
    last.loglog(grids, 0.5 * errors[-1] * (grids[-1] / grids) ** 2, "k:", label="h²")
    last.set(title="largest |dp/dt + div(p v)|\nover largest |dp/dt|", xlabel="spacings h in the width of the box")
    common.plain_ticks(last.xaxis, grids)
    last.grid(alpha=0.3)
    last.legend()
    return figure
