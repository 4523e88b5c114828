"""A patch transformer over merged grey levels on MNIST (28x28, 256 levels), sub-VP process, trained for likelihood.

    TFDS_DATA_DIR=... python -m experiments.train --config configs/mnist.py --workdir runs/mnist
    TFDS_DATA_DIR=... python -m experiments.likelihood --workdir runs/mnist

Sized for two CPU cores. The network says which of 16 cells of grey levels a pixel is in (chosen from the training
histogram; inside a cell the model is uniform) and is conditioned smoothly on log-SNR. docs/results.md has its numbers.
"""

import math

from ml_collections import ConfigDict

from configs.common import defaults


def get_config(mode: str = "full") -> ConfigDict:
    """Return the configuration; "smoke" is a narrower network, trained and evaluated for seconds."""
    c = defaults()
    c.data.name = "mnist"
    c.data.train = "train[:55000]"
    c.data.validation = "train[55000:]"
    c.process.name = "SubVP"
    c.network.name = "transformer"
    c.network.options = ConfigDict({"width": 160, "depth": 5, "heads": 5, "patch": 4})
    c.network.precondition = "levels"
    c.network.cells = 16
    c.network.predict = "eps"
    c.loss.weight.name = "likelihood"
    c.loss.times.name = "log_normal"
    c.loss.times.options = ConfigDict({"mean": math.log(0.6), "std": 1.4, "uniform": 0.15})
    c.optimiser.learning_rate = 2e-3
    c.optimiser.warmup = 300
    c.optimiser.cosine = True
    c.optimiser.b2 = 0.99
    c.training.steps = 3000
    c.training.ema_decay = 0.999
    c.training.validate_every = 1000
    c.training.checkpoint_every = 500
    c.training.keep = 10
    c.likelihood.variable = "asinh"
    c.likelihood.rtol = c.likelihood.atol = 1e-3
    c.sampling.grid = "uniform_log_snr"
    c.sampling.steps = 50
    if mode == "smoke":
        c.data.train, c.data.validation = "train[:256]", "train[256:512]"
        c.network.options = ConfigDict({"width": 16, "depth": 1, "heads": 2, "patch": 4})
        c.training.steps = 4
        c.training.batch_size = 8
        c.training.log_every = c.training.validate_every = c.training.checkpoint_every = 2
        c.optimiser.warmup = 1
        c.likelihood.images = c.likelihood.batch_size = 4
        c.likelihood.rtol = c.likelihood.atol = 1e-1
        c.sampling.steps = 4
        c.sampling.number = c.sampling.batch_size = 4
    return c
