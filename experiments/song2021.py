"""Everything historical about the code of Song et al. 2021 (arXiv 2011.13456): how its published numbers came about.

Marginals and tables in plain float32, discrete objectives, predictors and correctors on a grid that is not their step,
norms averaged over the batch, and SciPy's RK45 on the host with one error norm for all images of a batch. jdiff's own
losses, solvers and likelihoods do none of this; here it is kept apart, for `--protocol song2021`. Facts were read from
yang-song/score_sde.

Processes are VP, SubVP and VE, of Python numbers and with t_max = 1; scales is the reference's N. A score is
(x, t, *weights) -> score with t of shape (batch,); it is compiled once for each function object, so one that is called
with many weights should take them as arguments.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import integrate

import jdiff
from jdiff import predictions, processes
from jdiff.transforms import DataTransform

__all__ = [
    "CORRECTORS",
    "PREDICTORS",
    "Likelihood",
    "Score",
    "alphas_cumprod",
    "betas",
    "bits_per_dim",
    "check",
    "coefficients",
    "ddpm_loss",
    "denoising_loss",
    "discretise",
    "divergence",
    "drift",
    "level_bits",
    "levels",
    "log_likelihood",
    "marginal",
    "ode_sampler",
    "pc_sampler",
    "score_fn",
    "sigmas",
    "smld_loss",
]

Score = Callable[..., jax.Array]
T_MIN = 1e-5
"""Where likelihoods end and training times start; samples of VP and SubVP end at 1e-3."""


# The process in float32, as it was written.


def marginal(process: jdiff.Process, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return alpha, sigma at t with the 1 - exp(.) that loses its digits near t = 0 (eqs. 29-31, 33).

    Raises:
      TypeError: another process than VP, SubVP and VE; so do all functions of a process here.
    """
    if _is_ve(process):
        return jnp.ones_like(t), process.sigma_min * (process.sigma_max / process.sigma_min) ** t
    log_alpha = -0.25 * t**2 * (process.beta_max - process.beta_min) - 0.5 * t * process.beta_min
    variance = 1 - jnp.exp(2 * log_alpha)
    return jnp.exp(log_alpha), variance if isinstance(process, jdiff.SubVP) else jnp.sqrt(variance)


