"""A classifier of noisy MNIST digits, p(y | x_t) along the rectified flow: what classifier guidance follows.

    TFDS_DATA_DIR=... python -m experiments.train --config configs/mnist_classifier.py --workdir runs/mnist_classifier
    TFDS_DATA_DIR=... python -m experiments.classify --workdir runs/mnist_classifier

The smallest network of the family of the 2021 reference's classifier (Song et al. 2021, arXiv 2011.13456, appendix
I.1), on the data and the process of configs/mnist_flow.py, sized for one CPU core: six minutes on a shared one, then
97.0 % of the test images at t = 0, 94.6 % at 0.5, 47.1 % at 0.8 (docs/conditioning.md has the table).
"""

from ml_collections import ConfigDict

from configs.common import defaults


def get_config(mode: str = "full") -> ConfigDict:
    """Return the configuration; "smoke" is trained and evaluated for seconds."""
    c = defaults()
    c.data.name = "mnist"
    c.data.train = "train[:55000]"
    c.data.validation = "train[55000:]"
    c.process.name = "Rectified"
    c.network.name = "wide_resnet"
    c.network.options = ConfigDict({"depth": 10, "widen": 1, "patch": 2, "embedding": "smooth", "features": 32})
    c.loss.name = "classifier"
    c.optimiser.learning_rate = 3e-3
    c.optimiser.warmup = 50
    c.optimiser.cosine = True
    c.optimiser.b2 = 0.99
    c.training.steps = 800
    c.training.ema_decay = 0.99
    c.training.validate_every = 200
    c.training.checkpoint_every = 400
    if mode == "smoke":
        c.data.train, c.data.validation, c.data.test = "train[:256]", "train[256:512]", "test[:64]"
        c.training.steps = 4
        c.training.batch_size = 8
        c.training.log_every = c.training.validate_every = c.training.checkpoint_every = 2
        c.optimiser.warmup = 1
    return c
