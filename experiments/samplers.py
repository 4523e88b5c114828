"""From a configuration to what draws samples: solvers, grids, guidance."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

import jdiff
from experiments import song2021
from experiments.build import field, pick, process
from jdiff import guidance, solvers, times
from jdiff.saturation import rescale, threshold

GRIDS = {
    "linear": times.linear,
    "quadratic": times.quadratic,
    "karras": times.karras,
    "polyexponential": times.polyexponential,
    "shifted": times.shifted,
    "subsequence": times.subsequence,
    "uniform_log_snr": times.uniform_log_snr,
}


def _flow(process, field, predict, c):
    return jdiff.probability_flow(process, field, predict=predict)


def _reverse(process, field, predict, c):
    return jdiff.reverse(process, field, predict=predict, eta=c.eta)


def _as(kind):
    return lambda process, field, predict: jdiff.reparameterise(process, field, predict, kind)


_x0, _score = _as("x0"), _as("score")


def _predictor_corrector(process, field, predict, c, noise):
    largest = lambda s: process.marginal(s)[1] ** 2
    score = _score(process, field, predict)
    corrector = solvers.langevin(score, snr=c.snr, steps=c.corrector_steps, largest=largest)
    predictor = solvers.euler_maruyama(_reverse(process, field, predict, c), noise=noise)
    # A corrector's step has no length in time, along which a Brownian path could move: its noise is white.
    return solvers.predictor_corrector(predictor, corrector)


# (process, field, its kind, config.sampling, noise) -> Solver
SOLVERS = {
    "euler": lambda p, f, k, c, z: solvers.euler(_flow(p, f, k, c)),
    "midpoint": lambda p, f, k, c, z: solvers.midpoint(_flow(p, f, k, c)),
    "heun": lambda p, f, k, c, z: solvers.heun(_flow(p, f, k, c)),
    "rk4": lambda p, f, k, c, z: solvers.rk4(_flow(p, f, k, c)),
    "edm": lambda p, f, k, c, z: solvers.edm(
        p, _x0(p, f, k), churn=min(c.churn / c.steps, math.sqrt(2) - 1), s_noise=c.churn_noise, noise=z
    ),
    "euler_maruyama": lambda p, f, k, c, z: solvers.euler_maruyama(_reverse(p, f, k, c), noise=z),
    "stochastic_heun": lambda p, f, k, c, z: solvers.stochastic_heun(_reverse(p, f, k, c), noise=z),
    "ancestral": lambda p, f, k, c, z: solvers.ancestral(p, _x0(p, f, k), variance=c.variance, noise=z),
    "ddim": lambda p, f, k, c, z: solvers.ddim(p, _x0(p, f, k), c.eta, noise=z),
    "dpm_solver": lambda p, f, k, c, z: solvers.dpm_solver(p, _x0(p, f, k), c.order or 2),
    "dpmpp_2s": lambda p, f, k, c, z: solvers.dpmpp_2s(p, _x0(p, f, k)),
    "dpmpp_2m": lambda p, f, k, c, z: solvers.dpmpp_2m(p, _x0(p, f, k)),
    "dpmpp_3m": lambda p, f, k, c, z: solvers.dpmpp_3m(p, _x0(p, f, k)),
    "dpmpp_2m_sde": lambda p, f, k, c, z: solvers.dpmpp_2m(p, _x0(p, f, k), c.eta, noise=z),
    "dpmpp_3m_sde": lambda p, f, k, c, z: solvers.dpmpp_3m(p, _x0(p, f, k), c.eta, noise=z),
    "exponential_adams": lambda p, f, k, c, z: solvers.exponential_adams(p, _x0(p, f, k), c.order or 3),
    "deis": lambda p, f, k, c, z: solvers.deis(p, _x0(p, f, k), c.order or 3),
    "unipc": lambda p, f, k, c, z: solvers.unipc(p, _x0(p, f, k), c.order or 2, last_corrector=c.last_corrector),
    "predictor_corrector": _predictor_corrector,
}


def _tolerances(c):
    return {name: c[name] for name in ("rtol", "atol") if c[name]}


# (process, field, its kind, config.sampling, keys, x, t0, t1, noise) -> Solution; they choose their steps themselves.
ADAPTIVE = {
    "adaptive": lambda p, f, k, c, keys, x, t0, t1, z: solvers.integrate_adaptive(
        _flow(p, f, k, c), x, t0, t1, **_tolerances(c)
    ),
    "adaptive_sde": lambda p, f, k, c, keys, x, t0, t1, z: solvers.integrate_adaptive_sde(
        keys, _reverse(p, f, k, c), x, t0, t1, noise=z, **_tolerances(c)
    ),
}
# A grid that experiments.search_grid has found and left in the run folder.
SEARCHED = "searched"


def guided(config: ConfigDict, module, params, statistics: dict, cond, guides: dict | None = None) -> jdiff.Field:
    """Return the field that samples are drawn with, guided as config.sampling says.

    Classifier-free first, then away from the weaker model, then to the classifier's label, then thresholded. Outside of
    guidance_low to guidance_high the scales are those without guidance: 1 (of guidance = 0, which is unconditional at
    all times, 0), 1 and 0.

    Args:
      config: the configuration.
      module: from `build.network`.
      params: its parameters.
      statistics: of the data.
      cond: labels (batch,) or None, which is not guided by labels.
      guides: from `experiments.guides.load`; without it only classifier-free guidance and thresholding are done.

    Raises:
      ValueError: a negative class that the model does not have.
    """
    c, forward_process, predict = config.sampling, process(config), config.network.predict
    guides = guides or {}
    high = c.guidance_high or forward_process.t_max
    everywhere = c.guidance_low <= 0 and high >= forward_process.t_max
    scheduled = lambda scale, outside: (
        scale if everywhere else guidance.interval(scale, c.guidance_low, high, outside=outside)
    )
    options = {"adjust": rescale(forward_process, c.guidance_rescale, predict=predict)} if c.guidance_rescale else {}

    label = cond if config.network.conditional else None
    made = field(config, module, params, statistics, cond=label)
    if label is not None and c.guidance != 1:
        if c.negative and int(c.negative) >= module.num_classes:
            raise ValueError(f"sampling.negative must be below {module.num_classes}, got {c.negative}")
        null = jnp.full_like(label, int(c.negative) if c.negative else module.num_classes)
        conditional = lambda x, t, cond: field(config, module, params, statistics, cond=cond)(x, t)
        if c.guidance == 0 and not options:  # what it comes to, at half the price
            made = lambda x, t: conditional(x, t, null)
        else:
            scale = scheduled(c.guidance, 0.0 if c.guidance == 0 else 1.0)
            made = guidance.classifier_free(conditional, label, null, scale, **options)
    if "weak" in guides:
        made = guidance.autoguidance(made, guides["weak"](label), scheduled(c.autoguidance, 1.0), **options)
    if "classifier" in guides and cond is not None:
        options |= {"process": forward_process, "predict": predict}
        made = guidance.classifier(made, guides["classifier"](cond), scheduled(c.classifier_scale, 0.0), **options)
    if c.threshold:
        low = -1.0 if config.data.centered else 0.0
        made = threshold(forward_process, made, predict=predict, quantile=c.threshold, low=low, high=1.0)
    return made


def grid(config: ConfigDict, name: str | None = None) -> jax.Array:
    """Return the decreasing sampling times.

    Args:
      config: the configuration.
      name: instead of config.sampling.grid.

    Raises:
      ValueError: unknown grid, steps < 1, t_min out of range.
    """
    make = pick(GRIDS, name or config.sampling.grid, "sampling.grid")
    forward_process = process(config)
    t_max = None
    if config.network.predict in ("eps", "score"):
        # These kinds say nothing where there is no signal: start just below t_max on Rectified and Cosine.
        no_signal = float(forward_process.marginal(jnp.asarray(forward_process.t_max))[0]) == 0
        t_max = 0.999 * forward_process.t_max if no_signal else None
    # One program, where it would be compiled operation by operation.
    return jax.jit(
        lambda: make(forward_process, config.sampling.steps, t_min=config.sampling.t_min or None, t_max=t_max)
    )()


def solver(
    config: ConfigDict, trained: jdiff.Field, noise: solvers.Noise = solvers.white, *, predict: jdiff.Kind | None = None
) -> solvers.Solver:
    """Return the solver named in config.sampling for a field of the kind predict, or config.network.predict."""
    make = pick(SOLVERS, config.sampling.solver, "sampling.solver")
    return make(process(config), trained, predict or config.network.predict, config.sampling, noise)


def adaptive(config: ConfigDict, trained: jdiff.Field, keys, x, ends, noise: solvers.Noise = solvers.white):
    """Return what the adaptive solver named in config.sampling makes of x at ends[0]: a Solution at ends[1]."""
    solve = pick(ADAPTIVE, config.sampling.solver, "sampling.solver")
    return solve(process(config), trained, config.network.predict, config.sampling, keys, x, *ends, noise)


def denoiser(config: ConfigDict, trained: jdiff.Field) -> jdiff.Field:
    """Return the x0-field that agrees with a trained field."""
    return _x0(process(config), trained, config.network.predict)


def check_protocol(config: ConfigDict) -> None:
    """Raise ValueError for what config.protocol cannot draw."""
    c, forward_process = config.sampling, process(config)
    pick(("jdiff", "song2021"), config.protocol, "protocol")
    pick((*song2021.PREDICTORS, "ode"), c.predictor, "sampling.predictor")
    pick(song2021.CORRECTORS, c.corrector, "sampling.corrector")
    if config.protocol == "jdiff":
        return
    song2021.check(forward_process, c.steps, predictor=c.predictor, corrector=c.corrector)
    if c.corrector_steps < 1:
        raise ValueError(f"sampling.corrector_steps must be positive, got {c.corrector_steps}")


def check_guidance(config: ConfigDict) -> None:
    """Raise ValueError for guidance that cannot be done, or that would be without effect."""
    c = config.sampling
    for name in ("guidance", "autoguidance", "classifier_scale", "guidance_low", "guidance_high", "weak_step"):
        if not 0 <= c[name] < math.inf:
            raise ValueError(f"sampling.{name} must be finite and not negative, got {c[name]}")
    for name in ("guidance_rescale", "threshold"):
        if not 0 <= c[name] <= 1:
            raise ValueError(f"sampling.{name} must be in [0, 1], got {c[name]}")
    end = process(config).t_max
    if not c.guidance_low < (c.guidance_high or end) <= end:
        raise ValueError(
            f"sampling.guidance_low must be below guidance_high, and that at most {end} (or 0, which means that); "
            f"got {c.guidance_low} and {c.guidance_high}"
        )
    if c.threshold and config.data.logit:
        raise ValueError("sampling.threshold clips to the range of levels, and the data are logits (data.logit)")
    if c.negative and not c.negative.isdecimal():
        raise ValueError(f"sampling.negative must be empty or the number of a class, got {c.negative!r}")
    if c.negative and c.guidance == 1:
        raise ValueError(f"sampling.negative = {c.negative!r} is without effect at sampling.guidance = 1")
    weak = bool(c.weak_workdir or c.weak_step)
    if weak != (c.autoguidance != 1):
        raise ValueError(
            "a weaker model (sampling.weak_workdir, weak_step) and sampling.autoguidance other than 1 need each other; "
            f"got {c.weak_workdir!r}, {c.weak_step} and {c.autoguidance}"
        )
    if c.classifier_workdir and c.label == "null":
        raise ValueError('sampling.classifier_workdir needs a label to follow, and sampling.label is "null"')
