"""A small convolutional classifier of MNIST whose last hidden layer gives the features of `benchmarks.pareto`."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jdiff import data

FEATURES = 64


class Classifier(nn.Module):
    """(batch, 28, 28, 1) in [0, 1] -> logits (batch, 10) and features (batch, 64)."""

    @nn.compact
    def __call__(self, x):
        """Return logits and features."""
        for width in (16, 32):
            x = nn.relu(nn.Conv(width, (5, 5), strides=2)(x))
        features = nn.relu(nn.Dense(FEATURES)(x.reshape(len(x), -1)))
        return nn.Dense(10)(features), features


def train(steps: int = 1500, batch: int = 128):
    """Return images, uint8 -> features, and the test accuracy, of a classifier trained now (see `fit`)."""
    apply, accuracy = fit(steps, batch)
    return lambda images: apply(images)[1], accuracy


def classifier(steps: int = 1500, batch: int = 128):
    """Return images, uint8 -> logits, and the test accuracy, of a classifier trained now (see `fit`)."""
    apply, accuracy = fit(steps, batch)
    return lambda images: apply(images)[0], accuracy


def fit(steps: int = 1500, batch: int = 128):
    """Train with noise of random strength on half of each batch; return images -> (logits, features), and accuracy.

    Generated images are never quite clean: a classifier that saw no noise would see little else in them.
    """
    module = Classifier()
    source, test = (data.load("mnist", split).arrays() for split in ("train", "test"))
    scaled = lambda images: jnp.asarray(images, jnp.float32) / 255
    params = module.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    tx = optax.adam(optax.cosine_decay_schedule(2e-3, steps))

    @jax.jit
    def step(carry, images, labels, key):
        params, state = carry

        def loss(params):
            strength, draw = jax.random.split(key)
            shape = (len(images), 1, 1, 1)
            strength = jax.random.uniform(strength, shape, maxval=0.3) * (jnp.arange(len(images)) % 2).reshape(shape)
            logits, _ = module.apply(params, images + strength * jax.random.normal(draw, images.shape))
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    rng, carry = np.random.default_rng(0), (params, tx.init(params))
    for n in range(steps):
        index = rng.integers(len(source["image"]), size=batch)
        carry = step(
            carry, scaled(source["image"][index]), jnp.asarray(source["label"][index], jnp.int32), jax.random.key(n)
        )
    apply = jax.jit(lambda images: module.apply(carry[0], images))
    right = np.mean(np.argmax(np.asarray(apply(scaled(test["image"]))[0]), axis=1) == test["label"])
    return lambda images: apply(scaled(images)), float(right)
