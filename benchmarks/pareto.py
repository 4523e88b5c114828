"""Quality of samples against model evaluations: solvers x grids x budgets, on targets whose fields are known exactly.

    python -m benchmarks.pareto [--targets gaussian checkerboard mixture] [--solvers ...] [--grids ...] [--budgets ...]
    TFDS_DATA_DIR=... python -m benchmarks.pareto --targets mnist --workdir runs/mnist_smooth

gaussian: 64-D, moments of the 8x8 digits; the samples' law is found exactly (the solvers are affine there), and with it
the Wasserstein-2 distance and the KL divergence; its seconds are of that, not of sampling. checkerboard: 2-D, 72
Gaussians; energy distance and the sample Wasserstein-2 distance. mixture: 64-D, 50 Gaussians fitted to the digits;
energy distance. mnist: a trained network; energy and Frechet distance in the features of a small classifier trained
here. "+ error": the same field with a smooth error of known size added to its v-prediction. Targets are those at t_min,
so that an exact solver has no error at all. Errors are standard errors over keys. CSV, PNG and Markdown go to the
output folder.
"""

from __future__ import annotations

import csv
import functools
import math
import pathlib
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from benchmarks import common, mnist_features
from experiments import samplers
from experiments.compilation import compiler_options
from jdiff import analytic, data, grid_search, metrics, processes, reverse, solvers, times
from jdiff.sde import probability_flow

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PROCESS = processes.VP(t_min=1e-3)
BUDGETS = (5, 8, 10, 15, 20, 35, 50, 100, 250, 1000)
KEYS, PER_KEY, ASSIGNED = 4, 1000, 500
CANDIDATES = 128

flow = lambda p, f: probability_flow(p, f, predict="x0")
backwards = lambda p, f: reverse(p, f, predict="x0")


class Case(NamedTuple):
    """A solver in the picture: make(process, x0-field, steps, noise), its evaluations a step; whether it is noisy."""

    make: Callable
    cost: int = 1
    noisy: bool = False


CASES = {
    "euler": Case(lambda p, f, n, z: solvers.euler(flow(p, f))),
    "heun in t": Case(lambda p, f, n, z: solvers.heun(flow(p, f)), 2),
    "rk4 in t": Case(lambda p, f, n, z: solvers.rk4(flow(p, f)), 4),
    "edm": Case(lambda p, f, n, z: solvers.edm(p, f), 2),
    "ddim": Case(lambda p, f, n, z: solvers.ddim(p, f)),
    "dpm_solver-2": Case(lambda p, f, n, z: solvers.dpm_solver(p, f, 2), 2),
    "dpm_solver-3": Case(lambda p, f, n, z: solvers.dpm_solver(p, f, 3), 3),
    "dpmpp_2s": Case(lambda p, f, n, z: solvers.dpmpp_2s(p, f), 2),
    "dpmpp_2m": Case(lambda p, f, n, z: solvers.dpmpp_2m(p, f)),
    "dpmpp_3m": Case(lambda p, f, n, z: solvers.dpmpp_3m(p, f)),
    "deis-3": Case(lambda p, f, n, z: solvers.deis(p, f, 3)),
    "unipc-2": Case(lambda p, f, n, z: solvers.unipc(p, f, 2)),
    "unipc-3": Case(lambda p, f, n, z: solvers.unipc(p, f, 3)),
    "euler_maruyama": Case(lambda p, f, n, z: solvers.euler_maruyama(backwards(p, f), noise=z), noisy=True),
    "stochastic_heun": Case(lambda p, f, n, z: solvers.stochastic_heun(backwards(p, f), noise=z), 2, noisy=True),
    "ancestral": Case(lambda p, f, n, z: solvers.ancestral(p, f, noise=z), noisy=True),
    "ancestral, large": Case(lambda p, f, n, z: solvers.ancestral(p, f, variance="large", noise=z), noisy=True),
    "ddim, eta = 0.5": Case(lambda p, f, n, z: solvers.ddim(p, f, 0.5, noise=z), noisy=True),
    "edm, churn 40": Case(
        lambda p, f, n, z: solvers.edm(p, f, churn=min(40 / n, math.sqrt(2) - 1), noise=z), 2, noisy=True
    ),
    "dpmpp_2m_sde": Case(lambda p, f, n, z: solvers.dpmpp_2m(p, f, 1.0, noise=z), noisy=True),
    "dpmpp_3m_sde": Case(lambda p, f, n, z: solvers.dpmpp_3m(p, f, 1.0, noise=z), noisy=True),
}
NOISY = tuple(name for name, case in CASES.items() if case.noisy)
# Beyond 100 evaluations only these go on: the others have arrived.
LONG = ("ddim", "dpmpp_2m", "euler_maruyama", "ancestral", "ancestral, large")
GRIDS = {
    "linear": times.linear,
    "quadratic": times.quadratic,
    "uniform_log_snr": times.uniform_log_snr,
    "karras": times.karras,
}
# Found for each exact field, solver and number of steps with samples of other keys; in the table as a grid of its own.
SEARCHED, MOST_REFINED = "searched", 20
REFINED = ("ddim", "edm", "dpmpp_2m", "dpmpp_3m", "unipc-2")
# Solver -> grid: quadratic for first-order methods, log-SNR for the others, as the known fields suggest.
ON_MNIST = {
    "ddim": "quadratic",
    "edm": "uniform_log_snr",
    "dpmpp_2m": "uniform_log_snr",
    "unipc-2": "uniform_log_snr",
    "ancestral": "quadratic",
    "dpmpp_2m_sde": "uniform_log_snr",
    "ddim, eta = 0.5": "quadratic",
}
# Rows of the picture of samples.
SIDE_BY_SIDE = {"ancestral": (1000, 100, 20), "ddim": (100, 20, 10), "dpmpp_2m": (20, 10), "dpmpp_2m_sde": (20,)}


