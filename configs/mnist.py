"""A small DDPM++ on MNIST (28x28, all 60,000 training images), sub-VP process, trained for likelihood.

    TFDS_DATA_DIR=... python -m experiments.train --config configs/mnist.py --workdir runs/mnist
    TFDS_DATA_DIR=... python -m experiments.likelihood --workdir runs/mnist

The full run is sized for an accelerator; no number is claimed for it yet. `--mode smoke` runs train, likelihood and
sample in under two minutes on two cores, most of it compilation.
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
    c.network.options = ConfigDict({"size": "small"})
    c.network.precondition = "pixel"
    c.network.predict = "eps"
    c.loss.weight.name = "likelihood"
    c.loss.times.name = "importance"
    c.optimiser.learning_rate = 1e-3
    c.optimiser.warmup = 500
    c.optimiser.cosine = True
    c.training.steps = 100_000
    c.training.ema_decay = 0.9995
    c.training.validate_every = 1000
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
