"""A small DDPM++ U-Net on MNIST, sub-VP: what the time embedding costs in bits/dim and saves in evaluations.

    TFDS_DATA_DIR=... python -m experiments.train --config configs/mnist_unet.py --workdir runs/mnist_smooth
    TFDS_DATA_DIR=... python -m experiments.train --config configs/mnist_unet.py --workdir runs/mnist_positional \
        --set 'network.options={"size": "small", "channels": 16, "multipliers": [1, 1, 2], "embedding": "positional"}'
    python -m benchmarks.likelihood_pareto --workdir runs/mnist_smooth runs/mnist_positional --single --truth 1e-6

Two trainings that differ in the embedding alone: smooth in log-SNR, and sinusoids of 999 t as published in 2021.
"""

from ml_collections import ConfigDict

from configs.common import defaults


def get_config(mode: str = "full") -> ConfigDict:
    """Return the configuration; "smoke" is a narrower network, trained and evaluated for seconds."""
    c = defaults()
    c.data.name = "mnist"
    c.data.train = "train[:55000]"
    c.data.validation = "train[55000:]"
    c.process.name = "SubVP"
    c.network.name = "ddpmpp"
    c.network.options = ConfigDict({"size": "small", "channels": 16, "multipliers": (1, 1, 2)})
    c.network.precondition = "pixel"
    c.network.predict = "eps"
    c.loss.weight.name = "likelihood"
    c.loss.times.name = "importance"
    c.optimiser.learning_rate = 1e-3
    c.optimiser.warmup = 100
    c.optimiser.cosine = True
    c.training.steps = 1000
    c.training.batch_size = 64
    c.training.ema_decay = 0.998
    c.training.validate_every = 500
    c.training.checkpoint_every = 500
    c.likelihood.variable = "asinh"
    c.likelihood.rtol = c.likelihood.atol = 1e-4
    c.sampling.grid = "uniform_log_snr"
    c.sampling.steps = 50
    if mode == "smoke":
        c.data.train, c.data.validation = "train[:256]", "train[256:512]"
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
