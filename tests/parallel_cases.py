"""What the tests of the mappings share: a small loss, its batches, and the unmapped step's results."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jdiff import training

BATCH, DIM, HIDDEN, STEPS = 16, 5, 8, 4
KEY = jax.random.key(3)
TRANSFORMS = {"sgd": (optax.sgd(0.1), 1e-6), "adam": (training.adam(1e-2, clip=1.0), 1e-5)}


def loss_fn(params, keys, batch):
    """A small denoising loss: noise, times and dropout come from the example's key, one offset from the batch's."""
    offset = jax.random.uniform(batch["key"])

    def one(key, x):
        draws = jax.random.normal(key, (DIM + 1 + HIDDEN,))  # one draw: compiling more of them is what costs
        eps, t, drop = draws[:DIM], jax.nn.sigmoid(draws[DIM] + offset), draws[DIM + 1 :] > 1
        hidden = jnp.where(drop, 0.0, jnp.tanh((x + t * eps) @ params["w1"] + params["b1"]))
        return jnp.mean((hidden @ params["w2"] - eps) ** 2), t

    loss, t = jax.vmap(one)(keys, batch["x"])
    return loss, {"t": t, "constant": jnp.float32(2.5)}


def start():
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape).astype(np.float32) / 2)
    return {"w1": draw(DIM, HIDDEN), "b1": draw(HIDDEN), "w2": draw(HIDDEN, DIM)}


def batches():
    rng = np.random.default_rng(2)
    for _ in range(STEPS):
        yield {"x": rng.normal(size=(BATCH, DIM)).astype(np.float32), "index": np.arange(BATCH)}


@functools.cache
def reference(name):
    """State and metrics of the unmapped step on one device; once a process."""
    tx, _ = TRANSFORMS[name]
    step = jax.jit(training.make_train_step(loss_fn, tx, ema_decay=0.99))
    state, metrics = training.init_state(start(), tx), []
    for batch in batches():
        state, found = step(state, KEY, batch)
        metrics.append(found)
    return state, metrics
