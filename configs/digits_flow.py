"""A class-conditional rectified flow on scikit-learn's 8x8 digits, in a minute or two: to be straightened by reflow.

    python -m experiments.train --config configs/digits_flow.py --workdir runs/digits_flow
    python -m experiments.reflow --workdir runs/digits_flow --workdir_out runs/digits_reflow --pairs 4000

Flow matching (Liu et al. 2022, arXiv 2209.03003) with the patch transformer; 2.123 +- 0.014 bits/dim (docs/results.md).
docs/flows.md has what reflow makes of it.
"""

from ml_collections import ConfigDict

from configs.common import defaults


def get_config(mode: str = "full") -> ConfigDict:
    """Return the configuration; "smoke" is a narrower network, trained and evaluated for seconds."""
    c = defaults()
    c.data.name = "digits"
    c.data.validation = "validation"
    c.process.name = "Rectified"
    c.network.name = "transformer"
    c.network.options = ConfigDict({"width": 64, "depth": 3, "heads": 4, "patch": 2})
    c.network.conditional = True
    c.network.precondition = "scalar"
    c.network.predict = "velocity"
    c.loss.label_dropout = 0.2
    c.optimiser.learning_rate = 3e-3
    c.optimiser.warmup = 100
    c.optimiser.cosine = True
    c.optimiser.b2 = 0.99
    c.training.steps = 1500
    c.training.batch_size = 64
    c.training.ema_decay = 0.998
    c.training.validate_every = c.training.checkpoint_every = 500
    c.likelihood.variable = "angle"
    c.likelihood.rtol = c.likelihood.atol = 1e-3
    c.sampling.solver = "heun"
    c.sampling.grid = "linear"
    c.sampling.steps = 32
    c.sampling.number = c.sampling.batch_size = 250
    c.sampling.label = "cycle"
    if mode == "smoke":
        c.network.options = ConfigDict({"width": 16, "depth": 1, "heads": 2, "patch": 4})
        c.training.steps = 4
        c.training.batch_size = 8
        c.training.log_every = c.training.validate_every = c.training.checkpoint_every = 2
        c.optimiser.warmup = 1
        c.likelihood.images = c.likelihood.batch_size = 4
        c.likelihood.rtol = c.likelihood.atol = 1e-1
        c.sampling.steps = 4
        c.sampling.number = c.sampling.batch_size = 8
    return c
