"""What simple densities achieve on the same split, in bits/dim per image: a model has to beat them.

The continuous ones are fitted to dequantised training images and scored on one dequantisation of the split; the
discrete ones are probabilities of the levels themselves.
"""

from __future__ import annotations

import math

import numpy as np
from sklearn.mixture import GaussianMixture

from jdiff import data

# Above this, the covariance of a mixture component has more entries than a small set has pixels.
_MIXTURE_LIMIT = 256
_SMOOTHING = 0.1
# Squared levels; of 0.001 to 1 the best on the digits' validation split.
_MIXTURE_REGULARISATION = 0.2


def evaluate(name: str, split: str, *, train: str = "train", seed: int = 0) -> dict[str, np.ndarray]:
    """Return {yardstick: bits/dim of each image of the split}.

    uniform: log2 of the number of levels. gaussian_diagonal, gaussian_full: one Gaussian. mixture_10: ten Gaussians of
    full covariance (only up to 256 entries per image). histogram: independent pixels, counts + 0.1.
    """
    source, target = data.load(name, train), data.load(name, split)
    rng = np.random.RandomState(seed)
    levels = source.levels
    fit, score = (s.arrays()["image"].reshape(len(s), -1) for s in (source, target))
    size = fit.shape[1]
    # Level units: a cell has volume one, so the log-density needs no log-determinant.
    x, y = (a + rng.uniform(size=a.shape) for a in (fit, score))
    bits = {"uniform": np.full(len(score), math.log2(levels))}
    mean, std = x.mean(axis=0), x.std(axis=0)
    z = (y - mean) / std
    bits["gaussian_diagonal"] = _bits((-0.5 * z**2 - np.log(std) - 0.5 * math.log(2 * math.pi)).sum(axis=1), size)
    # A little of the diagonal keeps the covariance regular where pixels are constant.
    covariance = np.cov(x, rowvar=False) + 1e-3 * np.eye(size)
    root = np.linalg.cholesky(covariance)
    whitened = np.linalg.solve(root, (y - mean).T)
    log_det = np.log(np.diag(root)).sum()
    bits["gaussian_full"] = _bits(-0.5 * (whitened**2).sum(axis=0) - log_det - 0.5 * size * math.log(2 * math.pi), size)
    if size <= _MIXTURE_LIMIT:
        mixture = GaussianMixture(10, random_state=seed, reg_covar=_MIXTURE_REGULARISATION, max_iter=100).fit(x)
        bits["mixture_10"] = _bits(mixture.score_samples(y), size)
    counts = np.stack([np.bincount(column, minlength=levels) for column in fit.T]) + _SMOOTHING
    log_probability = np.log(counts / counts.sum(axis=1, keepdims=True))
    bits["histogram"] = _bits(log_probability[np.arange(size), score].sum(axis=1), size)
    return bits


def _bits(log_prob, size):
    return -log_prob / (size * math.log(2))
