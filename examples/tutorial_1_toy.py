"""A toy in two dimensions.

From points to a model that draws new ones and says how likely each is: data, network, loss, training, two samplers, a
density, in less than a hundred lines, text included. The data are spread evenly over eight squares of a chessboard of
side 4, so that no model can have a mean log-density above -log 8 = -2.079 nats.
"""

# %%
import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jdiff
from jdiff import losses, nn, processes, solvers, times, training

SMALL = "--small" in sys.argv  # seconds, for the tests
STEPS, BATCH, POINTS, SIDE = (10, 64, 100, 10) if SMALL else (6000, 512, 8000, 120)
PICTURES = pathlib.Path("docs/images/tutorials")
PICTURES.mkdir(parents=True, exist_ok=True)
rng = np.random.default_rng(0)


def chessboard(n):
    """Return n points of the dark squares, shape (n, 2)."""
    column, row = rng.integers(4, size=n), rng.integers(2, size=n)
    corner = np.stack([column, 2 * row + column % 2], axis=1)
    return (corner + rng.uniform(size=(n, 2)) - 2).astype(np.float32)


# %% [markdown]
# A process says how data become noise: `Rectified` goes along straight lines, `x_t = (1 - t) x_0 + t eps`. The
# network sees `x_t` and `t` and predicts the velocity `eps - x_0`; its squared error is the whole of flow matching.
# Another process (`jdiff.VP()`) or kind (`predict="eps"`) is another word here, and nothing else changes.

# %%
process = jdiff.Rectified()
net = nn.ResidualMLP(functools.partial(processes.log_snr, process), width=128, depth=3, dropout=0.0)


def loss(params, keys, batch):
    """One loss per example, from a key per example."""
    t, _ = times.stratified(batch["key"], process, batch["index"], BATCH)
    return losses.denoising(keys, nn.as_field(net, params), process, batch["x"], t, predict="velocity"), {}


tx = training.adam(training.learning_rate(2e-3, warmup=100, total=STEPS + 100))
state = training.init_state(net.init(jax.random.key(0), jnp.zeros((1, 2)), jnp.ones(1))["params"], tx)
step = jax.jit(training.make_train_step(loss, tx, ema_decay=0.999), donate_argnums=0)
for _ in range(STEPS):
    state, metrics = step(state, jax.random.key(1), {"x": chessboard(BATCH), "index": np.arange(BATCH)})
print(f"loss {metrics['loss']:.3f}")

# %% [markdown]
# One field, three uses. The probability flow carries noise to data without chance; the reverse SDE arrives at the
# same distribution with noise on the way; and the divergence of the flow, integrated along it, is the log-density.


# %%
@jax.jit
def use(params, key, x):
    """Return samples of the flow and their path, samples of the SDE, and the log-density of x."""
    field = nn.as_field(net, params)
    flow = jdiff.probability_flow(process, field, predict="velocity")
    sde = jdiff.reverse(process, field, predict="velocity")
    drawn = jdiff.sample(key, process, solvers.heun(flow), (POINTS, 2), times.linear(process, 40), path=True)
    noisy = jdiff.sample(key, process, solvers.euler_maruyama(sde), (POINTS, 2), times.linear(process, 200))
    exact = jdiff.log_likelihood(None, process, field, x, predict="velocity", divergence="exact", rtol=1e-4, atol=1e-4)
    return drawn, noisy, exact.log_prob


axis = np.linspace(-2.5, 2.5, SIDE, dtype=np.float32)
lattice, test = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2), chessboard(POINTS)
(drawn, path), noisy, log_prob = use(state.ema, jax.random.key(2), np.concatenate([lattice, test]))
of_test, density = np.asarray(log_prob[len(lattice) :]), np.exp(log_prob[: len(lattice)]).reshape(SIDE, SIDE)
print(f"log p of new points {of_test.mean():.3f} +- {of_test.std() / POINTS**0.5:.3f} nats, at best {-np.log(8):.3f}")
print(f"integral of p over the picture {density.sum() * (axis[1] - axis[0]) ** 2:.3f}")

# %%
figure, axes = plt.subplots(2, 4, figsize=(9, 4.6), layout="constrained")
panels = {"data": test, "the flow's samples": drawn, "the SDE's samples": noisy, "density": None}
panels |= {f"the flow at t = {t:g}": path[int(40 * (1 - t))] for t in (1, 0.75, 0.5, 0.25)}
for ax, (title, points) in zip(axes.flat, panels.items()):
    ax.set(title=title, xlim=(-2.5, 2.5), ylim=(-2.5, 2.5), xticks=[], yticks=[], aspect="equal")
    if points is None:
        ax.imshow(density, origin="lower", extent=(-2.5, 2.5, -2.5, 2.5))
    else:
        ax.plot(*np.asarray(points).T, ",", color="C0", alpha=0.6)
figure.savefig(PICTURES / "toy.png", dpi=80)

# %% [markdown]
# ![Data, samples of the flow and of the SDE, density; the flow at four times](../images/tutorials/toy.png)
