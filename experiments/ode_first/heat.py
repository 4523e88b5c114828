"""Section 3: under VE the density diffuses as heat does, with sigma^2 as the time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import pyplot as plt

import jdiff
from experiments.ode_first import common


def ve_density(x, variance):
    """Return the density of the mixture under VE at the points x where sigma^2 = variance."""
    process = jdiff.VE()
    t = jdiff.processes.time_at(process, -jnp.log(variance))
    return jnp.exp(common.mixture(process).log_prob(x, t))


def heat_terms(density, x, variance, h):
    """Return dp/d(sigma^2) and (laplace p)/2 at the points x, by central differences of size h sigma^2 and h."""
    k = h * variance
    in_time = (density(x, variance + k) - density(x, variance - k)) / (2 * k)
    steps = h * jnp.eye(x.shape[1])[:, None]
    laplace = sum(density(x + e, variance) - 2 * density(x, variance) + density(x - e, variance) for e in steps) / h**2
    return in_time, 0.5 * laplace


def measure(points: int = 64, spacings=(0.08, 0.04, 0.02, 0.01, 0.005), sigma: float = 0.5) -> dict:
    """Measure the largest difference of the two terms, relative to the largest dp/d(sigma^2)."""
    variance = jnp.asarray(sigma**2)
    half = common.reach(jdiff.VE(), common.at_noise(jdiff.VE(), sigma))
    x = common.lattice(points, half)
    terms = jax.jit(lambda x, h: heat_terms(ve_density, x, variance, h))
    both = [terms(x, h) for h in spacings]
    errors = [common.largest(a - b) / common.largest(a) for a, b in both]
    numbers = {f"residual, h = {spacings[-1]}": errors[-1], "order": common.slope(spacings, errors)}
    return {
        "numbers": numbers,
        "spacings": np.array(spacings),
        "errors": np.array(errors),
        "half": half,
        "terms": [np.asarray(term).reshape(points, points) for term in both[-1]],
    }


def draw(found: dict) -> plt.Figure:
    """Draw a cut through the density as sigma grows, both sides of the equation, and their difference over h."""
    figure, (cut, left, right, order) = plt.subplots(1, 4, figsize=(16, 3.9), layout="constrained")
    x = np.stack([np.linspace(-3.5, 3.5, 200), np.full(200, -0.4)], axis=1)
    for sigma, shade in zip((0.05, 0.25, 0.5, 1.0), (0.95, 0.75, 0.55, 0.35)):
        cut.plot(x[:, 0], ve_density(x, jnp.asarray(sigma**2)), color=plt.cm.Blues(shade), label=f"sigma = {sigma}")
    cut.set(title="VE: p along y = -0.4", xlabel="x")
    cut.legend()
    half, most = found["half"], common.largest(found["terms"][0])
    axis = np.linspace(-half, half, len(found["terms"][0]))
    for axes, term, title in zip((left, right), found["terms"], ("dp/d(sigma²)", "laplace p / 2")):
        shown = axes.contourf(axis, axis, term.T, levels=np.linspace(-1.001 * most, 1.001 * most, 20), cmap="RdBu_r")
        axes.set(aspect="equal", title=f"{title}, sigma = 0.5", xlabel="x", ylabel="y")
    figure.colorbar(shown, ax=right, ticks=plt.MaxNLocator(5))
    h, errors = found["spacings"], found["errors"]
    order.loglog(h, errors, "o-", label="finite differences")
    order.loglog(h, errors[-1] * (h / h[-1]) ** 2, "k:", label="h²")
    order.axhline(1e-4, color="C3", linewidth=0.8, label="1e-4")
    order.set(title="largest difference / largest term", xlabel="spacing h")
    common.plain_ticks(order.xaxis, h)
    order.grid(alpha=0.3)
    order.legend()
    return figure
