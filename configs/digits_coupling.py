"""The discrete yardstick of the flows: a small Real NVP on the 8x8 digits, by maximum likelihood.

    python -m experiments.train --config configs/digits_coupling.py --workdir runs/digits_coupling
    python -m experiments.likelihood --workdir runs/digits_coupling
    python -m experiments.sample --workdir runs/digits_coupling

Its density is exact: no solver and no probes. Half a minute of one shared core, then 2.099 +- 0.017
bits/dim; docs/results.md has the other families beside it.
"""

from ml_collections import ConfigDict

from configs.common import defaults


def get_config(mode: str = "full") -> ConfigDict:
    """Return the configuration; "smoke" is a smaller flow, trained and evaluated for seconds."""
    c = defaults()
    c.data.name = "digits"
    c.data.validation = "validation"
    c.data.logit = True
    c.process.name = "Rectified"  # its prior, N(0, I)
    c.network.name = "coupling"
    c.network.options = ConfigDict({"depth": 8, "width": 128, "dropout": 0.2})
    c.network.precondition = "pixel"
    c.network.predict = "velocity"
    c.loss.name = "maximum_likelihood"
    c.optimiser.learning_rate = 1e-3
    c.optimiser.warmup = 100
    c.optimiser.cosine = True
    c.optimiser.b2 = 0.99
    c.optimiser.weight_decay = 1e-2
    c.training.steps = 1500
    c.training.batch_size = 64
    c.training.ema_decay = 0.998
    c.training.log_every = 100
    c.training.validate_every = 500
    c.likelihood.divergence = "exact"
    c.likelihood.draws = 2
    c.likelihood.batch_size = 149
    c.likelihood.tolerance_images = 0  # there is no solver
    c.sampling.number = c.sampling.batch_size = 100
    if mode == "smoke":
        c.network.options = ConfigDict({"depth": 2, "width": 16, "dropout": 0.1})
        c.training.steps = 4
        c.training.batch_size = 8
        c.optimiser.warmup = 1
        c.training.log_every = c.training.validate_every = c.training.checkpoint_every = 2
        c.likelihood.images = c.likelihood.batch_size = 8
        c.likelihood.draws = 1
        c.sampling.number = c.sampling.batch_size = 8
    return c
