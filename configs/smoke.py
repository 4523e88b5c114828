"""Every part of a run in seconds: a tiny DDPM++ on the 8x8 digits.

    python -m experiments.train --config configs/smoke.py --workdir runs/smoke

Nothing is expected of its numbers but that they are finite.
"""

from ml_collections import ConfigDict

from configs.common import defaults


def get_config(mode: str = "full") -> ConfigDict:
    """Return the configuration; both modes are the same size here."""
    c = defaults()
    c.data.name = "digits"
    c.data.validation = "validation"
    c.network.name = "ddpmpp"
    c.network.options = ConfigDict({"size": "small", "channels": 8, "multipliers": (1, 2), "blocks": 1})
    c.network.precondition = "scalar"
    c.loss.weight.name = "likelihood"
    c.loss.times.name = "importance"
    c.optimiser.learning_rate = 1e-3
    c.training.steps = 20
    c.training.batch_size = 16
    c.training.log_every = 5
    c.training.validate_every = 10
    c.training.checkpoint_every = 10
    c.likelihood.images = 16
    c.likelihood.batch_size = 16
    c.likelihood.rtol = c.likelihood.atol = 1e-2
    c.sampling.solver = "dpmpp_2m"
    c.sampling.grid = "uniform_log_snr"
    c.sampling.steps = 5
    c.sampling.number = c.sampling.batch_size = 8
    return c
