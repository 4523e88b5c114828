"""What the tests of the scripts share: a configuration that compiles in a second or two."""

import json

from configs import smoke
from experiments import checks, cli


def small_config(**changes):
    """A residual MLP of width 8 on the digits: compiles in a second or two."""
    config = smoke.get_config()
    for text in (
        "network.name=mlp",
        'network.options={"width": 8, "depth": 1}',
        "training.steps=10",
        "training.batch_size=8",
        "training.log_every=2",
        "training.validate_every=5",
        "training.checkpoint_every=5",
        "likelihood.images=12",
        "likelihood.batch_size=8",
        "sampling.solver=heun",
        "sampling.steps=3",
        *(f"{path.replace('__', '.')}={json.dumps(value)}" for path, value in changes.items()),
    ):
        cli.override(config, text)
    checks.check(config)
    return config