def main() -> None:
    """Measure, print, and write the table and the pictures."""
    parser = common.parser(__doc__)
    known = ["gaussian", "checkerboard", "mixture", "mnist"]
    parser.add_argument("--targets", nargs="+", default=known[:3], choices=known)
    parser.add_argument("--solvers", nargs="+", default=None, choices=list(CASES))
    parser.add_argument(
        "--grids", nargs="+", default=[*GRIDS, SEARCHED], choices=[*GRIDS, SEARCHED], help="not of mnist"
    )
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS)
    parser.add_argument("--workdir", default="runs/mnist_smooth", help="of --targets mnist")
    parser.add_argument("--images", type=int, default=64, help="of --targets mnist, for each of four keys")
    options = common.parse(parser)
    folder = pathlib.Path(options.out)
    for target in options.targets:
        rows = []
        for row in _mnist(options) if target == "mnist" else _analytic(target, options):
            rows.append(row)
            print({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        name = f"pareto_{target}"
        with open(folder / f"{name}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        (folder / f"{name}.md").write_text(markdown(rows))
        picture(folder / f"{name}.png", rows)
        common.write(options, name, {"rows": len(rows), "budgets": list(options.budgets)})


def _analytic(target, options):
    """Yield the rows of a target with known fields."""
    exact, draw, shape = TARGETS[target]()
    for name, field in {"exact": exact.denoise, "+ error": wrong(exact.denoise)}.items():
        if target == "gaussian" and name != "exact":
            continue  # its error is not affine
        judge = _moments if target == "gaussian" else functools.partial(_samples, reference=draw, w2=shape == (2,))
        paths = _fine_paths(field, shape) if name == "exact" and SEARCHED in options.grids else None
        for solver in options.solvers or CASES:
            case = CASES[solver]
            programs = {}
            for grid in options.grids if name == "exact" else ("uniform_log_snr",):
                for budget in options.budgets:
                    steps = budget // case.cost
                    if steps < 1 or (budget > 100 and solver not in LONG):
                        continue
                    ts = jax.block_until_ready(_grid(grid, solver, field, paths, steps))
                    if ts is None:
                        continue
                    yield (
                        {"target": target, "field": name, "solver": solver, "grid": grid, "evaluations": budget}
                        | {"steps": steps}
                        | judge(case, field, shape, ts, programs)
                    )


def _grid(grid, solver_name, field, paths, steps):
    """Return the times, or None where a grid of so many steps is not searched for."""
    if grid != SEARCHED:
        return GRIDS[grid](PROCESS, steps)
    case = CASES[solver_name]
    if case.noisy:
        ts, path = paths["reverse"]
        return _best(field)(path, ts, steps) if steps < CANDIDATES else None
    if steps > MOST_REFINED or solver_name not in REFINED:
        return None
    x, end = paths["flow"]
    solver = case.make(PROCESS, field, steps, solvers.white)
    run = jax.jit(lambda ts: solvers.integrate(None, solver, x, ts)[0])
    error = lambda ts: float(jnp.mean((run(ts) - end) ** 2))
    begin = min((make(PROCESS, steps) for make in GRIDS.values()), key=error)
    return jax.jit(lambda x, end, ts: grid_search.refine_grid(solver, x, end, ts))(x, end, begin)


@functools.cache
def _best(field):
    return jax.jit(functools.partial(grid_search.best_grid, PROCESS, field), static_argnums=2)


def _fine_paths(field, shape):
    """Return what grids are searched with: 256 fine solves of the flow, and paths of the reverse SDE."""
    ts = times.uniform_log_snr(PROCESS, CANDIDATES)
    keys = jax.random.split(jax.random.key(77), 256)
    x = processes.prior_sample(keys, PROCESS, (256, *shape))
    fine = times.uniform_log_snr(PROCESS, 4 * CANDIDATES)
    end, _ = jax.jit(lambda x: solvers.integrate(None, solvers.edm(PROCESS, field), x, fine))(x)
    reverse_solver = solvers.ancestral(PROCESS, field)
    _, path = jax.jit(lambda x: solvers.integrate(keys, reverse_solver, x, ts, path=True))(x)
    return {"flow": (x, end), "reverse": (ts, path)}


def _run(case, field, steps, programs, keys, x, ts):
    """Return the samples, seconds to compile and seconds of a call. One program for each number of steps."""
    if steps not in programs:
        start = time.perf_counter()
        solver = case.make(PROCESS, field, steps, solvers.white)
        program = jax.jit(lambda keys, x, ts: solvers.integrate(keys, solver, x, ts)[0]).lower(keys, x, ts).compile()
        programs[steps] = program, time.perf_counter() - start
    program, compiling = programs[steps]
    start = time.perf_counter()
    x = jax.block_until_ready(program(keys, x, ts))
    return x, compiling, time.perf_counter() - start


def _samples(case, field, shape, ts, programs, *, reference, w2):
    """Energy distance, and Wasserstein-2 by optimal assignment, of samples to as many of the target, per key."""
    keys = jax.random.split(jax.random.key(5), KEYS * PER_KEY)
    x = processes.prior_sample(keys, PROCESS, (KEYS * PER_KEY, *shape))
    x, compiling, seconds = _run(case, field, len(ts) - 1, programs, keys, x, ts)
    parts, wanted = x.reshape(KEYS, PER_KEY, *shape), reference().reshape(KEYS, PER_KEY, *shape)
    row = _with_error("energy", [float(_energy(a, b)) for a, b in zip(parts, wanted)])
    if w2:
        row |= _with_error("w2", [_assignment(a[:ASSIGNED], b[:ASSIGNED]) for a, b in zip(parts, wanted)])
    return row | {"compile_seconds": compiling, "seconds": seconds}


_energy = jax.jit(metrics.energy_distance)


def _assignment(x, y):
    costs = cdist(np.asarray(x), np.asarray(y), "sqeuclidean")
    return math.sqrt(costs[linear_sum_assignment(costs)].mean())


def _with_error(name, values):
    return {name: float(np.mean(values)), f"{name}_error": float(np.std(values, ddof=1) / math.sqrt(len(values)))}


def _moments(case, field, shape, ts, programs):
    """Wasserstein-2 and KL of the samples' exact law, N(b, diag(a^2 + sum_k c_k^2)), to the target's.

    The target's coordinates are independent, so a solver maps them one by one: x_end = a x + b + sum_k c_k z_k. Its
    derivatives by the start and by the noises of all steps are a and c.
    """
    steps = len(ts) - 1
    if steps not in programs:

        def end(x, z, ts):
            noise = lambda keys, x, t, s: z[jnp.argmin(jnp.abs(ts[:-1] - t[0]))][None]
            return solvers.integrate(None, case.make(PROCESS, field, steps, noise), x, ts)[0]

        def law(ts):
            x, z = jnp.zeros((1, *shape)), jnp.zeros((steps, *shape))
            mean, back = jax.vjp(lambda x, z: end(x, z, ts), x, z)
            a, c = back(jnp.ones_like(mean))
            return mean[0], a[0] ** 2 + jnp.sum(c**2, axis=0)

        start = time.perf_counter()
        programs[steps] = jax.jit(law).lower(ts).compile(), time.perf_counter() - start
    program, compiling = programs[steps]
    start = time.perf_counter()
    mean, variance = jax.block_until_ready(program(ts))
    seconds = time.perf_counter() - start
    alpha, sigma = (float(c) for c in PROCESS.marginal(ts[-1]))
    want_mean, want = alpha * _digits_moments()[0], (alpha * _digits_moments()[1]) ** 2 + sigma**2
    with jax.enable_x64(True):  # what is left of a good sampler is a difference of large numbers
        laws = [jnp.asarray(a, float) for a in (mean, np.diag(np.asarray(variance)), want_mean, np.diag(want))]
        w2, kl = math.sqrt(metrics.gaussian_w2(*laws)), float(metrics.gaussian_kl(*laws))
    return {"w2": w2, "kl": kl, "compile_seconds": compiling, "seconds": seconds}


def wrong(denoise, size=0.1):
    """Return the field with an error of RMS `size` in v: x_0 + size sigma sqrt(2) sin(5 W x + phase)."""

    def field(x, t):
        width = x.shape[-1]
        rng = np.random.default_rng(0)
        mix = jnp.asarray(np.linalg.qr(rng.normal(size=(width, width)))[0], x.dtype)
        phase = jnp.asarray(rng.uniform(0, 2 * np.pi, width), x.dtype)
        _, sigma = PROCESS.marginal(t)
        return denoise(x, t) + size * math.sqrt(2) * sigma[:, None] * jnp.sin(5 * x @ mix + phase[None])

    return field


@functools.cache
def _digits():
    """Return the training digits in [-1, 1], (1350, 64)."""
    images = data.load("digits", "train").arrays()["image"].reshape(-1, 64)
    return images / 8.0 - 1


@functools.cache
def _digits_moments():
    x = _digits()
    values, vectors = np.linalg.eigh(np.cov(x, rowvar=False))
    # In the basis of the principal components, in which the process is the same.
    return vectors.T @ x.mean(axis=0), np.sqrt(np.maximum(values, 1e-4))


def gaussian():
    """Return the Gaussian of the digits' moments, its draws and its shape."""
    mean, std = (jnp.asarray(a, jnp.float32) for a in _digits_moments())
    return analytic.gaussian(PROCESS, mean, std), None, (64,)


def _mixture(weights, means, stds):
    exact = analytic.gaussian_mixture(PROCESS, weights, means, stds)
    shape = means.shape[1:]

    @functools.cache
    def draw():
        """Independent samples of the target at t_min."""
        x0 = exact.sample(jax.random.key(99), KEYS * PER_KEY)
        eps = jax.random.normal(jax.random.key(98), x0.shape)
        return processes.perturb(PROCESS, x0, eps, PROCESS.t_min)

    return exact, draw, shape


def checkerboard():
    """Return 8 squares of a 4x4 board in [-2, 2]^2, nine Gaussians each."""
    offsets = (np.arange(3) - 1) / 3
    centers = [
        (i - 1.5 + dx, j - 1.5 + dy)
        for i in range(4)
        for j in range(4)
        if (i + j) % 2
        for dx in offsets
        for dy in offsets
    ]
    means = jnp.asarray(np.array(centers) / 1.2, jnp.float32)
    return _mixture(jnp.ones(len(means)), means, 0.12)


def mixture():
    """Return 50 spherical Gaussians fitted to the digits."""
    from sklearn.mixture import GaussianMixture

    fit = GaussianMixture(50, covariance_type="spherical", random_state=0, reg_covar=1e-3).fit(_digits())
    weights, means, stds = fit.weights_, fit.means_, np.sqrt(fit.covariances_)
    return _mixture(*(jnp.asarray(a, jnp.float32) for a in (weights, means, stds)))


TARGETS = {"gaussian": gaussian, "checkerboard": checkerboard, "mixture": mixture}


def _mnist(options):
    """Yield the rows of a trained network: samples from the same keys, and a picture of them side by side.

    All end where sigma/alpha is half of one of 256 levels, and take one x_0 prediction there, which is not counted.
    """
    config, process, field, trained, source = common.trained_model(options.workdir)
    transform, shape = trained.model.transform, source.shape
    features, accuracy = mnist_features.train()
    print(f"classifier of the features: {accuracy:.4f} of the test images right", flush=True)
    count = KEYS * options.images
    real = data.load("mnist", "test").arrays()["image"]
    real = np.asarray(features(real[:5000]))
    keys = jax.random.split(jax.random.key(6), count)
    denoise = lambda params: samplers.denoiser(config, field(params))
    t_min = float(processes.time_at(process, jnp.asarray(2 * math.log(256))))
    shown = {}
    for solver in options.solvers or ON_MNIST:
        case, grid = CASES[solver], ON_MNIST.get(solver, "uniform_log_snr")
        for budget in options.budgets:
            steps = budget // case.cost
            if steps < 1 or (budget > 100 and solver != "ancestral"):
                continue
            ts = GRIDS[grid](process, steps, t_min=t_min)

            def draw(params, keys, ts, case=case, steps=steps):
                x = processes.prior_sample(keys, process, (*keys.shape, *shape))
                made = case.make(process, denoise(params), steps, solvers.white)
                own = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)
                x, _ = solvers.integrate(own, made, x, ts)
                return denoise(params)(x, jnp.full(len(x), ts[-1]))

            start = time.perf_counter()
            program = jax.jit(draw, compiler_options=compiler_options()).lower(trained.params, keys, ts).compile()
            compiling = time.perf_counter() - start
            start = time.perf_counter()
            images = np.asarray(transform.inverse(jax.block_until_ready(program(trained.params, keys, ts))))
            seconds = time.perf_counter() - start
            shown[solver, budget] = images[:16]
            found = np.asarray(features(images)).reshape(KEYS, options.images, -1)
            row = {"target": "mnist", "field": "trained", "solver": solver, "grid": grid, "evaluations": budget}
            row |= {"steps": steps} | _with_error("energy", [float(_energy(part, real)) for part in found])
            row["frechet"] = float(metrics.frechet_distance(found.reshape(count, -1), real))
            yield row | {"compile_seconds": compiling, "seconds": seconds}
    rows = [(solver, budget) for solver, budgets in SIDE_BY_SIDE.items() for budget in budgets]
    some = {key: shown[key] for key in rows if key in shown}
    figure, axes = plt.subplots(len(some), 1, figsize=(10, 0.75 * len(some)), layout="constrained", squeeze=False)
    for axis, ((solver, budget), images) in zip(axes[:, 0], some.items()):
        axis.imshow(np.concatenate(list(images[..., 0]), axis=1), cmap="gray_r", vmin=0, vmax=transform.levels - 1)
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(f"{solver}, {budget}", rotation=0, ha="right", va="center")
    figure.savefig(pathlib.Path(options.out) / "pareto_mnist_samples.png", dpi=110)


def markdown(rows):
    """Return tables of the quality of every solver at its best grid, one a field: budgets across."""
    measure = "w2" if "kl" in rows[0] else "energy"
    lines = []
    for field in dict.fromkeys(row["field"] for row in rows):
        some = [row for row in rows if row["field"] == field]
        budgets = sorted({row["evaluations"] for row in some})
        lines += [f"{rows[0]['target']}, {field} field: {measure}, at the best grid", ""]
        lines += ["| solver | " + " | ".join(map(str, budgets)) + " |", "| --- |" + " --- |" * len(budgets)]
        for solver in dict.fromkeys(row["solver"] for row in some):
            cells = []
            for budget in budgets:
                here = [row for row in some if row["solver"] == solver and row["evaluations"] == budget]
                best = min(here, key=lambda row: row[measure], default=None)
                error = f" +- {best[measure + '_error']:.1g}" if best and measure + "_error" in best else ""
                cells.append(f"{best[measure]:.2g}{error} ({_SHORT[best['grid']]})" if best else "")
            lines.append(f"| {solver} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines) + answers(rows)


def answers(rows):
    """Return what the rows say to three questions, as Markdown; at the best grids, differences against their errors."""
    measure, target = "w2" if "kl" in rows[0] else "energy", rows[0]["target"]
    best = {}
    for row in rows:
        key = row["field"], row["solver"], row["evaluations"]
        if key not in best or row[measure] < best[key][measure]:
            best[key] = row
    value = lambda row: (
        f"{row[measure]:.2g}" + (f" +- {row[f'{measure}_error']:.1g}" if f"{measure}_error" in row else "")
    )
    lines = []
    for field in dict.fromkeys(row["field"] for row in rows):
        budgets = sorted({row["evaluations"] for row in rows if row["field"] == field})
        reference = best.get((field, "ancestral", 1000)) or best.get((field, "ancestral", max(budgets)))
        for budget in (20, 50, 100):
            if reference and (row := best.get((field, "ddim", budget))):
                faster = f", {_seconds(rows, reference) / _seconds(rows, row):.0f} times the wall time"
                lines.append(
                    f"* {target}, {field}: DDIM at {budget} {value(row)}, ancestral at {reference['evaluations']} "
                    f"{value(reference)}{faster if 'kl' not in row else ''}"  # those of a law are not of sampling
                )
        for kind, names in {"second-order": ("dpmpp_2m", "unipc-2", "edm"), "stochastic": NOISY}.items():
            found = []
            for budget in budgets:
                others = [best[field, name, budget] for name in names if (field, name, budget) in best]
                against = "ddim" if kind == "second-order" else "dpmpp_2m"
                base = best.get((field, against, budget))
                if others and base:
                    other = min(others, key=lambda row: row[measure])
                    spread = math.hypot(*(row.get(f"{measure}_error", 0.0) for row in (other, base)))
                    verdict = "no difference"
                    if abs(base[measure] - other[measure]) > 2 * spread:
                        verdict = "better" if other[measure] < base[measure] else "worse"
                    found.append(f"{budget}: {verdict} ({other['solver']})")
            lines.append(f"* {target}, {field}: best {kind} solver against {against}: " + "; ".join(found))
    return "\n".join(lines) + "\n"


def _seconds(rows, like):
    """The program of a solver and a number of steps is one, whatever the grid."""
    key = lambda row: (row["field"], row["solver"], row["evaluations"])
    return min(row["seconds"] for row in rows if key(row) == key(like))


_SHORT = {"linear": "t", "quadratic": "q", "uniform_log_snr": "l", "karras": "k", SEARCHED: "s"}


def picture(file, rows):
    """Draw quality against evaluations: deterministic solvers, stochastic ones, and the grids of two solvers."""
    measure = "w2" if "kl" in rows[0] else "energy"
    figure, axes = plt.subplots(1, 3, figsize=(16, 5), layout="constrained", sharex=True, sharey=True)
    first = [row for row in rows if row["field"] in ("exact", "trained")]
    for axis, noisy in zip(axes, (False, True)):
        for solver in dict.fromkeys(row["solver"] for row in first if CASES[row["solver"]].noisy == noisy):
            best = {}
            for row in first:
                if row["solver"] == solver:
                    key = row["evaluations"]
                    best[key] = min(best.get(key, math.inf), row[measure])
            axis.plot(list(best), list(best.values()), ".-", label=solver)
        axis.set(title=("stochastic" if noisy else "deterministic") + ", best grid")
    styles = {"ddim": "-", "dpmpp_2m": "--", "ancestral": ":"}
    for solver, style in styles.items():
        for n, grid in enumerate(dict.fromkeys(row["grid"] for row in first)):
            some = [row for row in first if row["solver"] == solver and row["grid"] == grid]
            axes[2].plot([r["evaluations"] for r in some], [r[measure] for r in some], style, color=f"C{n}")
            if solver == "ddim":
                axes[2].plot([], [], color=f"C{n}", label=grid)
    for solver, style in styles.items():
        axes[2].plot([], [], "k" + style, label=solver)
    axes[2].set(title="grids")
    low = min(row[measure] for row in first)
    for axis in axes:
        axis.set(xscale="log", xlabel="model evaluations")
        # Energy distances scatter around zero where there is nothing left to see.
        axis.set_yscale("log") if low > 0 else axis.set_yscale("symlog", linthresh=1e-3)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, ncols=2)
    axes[0].set_ylabel({"w2": "Wasserstein-2 distance", "energy": "squared energy distance"}[measure])
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