def coefficients(process: jdiff.Process, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return f, g of dx = f(t) x dt + g(t) dw (eqs. 8, 10, 14)."""
    if _is_ve(process):
        ratio = math.log(process.sigma_max) - math.log(process.sigma_min)
        return jnp.zeros_like(t), marginal(process, t)[1] * math.sqrt(2 * ratio)
    slope = process.beta_max - process.beta_min
    beta = process.beta_min + t * slope
    g2 = beta
    if isinstance(process, jdiff.SubVP):
        g2 = beta * (1 - jnp.exp(-2 * process.beta_min * t - slope * t**2))
    return -0.5 * beta, jnp.sqrt(g2)


def betas(process: jdiff.VP, scales: int) -> jax.Array:
    """Return beta_i of the discrete VP, linear from beta_min / N to beta_max / N, shape (N,).

    Raises:
      ValueError: a beta of 1 or more, because there are too few scales.
    """
    if not process.beta_max < scales:
        raise ValueError(f"the discrete VP needs more than beta_max = {process.beta_max} scales, got {scales}")
    return jnp.linspace(process.beta_min / scales, process.beta_max / scales, scales, dtype=jnp.float32)


def alphas_cumprod(process: jdiff.VP, scales: int) -> jax.Array:
    """Return the products of 1 - beta_j over j <= i, the alpha^2 of the discrete VP, shape (N,)."""
    return jnp.cumprod(1 - betas(process, scales))


def sigmas(process: jdiff.VE, scales: int) -> jax.Array:
    """Return the geometric noise scales of the discrete VE, ascending, shape (N,)."""
    low, high = math.log(process.sigma_min), math.log(process.sigma_max)
    return jnp.exp(jnp.linspace(low, high, scales, dtype=jnp.float32))


def discretise(process: jdiff.Process, t: jax.Array, scales: int) -> tuple[jax.Array, jax.Array]:
    """Return f, G of one forward step x + f x + G z: DDPM's for VP, SMLD's for VE, Euler-Maruyama's for SubVP."""
    if isinstance(process, jdiff.VP):
        beta = betas(process, scales)[_index(t, scales)]
        return jnp.sqrt(1 - beta) - 1, jnp.sqrt(beta)
    if _is_ve(process):
        sigma, below = _adjacent_sigmas(process, t, scales)
        return jnp.zeros_like(t), jnp.sqrt(sigma**2 - below**2)
    f, g = coefficients(process, t)
    return f / scales, g * math.sqrt(1 / scales)


def score_fn(process: jdiff.Process, field: Score, predict: str = "eps", *, scales: int | None = None) -> Score:
    """Return the score of a field of time: a field of kind score itself, else -eps / sigma with the naive sigma.

    Args:
      process: the forward process.
      field: (x, t, *weights) -> prediction; what the network makes of t is its own matter (999 t, sigma, and the
        rounded number of a scale where it was trained with `smld_loss`).
      predict: its kind.
      scales: of a VP model that was trained with `ddpm_loss`: sigma is then the table's entry int(t (N - 1)).
    """

    def score(x, t, *weights):
        if predict == "score":
            return field(x, t, *weights)
        kind = lambda x, t: field(x, t, *weights)
        eps = kind if predict == "eps" else predictions.reparameterise(process, kind, predict, "eps")
        sigma = marginal(process, t)[1]
        if scales is not None and isinstance(process, jdiff.VP):
            sigma = jnp.sqrt(1 - alphas_cumprod(process, scales))[_index(t, scales)]
        return -eps(x, t) / _wide(sigma, x)

    return score


# Objectives, per example: at given times or labels, with given noise.


def denoising_loss(
    process: jdiff.Process,
    score: Score,
    x0: jax.Array,
    t: jax.Array,
    eps: jax.Array,
    *,
    likelihood_weighting: bool = False,
    reduce_mean: bool = True,
) -> jax.Array:
    """Return |sigma score + eps|^2 or g^2 |score + eps / sigma|^2 per example (eq. 7), x_t = alpha x0 + sigma eps.

    The square is a mean over the image, or half the sum.
    """
    alpha, sigma = (_wide(a, x0) for a in marginal(process, t))
    found = score(alpha * x0 + sigma * eps, t)
    if likelihood_weighting:
        return coefficients(process, t)[1] ** 2 * _reduce(found + eps / sigma, reduce_mean)
    return _reduce(found * sigma + eps, reduce_mean)


def ddpm_loss(
    process: jdiff.VP,
    field: Score,
    x0: jax.Array,
    labels: jax.Array,
    eps: jax.Array,
    *,
    scales: int = 1000,
    reduce_mean: bool = True,
) -> jax.Array:
    """Return |field - eps|^2 per example at the integer labels 0 .. N-1 of the discrete VP (Ho et al. 2020, eq. 14).

    field: (x, t) -> eps, at t = label / (N - 1).
    """
    alpha2 = _wide(alphas_cumprod(process, scales)[labels], x0)
    x = jnp.sqrt(alpha2) * x0 + jnp.sqrt(1 - alpha2) * eps
    return _reduce(field(x, _time(labels, scales)) - eps, reduce_mean)


def smld_loss(
    process: jdiff.VE,
    field: Score,
    x0: jax.Array,
    labels: jax.Array,
    eps: jax.Array,
    *,
    scales: int = 1000,
    reduce_mean: bool = False,
) -> jax.Array:
    """Return sigma^2 |field + eps / sigma|^2 per example (Song and Ermon 2019, arXiv 1907.05600, eq. 6).

    labels are integers 0 .. N-1 that count from the largest sigma; field: (x, t) -> score, at t = 1 - label / (N - 1).
    """
    sigma = sigmas(process, scales)[::-1][labels]
    noise = _wide(sigma, x0) * eps
    error = field(x0 + noise, _time(scales - 1 - labels, scales)) + noise / _wide(sigma**2, x0)
    return sigma**2 * _reduce(error, reduce_mean)


# Predictors: (process, score, x, t, noise, scales, flow) -> (x, its mean), noise of the shape of x.


def euler_maruyama(process, score, x, t, noise, scales, flow=False):
    """Return a step of dt = -1/N of the reverse SDE, or of the probability flow, whatever the grid of t (eq. 6)."""
    f, g = coefficients(process, t)
    mean = x - (_wide(f, x) * x - _share(flow) * _wide(g, x) ** 2 * score(x, t)) / scales
    return mean if flow else mean + _wide(g, x) * math.sqrt(1 / scales) * noise, mean


def reverse_diffusion(process, score, x, t, noise, scales, flow=False):
    """Return the discretised forward step, reversed (appendix E, eq. 46)."""
    f, g = discretise(process, t, scales)
    mean = x - _wide(f, x) * x + _share(flow) * _wide(g, x) ** 2 * score(x, t)
    return mean if flow else mean + _wide(g, x) * noise, mean


def ancestral_sampling(process, score, x, t, noise, scales, flow=False):
    """Return DDPM's or SMLD's ancestral step (eq. 4, appendix F).

    Raises:
      ValueError: of SubVP, or of the probability flow.
    """
    if flow or isinstance(process, jdiff.SubVP):
        raise ValueError("ancestral_sampling is of the reverse SDEs of VP and VE, not of SubVP or a probability flow")
    if _is_ve(process):
        sigma, below = _adjacent_sigmas(process, t, scales)
        mean = x + _wide(sigma**2 - below**2, x) * score(x, t)
        return mean + _wide(jnp.sqrt(below**2 * (sigma**2 - below**2) / sigma**2), x) * noise, mean
    beta = _wide(betas(process, scales)[_index(t, scales)], x)
    mean = (x + beta * score(x, t)) / jnp.sqrt(1 - beta)
    return mean + jnp.sqrt(beta) * noise, mean


# Correctors: (process, score, x, t, noise, scales, snr) -> (x, its mean), noise of shape (steps, *x.shape).


def langevin(process, score, x, t, noise, scales, snr):
    """Return x after Langevin steps of 2 alpha_i (snr |noise| / |score|)^2, norms the batch's means (algorithm 4).

    Raises:
      ValueError: of SubVP, for which the reference breaks.
    """
    alpha = _corrector_alpha(process, t, scales)
    norm = lambda a: jnp.mean(jnp.linalg.norm(a.reshape(len(a), -1), axis=-1))

    def step(x, noise):
        grad = score(x, t)
        size = _wide(2 * alpha * (snr * norm(noise) / norm(grad)) ** 2, x)
        mean = x + size * grad
        return mean + jnp.sqrt(2 * size) * noise, mean

    return _repeat(step, x, noise)


def ald(process, score, x, t, noise, scales, snr):
    """Return x after annealed Langevin steps of 2 alpha_i (snr sigma)^2 (Song and Ermon 2019, algorithm 1).

    Raises:
      ValueError: of SubVP, for which the reference breaks.
    """
    size = _wide(2 * _corrector_alpha(process, t, scales) * (snr * marginal(process, t)[1]) ** 2, x)

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


# The probability flow, solved on the host.


@functools.partial(jax.jit, static_argnums=(0, 1))
def drift(process: jdiff.Process, score: Score, x: jax.Array, t: jax.Array, *weights: Any) -> jax.Array:
    """Return the probability flow f x - g^2 score / 2 at t (batch,), eq. 13."""
    f, g = coefficients(process, t)
    return _wide(f, x) * x - 0.5 * _wide(g, x) ** 2 * score(x, t, *weights)


@functools.partial(jax.jit, static_argnums=(0, 1))
def divergence(process, score, x, t, probe, *weights):
    """Return probe . grad(drift . probe) per example, Hutchinson's estimate of the trace (eq. 40)."""
    inner = lambda x: jnp.sum(drift(process, score, x, t, *weights) * probe)
    return jnp.sum(probe * jax.grad(inner)(x), axis=tuple(range(1, x.ndim)))


@functools.partial(jax.jit, static_argnums=(0, 1, 4))
def _denoised(process, score, x, t, scales, *weights):
    closed = lambda x, t: score(x, t, *weights)
    return reverse_diffusion(process, closed, x, t, jnp.zeros_like(x), scales)[1]


def ode_sampler(
    process: jdiff.Process,
    score: Score,
    z: jax.Array,
    *weights: Any,
    t_min: float = 1e-3,
    denoise: bool = False,
    scales: int = 1000,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> tuple[jax.Array, int]:
    """Return the samples that the probability flow makes of z, and the evaluations that RK45 took from 1 to t_min.

    SciPy solves all images as one system in float64; the drift is float32. `denoise` adds the mean of one reverse
    diffusion step at t_min.

    Args:
      process: the forward process.
      score: (x, t, *weights) -> score.
      z: samples of the prior, (batch, *event).
      *weights: given to the score.
      t_min: where the samples are.
      denoise: one more step.
      scales: of that step.
      rtol: tolerance relative to the joint norm.
      atol: absolute tolerance.
    """
    state = lambda y: jnp.asarray(y, jnp.float32).reshape(z.shape)
    time = lambda t: jnp.full(len(z), t, jnp.float32)
    slope = lambda t, y: np.asarray(drift(process, score, state(y), time(t), *weights), np.float64).ravel()
    solved = integrate.solve_ivp(slope, (1.0, t_min), np.asarray(z, np.float64).ravel(), "RK45", rtol=rtol, atol=atol)
    x = state(solved.y[:, -1])
    return _denoised(process, score, x, time(t_min), scales, *weights) if denoise else x, solved.nfev


class Likelihood(NamedTuple):
    """Of a batch in model space, in nats: log p(x) = prior_logp + delta_logp, each (batch,)."""

    prior_logp: np.ndarray
    delta_logp: np.ndarray
    latent: np.ndarray
    """Where the flow takes the images, at t = 1."""
    evaluations: int


def log_likelihood(
    process: jdiff.Process,
    score: Score,
    x: jax.Array,
    probe: jax.Array,
    *weights: Any,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    t_min: float = T_MIN,
) -> Likelihood:
    """Return the log-density of x with one probe per image: RK45 from t_min to 1 (section 4.3, eq. 39).

    One system in float64 holds all images and all their log-densities, under one error norm: what an image gets depends
    on its batch. The right-hand side is float32, drift and divergence two calls.
    """
    batch, size = len(x), x.size

    def slope(t, y):
        images = jnp.asarray(y[:size], jnp.float32).reshape(x.shape)
        t = jnp.full(batch, t, jnp.float32)
        flow = drift(process, score, images, t, *weights)
        trace = divergence(process, score, images, t, probe, *weights)
        return np.concatenate([np.asarray(flow, np.float64).ravel(), np.asarray(trace, np.float64)])

    start = np.concatenate([np.asarray(x, np.float64).ravel(), np.zeros(batch)])
    solved = integrate.solve_ivp(slope, (t_min, 1.0), start, method="RK45", rtol=rtol, atol=atol)
    latent = solved.y[:size, -1].reshape(x.shape).astype(np.float32)
    prior = np.asarray(processes.prior_log_prob(process, jnp.asarray(latent)))
    return Likelihood(prior, solved.y[size:, -1].astype(np.float32), latent, solved.nfev)


def bits_per_dim(
    key: jax.Array,
    process: jdiff.Process,
    score: Score,
    images: jax.Array,
    *weights: Any,
    transform: DataTransform,
    probe: str = "rademacher",
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> dict[str, Any]:
    """Return the published bits/dim of integer images: uniform dequantisation and `log_likelihood`.

    -(log p(x) / (D ln 2)) + log2 L, minus 1 where data are in [-1, 1]: the offsets 7 and 8 of 256 levels.

    Args:
      key: of dequantisation and probe.
      process: the forward process.
      score: (x, t, *weights) -> score.
      images: levels, (batch, *event).
      *weights: given to the score.
      transform: between levels and model space.
      probe: "rademacher" or "gaussian".
      rtol: tolerance relative to the joint norm.
      atol: absolute tolerance.

    Returns:
      bits_per_dim, prior_logp, delta_logp, each (batch,), latent, and evaluations, one number for the batch.

    Raises:
      ValueError: unknown probe.
    """
    draws = {"rademacher": jax.random.rademacher, "gaussian": jax.random.normal}
    if probe not in draws:
        raise ValueError(f"probe = {probe!r} is unknown; choose one of {', '.join(draws)}")
    for_noise, for_probe = jax.random.split(key)
    x = transform.forward(transform.dequantise(for_noise, jnp.asarray(images)))
    eps = draws[probe](for_probe, x.shape, x.dtype)
    found = log_likelihood(process, score, x, eps, *weights, rtol=rtol, atol=atol)
    return found._asdict() | {"bits_per_dim": level_bits(found, transform)}


def level_bits(found: Likelihood, transform: DataTransform) -> np.ndarray:
    """Return bits/dim of levels from the log-density of their dequantised images, (batch,)."""
    offset = math.log2(transform.levels) - (1 if transform.centered else 0)
    return -(found.prior_logp + found.delta_logp) / (math.log(2) * found.latent[0].size) + offset


def _is_ve(process):
    if not isinstance(process, jdiff.VP | jdiff.SubVP | jdiff.VE):
        raise TypeError(f"the reference has VP, SubVP and VE, not {type(process).__name__}")
    return isinstance(process, jdiff.VE)


def _index(t, scales):
    return (t * (scales - 1)).astype(jnp.int32)


def _time(index, scales):
    return index.astype(jnp.float32) / (scales - 1)


def _adjacent_sigmas(process, t, scales):
    table, i = sigmas(process, scales), _index(t, scales)
    return table[i], jnp.where(i == 0, jnp.zeros_like(t), table[i - 1])


def _corrector_alpha(process, t, scales):
    if isinstance(process, jdiff.SubVP):
        raise ValueError('SubVP has no corrector in the reference, which breaks there: choose "none"')
    return jnp.ones_like(t) if _is_ve(process) else 1 - betas(process, scales)[_index(t, scales)]


def _repeat(step, x, noise):
    (x, mean), _ = jax.lax.scan(lambda state, noise: (step(state[0], noise), None), (x, x), noise)
    return x, mean


def _share(flow):
    """Return how much of g^2 score the flow, or the reverse SDE, has."""
    return 0.5 if flow else 1.0


def _reduce(error, reduce_mean):
    squares = jnp.square(error).reshape(len(error), -1)
    return jnp.mean(squares, axis=-1) if reduce_mean else 0.5 * jnp.sum(squares, axis=-1)


def _wide(a, x):
    return a.reshape(-1, *(1,) * (x.ndim - 1))
