"""What the configurations of Song et al. 2021 (arXiv 2011.13456) share, and what was published for them.

Each file under configs/vp, configs/subvp and configs/ve is one row of their tables, by their name, and states only its
differences from what is here. Values: the reference's configurations (yang-song/score_sde), which a test compares.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from configs.common import defaults


class Published(NamedTuple):
    """Numbers of Song et al. 2021, Tables 2 and 3, on CIFAR-10; None where they give none."""

    bits_per_dim: float | None = None  # uniform dequantisation, probability-flow ODE, last checkpoint
    fid_pc: float | None = None  # predictor-corrector samples, best checkpoint
    fid_ode: float | None = None  # samples of the black-box ODE solver, last checkpoint


PUBLISHED = {
    "vp/ddpm/cifar10": Published(3.28, 3.24, 3.37),
    "vp/ddpm/cifar10_continuous": Published(3.21, None, 3.69),
    "vp/cifar10_ddpmpp": Published(None, 2.78, None),
    "vp/cifar10_ddpmpp_continuous": Published(3.16, 2.55, 3.93),
    "vp/cifar10_ddpmpp_deep_continuous": Published(3.13, 2.41, 3.08),
    "subvp/cifar10_ddpm_continuous": Published(3.05, None, 3.56),
    "subvp/cifar10_ddpmpp_continuous": Published(3.02, 2.61, 3.16),
    "subvp/cifar10_ddpmpp_deep_continuous": Published(2.99, 2.41, 2.92),
    "ve/cifar10_ncsnpp": Published(None, 2.45, None),
    "ve/cifar10_ncsnpp_continuous": Published(None, 2.38, None),
    "ve/cifar10_ncsnpp_deep_continuous": Published(None, 2.20, None),
}


STEPS, DEEP_STEPS, LARGE_STEPS = 1_300_001, 950_001, 2_400_001  # CIFAR-10, its deep networks, 256x256


def vp() -> ConfigDict:
    """Return a configuration on CIFAR-10 with VP: the network times -1/std is the score, of labels 999 t."""
    c = defaults()
    c.seed = 42
    c.data.name = "cifar10"
    c.data.size = 32
    c.data.flip = True
    c.data.dequantise = False
    c.process.name = "VP"
    c.process.options = ConfigDict({"beta_min": 0.1, "beta_max": 20.0})
    c.network.predict = "eps"
    c.loss.weight.name = "sigma2"
    c.loss.times.name = "uniform"
    c.optimiser.warmup = 5000
    c.training.steps = STEPS
    c.training.ema_decay = 0.9999
    c.training.ema_warmup = False
    c.training.checkpoint_every = 50_000
    c.likelihood.draws = 2  # tell noise and sampling apart; the published values are of five passes
    c.sampling.solver = "euler_maruyama"
    c.sampling.grid = "linear"
    c.sampling.steps = 1000
    c.sampling.predictor = "euler_maruyama"
    c.sampling.corrector = "none"
    c.sampling.t_min = 1e-3
    return c


def subvp() -> ConfigDict:
    """Return a configuration on CIFAR-10 with sub-VP."""
    c = vp()
    c.process.name = "SubVP"
    return c


def ve(sigma_max: float = 50.0) -> ConfigDict:
    """Return a configuration on CIFAR-10 with VE: the network is the score, of labels sigma, and data are in [0, 1]."""
    c = vp()
    c.data.centered = False
    c.process.name = "VE"
    c.process.options = ConfigDict({"sigma_min": 0.01, "sigma_max": sigma_max})
    c.network.predict = "score"
    c.loss.reduce_mean = False
    c.training.ema_decay = 0.999
    c.sampling.solver = "predictor_corrector"
    c.sampling.predictor = "reverse_diffusion"
    c.sampling.corrector = "langevin"
    c.sampling.t_min = 1e-5
    return c


def ddpm(c: ConfigDict, **changes) -> ConfigDict:
    """Give a configuration the network of DDPM (Ho et al. 2020, arXiv 2006.11239)."""
    options = {"channels": 128, "multipliers": (1, 2, 2, 2), "blocks": 2, "attention": (16,), "dropout": 0.1}
    return _network(c, "ddpm", options | {"scale_by_sigma": c.process.name == "VE"} | changes)


def ddpmpp(c: ConfigDict, **changes) -> ConfigDict:
    """Give a configuration DDPM++: BigGAN blocks, rescaled sums, positional embedding."""
    options = {"channels": 128, "multipliers": (1, 2, 2, 2), "blocks": 4, "attention": (16,), "dropout": 0.1}
    return _network(c, "ddpmpp", options | {"embedding": "positional"} | changes)


def ncsnpp(c: ConfigDict, **changes) -> ConfigDict:
    """Give a configuration NCSN++: DDPM++ with FIR resampling and the input, downsampled, added at each level."""
    ve = c.process.name == "VE"
    options = {"channels": 128, "multipliers": (1, 2, 2, 2), "blocks": 4, "attention": (16,), "dropout": 0.1}
    options |= {"embedding": "fourier" if ve else "positional", "scale_by_sigma": ve}
    return _network(c, "ncsnpp", options | {"fir": True, "progressive_input": "residual"} | changes)


def ncsnv2(c: ConfigDict, *, scales: int, size: int = 64) -> ConfigDict:
    """Give a configuration NCSNv2 (Song and Ermon 2020, arXiv 2006.09011), its training and its sampler."""
    _network(c, "ncsnv2", {"channels": 128, "size": size})
    discrete(c, predictor="none", corrector="ald", scales=scales)
    c.sampling.corrector_steps = 5
    c.optimiser.learning_rate = 1e-4
    c.optimiser.warmup = 0
    c.optimiser.clip = 0.0
    return c


def deep(c: ConfigDict) -> ConfigDict:
    """Make a configuration deep: twice the blocks, fewer steps."""
    c.network.options.blocks = 8
    c.training.steps = DEEP_STEPS
    return c


def discrete(c: ConfigDict, *, predictor: str = "", corrector: str = "", scales: int = 1000) -> ConfigDict:
    """Train a configuration at N discrete times: the DDPM objective for VP, SMLD for VE."""
    ve = c.process.name == "VE"
    c.loss.name = "smld" if ve else "ddpm"
    c.loss.scales = c.sampling.steps = scales
    c.sampling.predictor = predictor or ("reverse_diffusion" if ve else "ancestral_sampling")
    if corrector:
        c.sampling.corrector = corrector
    if not ve:
        c.sampling.solver = "ancestral"
    return c


def large_ddpm(data: str) -> ConfigDict:
    """Return a configuration of DDPM on a data set of 256x256."""
    c = discrete(ddpm(vp(), multipliers=(1, 1, 2, 2, 4, 4), dropout=0.0))
    c.optimiser.learning_rate = 2e-5
    return _large(c, data)


def large_ncsnpp(data: str, sigma_max: float) -> ConfigDict:
    """Return a configuration of NCSN++ with VE on a data set of 256x256."""
    changes = {"progressive": "output_skip", "progressive_input": "input_skip"}
    c = ncsnpp(ve(sigma_max), multipliers=(1, 1, 2, 2, 2, 2, 2), blocks=2, dropout=0.0, **changes)
    c.sampling.steps = 2000
    return _large(c, data)


def smoke(c: ConfigDict) -> ConfigDict:
    """Make a configuration small: few channels, two levels, the digits, two steps; choices between options stay."""
    c.data.name = "digits"
    c.data.size = 8
    options = c.network.options
    options.channels = 8
    if c.network.name != "ncsnv2":
        options.update({"multipliers": (1, 2), "blocks": 1, "attention": (4,)})
    c.training.steps = 2
    c.training.batch_size = 8
    c.training.log_every = c.training.validate_every = c.training.checkpoint_every = 2
    c.optimiser.warmup = min(c.optimiser.warmup, 1)
    c.likelihood.images = c.likelihood.batch_size = 8
    c.likelihood.tolerance_images = 0
    c.likelihood.rtol = c.likelihood.atol = 1e-1
    c.sampling.steps = 4
    c.sampling.number = c.sampling.batch_size = 8
    return c


def _network(c, name, options):
    c.network.name = name
    c.network.options = ConfigDict(options)
    return c


def _large(c, data):
    c.data.name = data
    c.data.size = 256
    c.training.batch_size = 64
    c.training.steps = LARGE_STEPS
    c.sampling.snr = 0.075
    return c
