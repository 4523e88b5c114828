"""Train, sample, evaluate with the library alone: `python examples/minimal.py`, in a minute."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np

import jdiff
from jdiff import analytic, losses, nn, processes, solvers, times, training

STEPS, BATCH, TEST = (20, 64, 32) if "--small" in sys.argv else (4000, 256, 2000)

# The data: eight Gaussians on a ring, so that the true density is there to compare with.
process = jdiff.VP()
angles = jnp.arange(8.0) * (jnp.pi / 4)
ring = analytic.gaussian_mixture(process, jnp.ones(8), jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1), 0.1)

# The network: any function of (parameters, x, t). Here it predicts v, one of the five kinds.
net = nn.ResidualMLP(functools.partial(processes.log_snr, process), width=64, depth=3, dropout=0.0)


def field_of(params):
    """Parameters -> field; input and target have unit variance for data of this standard deviation."""
    return jdiff.precondition(process, nn.as_field(net, params), 0.7, predict="v")


def loss(params, keys, batch):
    """One loss per example; keys are one per example, batch["key"] is common to the step."""
    t, _ = times.stratified(batch["key"], process, batch["index"], BATCH)
    return losses.denoising(keys, field_of(params), process, batch["x"], t, predict="v"), {}


@jax.jit
def draw(params, key):
    """4,000 samples by 40 steps of the probability flow."""
    flow = jdiff.probability_flow(process, field_of(params), predict="v")
    return jdiff.sample(key, process, solvers.heun(flow), (2 * TEST, 2), times.karras(process, 40))


@jax.jit
def log_prob(params, x):
    """The model's exact log-density of each point, in nats."""
    return jdiff.log_likelihood(
        None, process, field_of(params), x, predict="v", divergence="exact", rtol=1e-4, atol=1e-4
    ).log_prob


tx = training.adam(training.learning_rate(2e-3, warmup=100, total=STEPS + 100))
state = training.init_state(jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, 2)), jnp.ones(1))["params"], tx)
step = jax.jit(training.make_train_step(loss, tx, ema_decay=0.999), donate_argnums=0)
data = np.asarray(ring.sample(jax.random.key(1), 50_000))
rng = np.random.default_rng(0)
for n in range(STEPS):
    batch = {"x": data[rng.integers(len(data), size=BATCH)], "index": np.arange(BATCH)}
    state, metrics = step(state, jax.random.key(2), batch)
    if n % 500 == 0:
        print(f"step {n}: loss {metrics['loss']:.3f}")

samples, test = draw(state.ema, jax.random.key(3)), ring.sample(jax.random.key(4), TEST)
true = jax.jit(lambda x: ring.log_prob(x, process.t_min))
print(
    f"new points:     {jnp.mean(log_prob(state.ema, test)):.3f} nats by the model, {jnp.mean(true(test)):.3f} in truth"
)
print(f"model's samples: {jnp.mean(true(samples)):.3f} nats in truth")
