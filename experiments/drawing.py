"""What batches of samples are drawn with: a trained model, its solver, labels and guides, as one function of keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import build, flows, guides, model, samplers, search_grid, song2021
from experiments.artefacts import Run
from jdiff import Process, data, parallel, solvers
from jdiff import sample as draw_samples
from jdiff.processes import prior_sample

# Samples, and times of their way from noise, whose states are kept to be looked at.
STRIP_SAMPLES, STRIP_TIMES = 8, 10


class Drawing(NamedTuple):
    """All that batches of samples are drawn with."""

    process: Process
    trained: model.Trained
    """Placed where the samples are drawn."""
    draw: Callable
    """(params, statistics, keys, labels, helpers) -> (samples in model space, states at a few times or None, these)."""
    labels: Callable | None
    """index -> labels, or None."""
    spread: Callable
    """index (batch,) -> the same, spread over the devices."""
    size: int
    """Of a batch."""
    helpers: dict[str, guides.Guide]
    """Models that guide this one, placed likewise."""
    depends: list
    """What the samples depend on besides their number, as JSON."""

    def noise(self, n: int, key: jax.Array) -> jax.Array:
        """Return what the solver starts from in batch n (see `jdiff.sample`)."""
        starts = jax.vmap(lambda k: jax.random.fold_in(k, 0))(self.keys(n, key))
        return prior_sample(starts, self.process, (self.size, *self.trained.model.shape))

    def batch(self, n: int, key: jax.Array) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
        """Return `draw` of batch n: image i has the key fold_in(key, i)."""
        return self.draw(self.trained.params, self.trained.statistics, self.keys(n, key), self.cond(n), self.helpers)

    def cond(self, n: int) -> jax.Array | None:
        """Return the labels of batch n."""
        return None if self.labels is None else self.labels(self.index(n))

    def index(self, n: int) -> jax.Array:
        """Return the numbers of the images in batch n."""
        return self.spread(np.arange(n * self.size, (n + 1) * self.size, dtype=np.int32))

    def keys(self, n: int, key: jax.Array) -> jax.Array:
        """Return the keys of batch n."""
        return jax.vmap(lambda i: jax.random.fold_in(key, i))(self.index(n))


def load(config: ConfigDict, run: Run) -> Drawing:
    """Return the sampler of a trained model, in batches of config.sampling.batch_size at most (rounded up to devices).

    Raises:
      FileNotFoundError: nothing has been trained here.
      ValueError: a folder of another configuration, a label that the data do not have, no searched grid, a guide that
        does not fit.
    """
    c = config.sampling
    source = data.load(config.data.name, config.data.train)
    trained, helpers = model.load(config, run, source), guides.load(config, run, source)
    described = trained.model
    labels = labels_of(config, described)
    mesh = parallel.data_mesh(jax.local_devices())
    size = min(c.batch_size, c.number)
    digest = model.digest(trained._replace(statistics={**trained.statistics, **helpers}))
    spread, ts = jnp.asarray, None
    if mesh.size > 1 and config.protocol == "jdiff":
        size = -(-size // mesh.size) * mesh.size
        trained = trained._replace(
            params=parallel.replicate(trained.params, mesh), statistics=parallel.replicate(trained.statistics, mesh)
        )
        helpers = parallel.replicate(helpers, mesh)
        spread = lambda index: parallel.shard_batch(index, mesh)
    if config.protocol == "song2021":
        draw = _song2021(config, described)
    elif config.network.name == "coupling":
        draw = _coupling(described)
    elif c.solver in samplers.ADAPTIVE:
        draw = _adaptive(config, described)
    else:
        ts = search_grid.read(config, run, trained.step) if c.grid == samplers.SEARCHED else samplers.grid(config)
        draw = _draw(config, described, ts)
    settings = {k: v for k, v in c.to_dict().items() if k != "number"}
    depends = [config.protocol, settings, size, digest, None if ts is None else np.asarray(ts).tolist()]
    return Drawing(build.process(config), trained, draw, labels, spread, size, helpers, depends)


def _draw(config, described, ts):
    """Return (params, statistics, keys, cond, helpers) -> (samples, their states at a few times, these times).

    Raises:
      FloatingPointError: from the function returned: a step or the last denoising gave values that are not finite.
    """
    c = config.sampling

    @jax.jit
    def draw(params, statistics, keys, cond, helpers=None):
        field = samplers.guided(config, described.module, params, statistics, cond, helpers)
        denoise = samplers.denoiser(config, field) if c.denoise else None
        x, path = draw_samples(
            keys,
            build.process(config),
            samplers.solver(config, field, _noise(config, keys)),
            (*keys.shape, *described.shape),
            ts,
            denoise=denoise,
            path=True,
        )
        strip = jnp.linspace(0, len(ts) - 1, STRIP_TIMES).astype(int)
        finite = jnp.all(jnp.isfinite(path), axis=range(1, path.ndim))
        return x, path[strip, :STRIP_SAMPLES], ts[strip], finite

    def checked(*args):
        x, path, times, finite = draw(*args)
        finite = np.asarray(finite)
        if not finite.all():
            n = int(np.argmin(finite))
            where = f"step {n} of {len(ts) - 1} (t = {float(ts[n - 1]):g} to {float(ts[n]):g})" if n else "the start"
            raise FloatingPointError(f"{c.solver} gave values that are not finite, first in {where}")
        if not bool(jnp.isfinite(x).all()):
            raise FloatingPointError(f"the last denoising after {c.solver} gave values that are not finite")
        return x, path, times

    return checked


def _adaptive(config, described):
    """Return (params, statistics, keys, cond, helpers) -> (samples, None, None) by a solver that chooses its own steps.

    Raises:
      FloatingPointError: from the function returned: a solve that did not arrive.
    """
    c, forward_process = config.sampling, build.process(config)
    grid = samplers.grid(config, "linear")
    ends = grid[0], grid[-1]

    @jax.jit
    def draw(params, statistics, keys, cond, helpers=None):
        field = samplers.guided(config, described.module, params, statistics, cond, helpers)
        start, own = (jax.vmap(lambda key, n=n: jax.random.fold_in(key, n))(keys) for n in (0, 1))
        x = prior_sample(start, forward_process, (*keys.shape, *described.shape))
        # White noise, drawn anew for rejected tries, would bias the SDE's samples.
        solution = samplers.adaptive(config, field, own, x, ends, _noise(config, keys, "brownian"))
        x = solution.x
        if c.denoise:
            x = samplers.denoiser(config, field)(x, jnp.full(len(x), ends[1]))
        return x, solution.evaluations, solution.failed

    def checked(*args):
        x, evaluations, failed = draw(*args)
        evaluations = np.asarray(evaluations)
        if bool(failed.any()):
            raise FloatingPointError(f"{c.solver} did not arrive for {int(failed.sum())} of {len(x)} samples")
        if not bool(jnp.isfinite(x).all()):
            raise FloatingPointError(f"the last denoising after {c.solver} gave values that are not finite")
        print(f"{c.solver}: {evaluations.mean():.0f} evaluations on average, {evaluations.max()} at most")
        return x, None, None

    return checked


def _coupling(described):
    """Return (params, statistics, keys, cond, helpers) -> (samples of a coupling flow, None, None).

    Raises:
      FloatingPointError: from the function returned: values that are not finite.
    """

    @jax.jit
    def draw(params, statistics, keys):
        return flows.coupling_samples(described.module, params, statistics, keys, described.shape)

    def checked(params, statistics, keys, cond, helpers):
        x = draw(params, statistics, keys)
        if not bool(jnp.isfinite(x).all()):
            raise FloatingPointError("the coupling flow's inverse gave values that are not finite")
        return x, None, None

    return checked


def _noise(config, keys, kind=None):
    """Return where the solver's noise comes from."""
    if (kind or config.sampling.noise) == "white":
        return solvers.white
    own = jax.vmap(lambda key: jax.random.fold_in(key, 2))(keys)
    return solvers.brownian(own, build.process(config), t_min=config.sampling.t_min or None)


