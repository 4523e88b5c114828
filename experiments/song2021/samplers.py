"""Predictors, correctors and their sampler: on a grid that is not their step, with norms averaged over the batch.

A predictor is (process, score, x, t, noise, scales, flow) -> (x, its mean), noise of the shape of x; a corrector is
(process, score, x, t, noise, scales, snr) -> (x, its mean), noise of shape (steps, *x.shape).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

import jdiff
from experiments.song2021.process import (
    Score,
    adjacent_sigmas,
    betas,
    coefficients,
    discretise,
    is_ve,
    marginal,
    scale_index,
    wide,
)
from jdiff.transforms import DataTransform


def euler_maruyama(process, score, x, t, noise, scales, flow=False):
    """Return a step of dt = -1/N of the reverse SDE, or of the probability flow, whatever the grid of t (eq. 6)."""
    f, g = coefficients(process, t)
    mean = x - (wide(f, x) * x - _share(flow) * wide(g, x) ** 2 * score(x, t)) / scales
    return mean if flow else mean + wide(g, x) * math.sqrt(1 / scales) * noise, mean


def reverse_diffusion(process, score, x, t, noise, scales, flow=False):
    """Return the discretised forward step, reversed (appendix E, eq. 46)."""
    f, g = discretise(process, t, scales)
    mean = x - wide(f, x) * x + _share(flow) * wide(g, x) ** 2 * score(x, t)
    return mean if flow else mean + wide(g, x) * noise, mean


def ancestral_sampling(process, score, x, t, noise, scales, flow=False):
    """Return DDPM's or SMLD's ancestral step (eq. 4, appendix F).

    Raises:
      ValueError: of SubVP, or of the probability flow.
    """
    if flow or isinstance(process, jdiff.SubVP):
        raise ValueError("ancestral_sampling is of the reverse SDEs of VP and VE, not of SubVP or a probability flow")
    if is_ve(process):
        sigma, below = adjacent_sigmas(process, t, scales)
        mean = x + wide(sigma**2 - below**2, x) * score(x, t)
        return mean + wide(jnp.sqrt(below**2 * (sigma**2 - below**2) / sigma**2), x) * noise, mean
    beta = wide(betas(process, scales)[scale_index(t, scales)], x)
    mean = (x + beta * score(x, t)) / jnp.sqrt(1 - beta)
    return mean + jnp.sqrt(beta) * noise, mean


def langevin(process, score, x, t, noise, scales, snr):
    """Return x after Langevin steps of 2 alpha_i (snr |noise| / |score|)^2, norms the batch's means (algorithm 4).

    Raises:
      ValueError: of SubVP, for which the reference breaks.
    """
    alpha = _corrector_alpha(process, t, scales)
    norm = lambda a: jnp.mean(jnp.linalg.norm(a.reshape(len(a), -1), axis=-1))

    def step(x, noise):
        grad = score(x, t)
        size = wide(2 * alpha * (snr * norm(noise) / norm(grad)) ** 2, x)
        mean = x + size * grad
        return mean + jnp.sqrt(2 * size) * noise, mean

    return _repeat(step, x, noise)


def ald(process, score, x, t, noise, scales, snr):
    """Return x after annealed Langevin steps of 2 alpha_i (snr sigma)^2 (Song and Ermon 2019, algorithm 1).

    Raises:
      ValueError: of SubVP, for which the reference breaks.
    """
    size = wide(2 * _corrector_alpha(process, t, scales) * (snr * marginal(process, t)[1]) ** 2, x)

    def step(x, noise):
        mean = x + size * score(x, t)
        return mean + jnp.sqrt(2 * size) * noise, mean

    return _repeat(step, x, noise)


PREDICTORS = {
    "euler_maruyama": euler_maruyama,
    "reverse_diffusion": reverse_diffusion,
    "ancestral_sampling": ancestral_sampling,
    "none": lambda process, score, x, t, *rest: (x, x),
}


CORRECTORS = {"langevin": langevin, "ald": ald, "none": lambda process, score, x, *rest: (x, x)}


def pc_sampler(
    process: jdiff.Process,
    score: Score,
    x: jax.Array,
    noise: jax.Array | tuple[jax.Array | None, jax.Array | None],
    *,
    scales: int = 1000,
    predictor: str = "euler_maruyama",
    corrector: str = "none",
    snr: float = 0.16,
    corrector_steps: int = 1,
    flow: bool = False,
    t_min: float = 1e-3,
    denoise: bool = True,
) -> jax.Array:
    """Return samples after N times a corrector and then a predictor, at N times from 1 to t_min.

    The step is 1/N, not that of the times, and the corrector acts before the predictor. `denoise` gives the mean of the
    last predictor, which with predictor "none" is the noisy sample itself.

    Args:
      process: the forward process.
      score: (x, t) -> score.
      x: samples of the prior, (batch, *event).
      noise: keys, shape (batch,), or the noise of predictors, (N, *x.shape), and of correctors,
        (N, corrector_steps, *x.shape); None for that of "none".
      scales: N.
      predictor: one of PREDICTORS.
      corrector: one of CORRECTORS.
      snr: of the corrector.
      corrector_steps: of the corrector, each time.
      flow: the predictor steps along the probability flow.
      t_min: the last time.
      denoise: return the mean of the last step.

    Raises:
      ValueError: an unknown name; what the reference cannot do.
    """
    for name, table in ((predictor, PREDICTORS), (corrector, CORRECTORS)):
        if name not in table:
            raise ValueError(f"{name!r} is unknown; choose one of {', '.join(table)}")
    given = isinstance(noise, tuple)
    draw = lambda n, shape: jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, n), shape, x.dtype))(noise)

    def step(state, inputs):
        x, _ = state
        i, t, noises = inputs
        t = jnp.full(len(x), t)
        if given:
            for_predictor, for_corrector = noises
        else:
            drawn = draw(i, (1 + corrector_steps, *x.shape[1:])).swapaxes(0, 1)
            for_predictor, for_corrector = drawn[0], drawn[1:]
        x, _ = CORRECTORS[corrector](process, score, x, t, for_corrector, scales, snr)
        return PREDICTORS[predictor](process, score, x, t, for_predictor, scales, flow), None

    ts = jnp.linspace(1.0, t_min, scales, dtype=x.dtype)
    (x, mean), _ = jax.lax.scan(step, (x, x), (jnp.arange(scales), ts, noise if given else None))
    return mean if denoise else x


def check(process: jdiff.Process, scales: int, *, predictor: str, corrector: str) -> None:
    """Raise ValueError for a sampler that the reference does not have; predictor "ode" is its black-box solver."""
    if not isinstance(process, jdiff.VP | jdiff.SubVP | jdiff.VE) or process.t_max != 1:
        raise ValueError(f"protocol song2021 has VP, SubVP and VE to t_max = 1, not {process}")
    if isinstance(process, jdiff.SubVP) and corrector != "none":
        raise ValueError(f'SubVP has no corrector in the reference, which breaks there: choose "none", not {corrector}')
    if isinstance(process, jdiff.SubVP) and predictor == "ancestral_sampling":
        raise ValueError("ancestral_sampling is of the reverse SDEs of VP and VE, not of SubVP")
    if predictor == "ode" and corrector != "none":
        raise ValueError(f'the ODE sampler has no corrector: choose "none", not {corrector}')
    if isinstance(process, jdiff.VP) and (corrector != "none" or predictor not in ("euler_maruyama", "none")):
        betas(process, scales)


def levels(x: jax.Array, transform: DataTransform) -> np.ndarray:
    """Return samples as integer levels, as they were written: (L - 1) x in the unit interval, cut off."""
    unit = np.asarray((x + 1) / 2 if transform.centered else x)
    dtype = np.uint8 if transform.levels <= 256 else np.int32
    return np.clip(unit * (transform.levels - 1), 0, transform.levels - 1).astype(dtype)


def _corrector_alpha(process, t, scales):
    if isinstance(process, jdiff.SubVP):
        raise ValueError('SubVP has no corrector in the reference, which breaks there: choose "none"')
    return jnp.ones_like(t) if is_ve(process) else 1 - betas(process, scales)[scale_index(t, scales)]


def _repeat(step, x, noise):
    (x, mean), _ = jax.lax.scan(lambda state, noise: (step(state[0], noise), None), (x, x), noise)
    return x, mean


def _share(flow):
    """Return how much of g^2 score the flow, or the reverse SDE, has."""
    return 0.5 if flow else 1.0
