"""The demo: a small transformer over levels on scikit-learn's 8x8 digits, VP process, trained for likelihood.

    python -m experiments.train --config configs/digits.py --workdir runs/digits
    python -m experiments.likelihood --workdir runs/digits
    python -m experiments.sample --workdir runs/digits --solver predictor_corrector --steps 200

`make demo` runs all three and writes report.html.
"""

import math

from ml_collections import ConfigDict

from configs.common import defaults


def get_config(mode: str = "full") -> ConfigDict:
    """Return the configuration; "smoke" is the same model, trained and evaluated for seconds."""
    c = defaults()
    c.data.name = "digits"
    c.data.validation = "validation"
    c.network.name = "transformer"
    c.network.options = ConfigDict({"width": 96, "depth": 3, "heads": 4, "patch": 2, "dropout": 0.1})
    c.network.conditional = True
    c.network.precondition = "levels"
    c.network.predict = "eps"
    c.loss.weight.name = "likelihood"
    c.loss.label_dropout = 0.5  # likelihoods are unconditional, samples are drawn by class
    c.loss.times.name = "log_normal"
    c.loss.times.options = ConfigDict({"mean": math.log(0.4), "std": 1.2, "uniform": 0.1})
    c.optimiser.learning_rate = 3e-3
    c.optimiser.warmup = 100
    c.optimiser.cosine = True
    c.optimiser.b2 = 0.99
    c.training.steps = 2000
    c.training.batch_size = 64
    c.training.ema_decay = 0.998
    c.training.log_every = 50
    c.training.validate_every = 500
    c.training.checkpoint_every = 500
    c.likelihood.variable = "asinh"
    c.likelihood.draws = 2
    c.likelihood.batch_size = 149  # two batches make the 297 test images
    c.sampling.solver = "heun"
    c.sampling.grid = "uniform_log_snr"
    c.sampling.steps = 40
    c.sampling.number = c.sampling.batch_size = 100
    c.sampling.label = "cycle"
    c.sampling.guidance = 1.5
    if mode == "smoke":
        c.training.steps = 4
        c.optimiser.warmup = 1
        c.training.log_every = c.training.validate_every = c.training.checkpoint_every = 2
        c.likelihood.images = c.likelihood.batch_size = 8
        c.likelihood.draws = 1
        c.likelihood.rtol = c.likelihood.atol = 1e-2
        c.sampling.steps = 4
        c.sampling.number = c.sampling.batch_size = 8
    return c
