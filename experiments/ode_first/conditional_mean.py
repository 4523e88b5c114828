"""Section 5: rectified flow's field is the conditional mean E[eps - x_0 | x_t], and its trajectories do not cross."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import pyplot as plt
from scipy import stats

import jdiff
from experiments.ode_first import common


def mean_by_quadrature(log_data, x, t, points):
    """Return E[eps - x_0 | x_t = x] by Bayes' rule on a lattice of x_0, for x of shape (batch, D), one t in (0, 1)."""
    x0 = points[None]
    eps = (x[:, None] - (1 - t) * x0) / t
    posterior = jax.nn.softmax(log_data(points)[None] - 0.5 * jnp.sum(eps**2, axis=-1), axis=1)
    return jnp.sum(posterior[..., None] * (eps - x0), axis=1)


def average_in_cells(values, x, half, cells):
    """Return mean, standard error and count of values (batch,) over the square cells that x (batch, 2) fall in."""
    index = np.floor((x + half) / (2 * half) * cells).astype(int)
    inside = np.all((index >= 0) & (index < cells), axis=1)
    place, values = np.ravel_multi_index(index[inside].T, (cells, cells)), values[inside]
    total = lambda weights: np.bincount(place, weights, minlength=cells**2)
    count = np.maximum(total(None), 1)
    mean = total(values) / count
    return mean, np.sqrt(np.maximum(total(values**2) / count - mean**2, 0) / count), total(None)


def crossings(starts, ends):
    """Return how many pairs of paths from starts to ends, vectors both, change their order on the way."""
    first, last = (np.sign(a[:, None] - a[None]) for a in (starts, ends))
    return int(np.sum(first * last < 0)) // 2


def measure(pairs: int = 400_000, t: float = 0.5, paths: int = 40, cells: int = 16) -> dict:
    """Measure the field against quadrature and against regression on pairs, and count crossings in 1-D."""
    process = common.PROCESSES["Rectified"]
    data = common.mixture(process)
    velocity = jax.jit(common.velocity(process, data))

    # Bayes' rule on a lattice; the trapezoidal rule is exact to rounding for smooth densities that end in the box.
    x = data.sample(jax.random.key(0), 50)
    lattice = common.lattice(120, 6.0)
    log_data = lambda x: data.log_prob(x, jnp.zeros_like(x[:, 0]))
    quadrature = jax.jit(lambda x: mean_by_quadrature(log_data, x, t, lattice))(x)

    # Regression: the residual of the conditional mean averages to zero over any set of x_t.
    x0 = data.sample(jax.random.key(1), pairs)
    eps = jax.random.normal(jax.random.key(2), x0.shape, x0.dtype)
    xt = jdiff.processes.perturb(process, x0, eps, t)
    target, field = np.asarray(eps - x0), np.asarray(velocity(xt, t))
    xt, half = np.asarray(xt), common.reach(process, t)
    scores, means = [], []
    for i in range(2):
        mean, error, count = average_in_cells(target[:, i] - field[:, i], xt, half, cells)
        scores.append((mean / np.where(error > 0, error, 1))[count >= 100])
        regressed, _, count = average_in_cells(target[:, i], xt, half, cells)
        means.append(np.stack([regressed, regressed - mean])[:, count >= 100])
    scores = np.concatenate(scores)
    chi2, freedom = float(np.sum(scores**2)), scores.size

    # Pythagoras: any other field f pays |f - v|^2 on top.
    other = 0.8 * field + 0.3 * xt
    loss = lambda f: np.sum((target - f) ** 2, axis=1)
    extra = loss(other) - loss(field) - np.sum((other - field) ** 2, axis=1)

    # In 1-D, where crossings can be seen.
    one = common.line(process)
    starts = one.sample(jax.random.key(3), paths)
    noise = jax.random.normal(jax.random.key(4), starts.shape, starts.dtype)
    flow = jdiff.SDE(common.velocity(process, one))
    ts = np.linspace(process.t_max, process.t_min, 201)
    walk = jax.jit(lambda z: jdiff.solvers.integrate(None, jdiff.solvers.rk4(flow), z, ts, path=True)[1])
    trajectories = np.asarray(walk(noise))[..., 0]
    starts, noise = np.asarray(starts)[:, 0], np.asarray(noise)[:, 0]
    exact = one.flow(noise[:, None], process.t_max, process.t_min)[:, 0]
    numbers = {
        "largest difference of field and quadrature": common.largest(velocity(x, t) - quadrature),
        "regression: chi2 / degrees of freedom": chi2 / freedom,
        "regression: degrees of freedom": freedom,
        "regression: p-value": float(stats.chi2.sf(chi2, freedom)),
        "loss of the field": float(np.mean(loss(field))),
        "loss of 0.8 v + 0.3 x": float(np.mean(loss(other))),
        "its excess beyond E|f - v|^2, in standard errors": float(np.mean(extra) / np.std(extra) * np.sqrt(pairs)),
        "pairs of paths": paths * (paths - 1) // 2,
        "crossings of conditional paths": crossings(starts, noise),
        "crossings of trajectories": max(crossings(trajectories[0], x) for x in trajectories),
        "largest error of trajectories": common.largest(trajectories[-1] - exact),
    }
    return {
        "numbers": numbers,
        "pairs": pairs,
        "ts": ts,
        "conditional": np.stack([noise, starts]),
        "trajectories": trajectories,
        "middles": common.lattice(cells, half - half / cells)[count >= 100],
        "means": np.stack(means, axis=-1),
        "half": half,
        "t": t,
    }


def draw(found: dict) -> plt.Figure:
    """Draw conditional paths, trajectories, and the regressed means under the field."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.6), layout="constrained")
    noise, starts = found["conditional"]
    ends = found["trajectories"][-1]
    for x0, eps in zip(starts, noise):
        left.plot([0, 1], [x0, eps], color="C0" if x0 < 0 else "C1", linewidth=0.8)
    for path, end in zip(found["trajectories"].T, ends):
        middle.plot(found["ts"], path, color="C0" if end < 0 else "C1", linewidth=0.8)
    for axes, title, number in (
        (left, "conditional paths (1 - t) x0 + t eps", "crossings of conditional paths"),
        (middle, "trajectories of dx/dt = E[eps - x0 | x]", "crossings of trajectories"),
    ):
        axes.set(
            xlabel="t (data at 0, noise at 1)",
            title=f"{title}\n{found['numbers'][number]} of {found['numbers']['pairs of paths']} pairs cross",
        )
        axes.set(ylim=(-2.6, 2.6))
    left.set(ylabel="x")
    process = common.PROCESSES["Rectified"]
    data = common.mixture(process)
    half, t, means = found["half"], found["t"], found["means"]
    fine = common.lattice(120, half)
    density = np.exp(data.log_prob(fine, t)).reshape(120, 120)
    common.shade(right, density, half)
    style = {"angles": "xy", "scale": 40, "pivot": "tail"}
    right.quiver(*found["middles"].T, *means[0].T, color="C1", width=0.011, label="mean of eps - x0 in a cell", **style)
    right.quiver(*found["middles"].T, *means[1].T, color="k", width=0.003, label="mean of v(x_t) in it", **style)
    right.set(title=f"regression on {found['pairs']:,} pairs, t = {t}", xlabel="x", ylabel="y")
    right.legend(loc="upper left", fontsize=8)
    return figure