def _song2021(config, described):
    """Return (params, statistics, keys, cond, helpers) -> (samples as `song2021` draws them, None, None).

    Raises:
      ValueError: the ODE sampler of a model of numbered scales.
    """
    c, forward_process = config.sampling, build.process(config)
    t_min = c.t_min or forward_process.t_min
    discrete = config.loss.scales if config.loss.name == "ddpm" and c.predictor != "ode" else None
    if config.loss.name == "smld" and c.predictor == "ode":
        raise ValueError('sampling.predictor = "ode" needs a model of continuous times, not loss.name = "smld"')

    def score(x, t, params, statistics, cond, helpers):
        field = samplers.guided(config, described.module, params, statistics, cond, helpers)
        return song2021.score_fn(forward_process, field, config.network.predict, scales=discrete)(x, t)

    start = lambda keys: prior_sample(keys, forward_process, (*keys.shape, *described.shape))

    @jax.jit
    def predictor_corrector(params, statistics, keys, cond, helpers=None):
        return song2021.pc_sampler(
            forward_process,
            lambda x, t: score(x, t, params, statistics, cond, helpers),
            start(keys),
            jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys),
            scales=c.steps,
            predictor=c.predictor,
            corrector=c.corrector,
            snr=c.snr,
            corrector_steps=c.corrector_steps,
            t_min=t_min,
            denoise=c.denoise,
        )

    def ode(params, statistics, keys, cond, helpers=None):
        options = {"t_min": t_min, "denoise": c.denoise, "scales": c.steps}
        weights = params, statistics, cond, helpers
        return song2021.ode_sampler(forward_process, score, start(keys), *weights, **options)[0]

    draw = ode if c.predictor == "ode" else predictor_corrector
    return lambda *args: (draw(*args), None, None)


def labels_of(config, described):
    """Return index -> labels of the images with these numbers, or None for unconditional samples.

    Raises:
      ValueError: a label that the model does not have.
    """
    label = config.sampling.label
    if label == "null":
        return None
    if not (config.network.conditional or config.sampling.classifier_workdir):
        raise ValueError(f"sampling.label = {label!r}, but the model has no labels: it is unconditional")
    if label == "cycle":
        return lambda index: (index % described.classes).astype(jnp.int32)
    if not label.isdecimal() or int(label) >= described.classes:
        known = f"null, cycle, or 0 to {described.classes - 1}"
        raise ValueError(f"sampling.label = {label!r} is unknown; it may be {known}")
    return lambda index: jnp.full(index.shape, int(label), jnp.int32)
