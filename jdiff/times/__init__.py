"""Sampling grids and training-time draws, for every process.

Grids have n + 1 times, decreasing from t_max to t_min; reverse them (`ts[::-1]`) to encode. Draws return (t, weight):
the weighted average of f(t) estimates its mean over uniform t in [t_min, t_max] without bias, whatever the density;
leave the weight out to let the density itself be the weighting.
"""

from jdiff.times.draws import (
    Draw,
    cosmap,
    final,
    importance,
    log_normal,
    logit_normal,
    mode,
    shift_draws,
    stratified,
    uniform,
)
from jdiff.times.grids import (
    karras,
    linear,
    polyexponential,
    quadratic,
    shifted,
    subsequence,
    uniform_log_snr,
)

__all__ = [
    "Draw",
    "cosmap",
    "final",
    "importance",
    "karras",
    "linear",
    "log_normal",
    "logit_normal",
    "mode",
    "polyexponential",
    "quadratic",
    "shift_draws",
    "shifted",
    "stratified",
    "subsequence",
    "uniform",
    "uniform_log_snr",
]
