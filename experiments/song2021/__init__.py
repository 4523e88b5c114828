"""Everything historical about the code of Song et al. 2021 (arXiv 2011.13456): how its published numbers came about.

Marginals and tables in plain float32, discrete objectives, predictors and correctors on a grid that is not their step,
norms averaged over the batch, and SciPy's RK45 on the host with one error norm for all images of a batch. jdiff's own
losses, solvers and likelihoods do none of this; here it is kept apart, for `--protocol song2021`. Facts were read from
yang-song/score_sde.

Processes are VP, SubVP and VE, of Python numbers and with t_max = 1; scales is the reference's N. A score is
(x, t, *weights) -> score with t of shape (batch,); it is compiled once for each function object, so one that is called
with many weights should take them as arguments.
"""

from experiments.song2021.flow import (
    Likelihood,
    bits_per_dim,
    divergence,
    drift,
    level_bits,
    log_likelihood,
    ode_sampler,
)
from experiments.song2021.objectives import ddpm_loss, denoising_loss, smld_loss
from experiments.song2021.process import (
    T_MIN,
    Score,
    alphas_cumprod,
    betas,
    coefficients,
    discretise,
    marginal,
    score_fn,
    sigmas,
)
from experiments.song2021.samplers import CORRECTORS, PREDICTORS, check, levels, pc_sampler

__all__ = [
    "CORRECTORS",
    "PREDICTORS",
    "T_MIN",
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
