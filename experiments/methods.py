"""The kinds of numbers that an image and a draw have: the exact likelihood, that of Song et al. 2021, and bounds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import build, flows, song2021
from experiments.compilation import compiler_options
from jdiff import bounds, dequantisation, log_likelihood, times

__all__ = ["Method", "bound", "exact", "published", "start"]


class Method(NamedTuple):
    """A kind of number that an image and a draw have."""

    name: str
    settings: dict
    """What it depends on besides what all kinds depend on."""
    evaluator: Callable
    """(config, model, image shape) -> jitted (params, statistics, batch, *numbers) -> records as arrays."""
    numbers: tuple[float, ...] = ()
    discrete: bool = False
    """Of levels as they are, without dequantisation."""
    joint: bool = False
    """The images of a batch are solved as one system on the host: batches are part of the number."""


def exact(config, rtol, atol):
    """Return the likelihood by the ODE to a tolerance, or in closed form for a coupling flow."""
    c = config.likelihood
    settings = {k: c[k] for k in ("importance_samples", "divergence", "probes", "variable")} | {
        "rtol": rtol,
        "atol": atol,
    }
    return Method("bits/dim", settings, _exact_evaluator, (rtol, atol))


def _exact_evaluator(config, described, shape):
    c = config.likelihood
    forward_process, t_min = build.process(config), start(config, described.transform)

    def solve(params, statistics, probe, x, rtol, atol):
        if config.network.name == "coupling":
            return flows.coupling_likelihood(described.module, params, statistics, x)
        return log_likelihood(
            None if c.divergence == "exact" else probe,
            forward_process,
            build.field(config, described.module, params, statistics),
            x,
            predict=config.network.predict,
            divergence=c.divergence,
            probes=c.probes,
            variable=c.variable,
            rtol=rtol,
            atol=atol,
            t_min=t_min,
        )

    @functools.partial(jax.jit, compiler_options=compiler_options(config.network.name))
    def evaluate(params, statistics, batch, rtol, atol):
        # Dequantisations that are weighted against each other have their probes in common.
        probe = _keys(config.seed, batch["draw"] // c.importance_samples, batch["index"], 1)
        draw = _dequantised(config, described, batch, t_min)
        with jax.default_matmul_precision(c.matmul_precision):
            result = solve(params, statistics, probe, draw.x, rtol, atol)
        return {
            "bits_per_dim": dequantisation.level_bits(result.log_prob - draw.log_q, shape),
            "probe_error": -dequantisation.level_bits(result.probe_error, shape),
            "evaluations": result.evaluations,
            "failed": result.failed,
        }

    return evaluate


def published(config, rtol, atol):
    """Return the likelihood of Song et al. 2021, see `experiments.song2021.bits_per_dim`.

    Raises:
      ValueError: options that their protocol does not have.
    """
    c = config.likelihood
    theirs = {"dequantisation": "uniform", "importance_samples": 1, "divergence": "rademacher", "probes": 1}
    theirs |= {"variable": "t", "t_min": 0.0}
    for name, value in theirs.items():
        if c[name] != value:
            raise ValueError(f"protocol song2021 has likelihood.{name} = {value!r}, got {c[name]!r}")
    if config.loss.name == "smld":
        raise ValueError(
            'protocol song2021 has no likelihood of loss.name = "smld": it is of networks of continuous times, and '
            "this one sees numbers of scales"
        )
    # The hardware's default precision and the images that share a batch were part of their numbers.
    settings = {k: theirs[k] for k in ("importance_samples", "divergence", "probes", "variable")}
    settings |= {"matmul_precision": "default", "batch_size": c.batch_size, "images": c.images}
    settings |= {"rtol": rtol, "atol": atol}
    return Method("song2021", settings, _published_evaluator, (rtol, atol), joint=True)


def _published_evaluator(config, described, shape):
    forward_process = build.process(config)

    def score(x, t, params, statistics):
        field = build.field(config, described.module, params, statistics)
        return song2021.score_fn(forward_process, field, config.network.predict)(x, t)

    def evaluate(params, statistics, batch, rtol, atol):
        key = _keys(config.seed, batch["draw"][:1], batch["index"][:1], 0)[0]
        with jax.default_matmul_precision("default"):
            found = song2021.bits_per_dim(
                key,
                forward_process,
                score,
                batch["image"],
                params,
                statistics,
                transform=described.transform,
                probe="rademacher",
                rtol=rtol,
                atol=atol,
            )
        bits = np.asarray(found["bits_per_dim"])
        return {
            "bits_per_dim": bits,
            "probe_error": np.full(bits.shape, np.nan),
            "evaluations": np.broadcast_to(found["evaluations"], bits.shape),
            "failed": ~np.isfinite(bits),
        }

    return evaluate


def bound(config, name):
    """Return the method of a bound by its name, see config.likelihood.bounds.

    Raises:
      ValueError: an unknown name.
    """
    kind, _, steps = name.partition("_")
    known = name in ("continuous", "levels") or (kind == "steps" and steps.isdecimal() and int(steps) > 0)
    if not known:
        raise ValueError(f"likelihood.bounds has {name!r}; it may have continuous, levels, and steps_T for any T")
    draws = config.likelihood.bound_draws
    if config.loss.name == "maximum_likelihood":
        raise ValueError("bounds are of diffusion models: a flow of maximum likelihood denoises nothing")
    evaluator = functools.partial(_bound_evaluator, kind=kind, steps=int(steps or 0), draws=draws)
    return Method(name, {"bound": name, "bound_draws": draws}, evaluator, discrete=kind != "continuous")


def _bound_evaluator(config, described, shape, *, kind, steps, draws):
    c = config.likelihood
    forward_process, t_min = build.process(config), start(config, described.transform, discrete=kind != "continuous")
    evaluations = draws + max(2, draws // 8) if kind == "continuous" else draws
    ts = None
    if kind == "steps":
        end = float(bounds.end_time(forward_process))
        ts = times.uniform_log_snr(forward_process, steps, t_min=t_min, t_max=end)
        evaluations = draws = min(draws, steps)

    @functools.partial(jax.jit, compiler_options=compiler_options(config.network.name))
    def evaluate(params, statistics, batch):
        keys = _keys(config.seed, batch["draw"], batch["index"], 2)
        field = build.field(config, described.module, params, statistics)
        with jax.default_matmul_precision(c.matmul_precision):
            if kind == "continuous":  # of the same dequantisation as the ODE's
                draw = _dequantised(config, described, batch, t_min)
                bound = bounds.density_bound(
                    keys, forward_process, field, draw.x, predict=config.network.predict, draws=draws, t_min=t_min
                )
                value = bound.value - draw.log_q
            else:
                bound = bounds.level_bound(
                    keys,
                    forward_process,
                    field,
                    batch["image"],
                    described.transform,
                    predict=config.network.predict,
                    draws=draws,
                    ts=ts,
                    t_min=t_min if ts is None else None,
                )
                value = bound.value
        return {
            "bits_per_dim": dequantisation.level_bits(value, shape),
            "probe_error": -dequantisation.level_bits(bound.error, shape),
            "evaluations": jnp.full(value.shape, evaluations),
            "failed": ~jnp.isfinite(value),
        }

    return evaluate


def start(config, transform, *, discrete=False):
    """Return where the model ends: likelihood.t_min, else the process's own, else where noise fits into the cells."""
    c, forward_process = config.likelihood, build.process(config)
    if c.t_min or (c.dequantisation == "uniform" and not discrete):
        return c.t_min or forward_process.t_min
    return float(dequantisation.start_time(forward_process, transform))


def _dequantised(config, described, batch, t_min):
    """Return the dequantised images and the log-density of that draw; draw d of image i is the same for all methods."""
    noise = _keys(config.seed, batch["draw"], batch["index"], 0)
    if config.likelihood.dequantisation == "uniform":
        return dequantisation.uniform(noise, described.transform, batch["image"])
    return dequantisation.truncated_normal(noise, described.transform, batch["image"], build.process(config), t_min)


def _keys(seed, draw, index, use):
    """Return the keys of draws of images: folded from the seed, the draw, the image and what they are used for."""
    key = jax.random.key(seed)
    fold = lambda d, i: jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, d), i), use)
    return jax.vmap(fold)(draw, index)
