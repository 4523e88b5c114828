"""A small DDPM++ on 3,500 real CIFAR-10 images, the paper's objective: sub-VP against VP with the same compute.

    TFDS_DATA_DIR=... python -m experiments.train --config configs/cifar10_4k.py --workdir runs/cifar_subvp
    TFDS_DATA_DIR=... python -m experiments.train --config configs/cifar10_4k.py --workdir runs/cifar_vp \
        --set process.name=VP
    TFDS_DATA_DIR=... python -m experiments.likelihood --workdir runs/cifar_subvp --against runs/cifar_vp

Uniform times and the unweighted eps loss, as in Song et al. 2021 (arXiv 2011.13456); a standardising precondition
instead of their 1.3 million steps. Sized for minutes on two cores: its bits/dim are far from a trained network's.
"""

from ml_collections import ConfigDict

from configs.common import defaults


def get_config(mode: str = "full") -> ConfigDict:
    """Return the configuration; "smoke" is a narrower network, trained and evaluated for seconds."""
    c = defaults()
    c.data.name = "cifar10_4k"
    c.data.flip = True
    c.process.name = "SubVP"
    c.network.name = "ddpmpp"
    c.network.options = ConfigDict({"size": "small", "channels": 16})
    c.network.precondition = "scalar"
    c.network.predict = "eps"
    c.optimiser.learning_rate = 1e-3
    c.optimiser.warmup = 50
    c.optimiser.cosine = True
    c.training.steps = 500
    c.training.batch_size = 64
    c.training.ema_decay = 0.99
    c.training.checkpoint_every = 200
    c.likelihood.variable = "asinh"
    c.likelihood.rtol = c.likelihood.atol = 1e-3
    c.likelihood.batch_size = c.likelihood.tolerance_images = 125
    if mode == "smoke":
        c.data.train = "train[:256]"
        c.network.options = ConfigDict({"size": "small", "channels": 8, "multipliers": (1, 2)})
        c.training.steps = 4
        c.training.batch_size = 8
        c.training.log_every = c.training.validate_every = c.training.checkpoint_every = 2
        c.optimiser.warmup = 1
        c.likelihood.images = c.likelihood.batch_size = 4
        c.likelihood.rtol = c.likelihood.atol = 1e-1
        c.sampling.steps = 4
        c.sampling.number = c.sampling.batch_size = 4
    return c
