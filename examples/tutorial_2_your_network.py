"""Your own network in these solvers.

The library never asks what a network is. A field is a function `(x, t) -> like x`, with `t` of shape `(batch,)`, and
that is all that losses, solvers and likelihoods see. This page writes the same small network in Flax Linen, Flax NNX
and Equinox, trains the three by one loss, and calls one sampler and one likelihood with each of them, and with a
closed form that is no network at all. The data have a known density, so that all four are compared with the truth.
"""

# %%
import functools
import itertools
import pathlib
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import linen, nnx

import jdiff
from jdiff import analytic, losses, metrics, processes, solvers, times, training

SMALL = "--small" in sys.argv  # seconds, for the tests
STEPS, BATCH, POINTS, SIDE = (5, 64, 64, 10) if SMALL else (3000, 256, 4000, 80)
PICTURES = pathlib.Path("docs/images/tutorials")
PICTURES.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## The data, and a closed form
#
# A mixture of three Gaussians. Under a Gaussian process it stays a mixture, so that its score is a formula at every
# `t`; `analytic` has it, and `truth.score` is a field like any other. Its parameters are an argument of what is
# compiled, as a network's are: nothing here is special to networks.

# %%
process = jdiff.VP()
WEIGHTS, STDS = np.float32([0.5, 0.3, 0.2]), np.float32([0.5, 0.35, 0.25])
MEANS = np.float32([[-1.2, -0.4], [1.0, 1.1], [0.9, -1.2]])
truth = analytic.gaussian_mixture(process, WEIGHTS, MEANS, STDS)


def closed_form(params, x, t):
    """The score of the mixture: parameters are its weights, means and standard deviations."""
    return analytic.gaussian_mixture(process, *params).score(x, t)


# %% [markdown]
# ## Three networks
#
# Each of them is two things: arrays, which are trained, and a function of the arrays, `x` and `t`. The three
# libraries differ in how one gets these two, and in nothing that matters afterwards. All see the same features: the
# point and the logarithm of the signal-to-noise ratio, smoothly (a network that oscillates in `t` makes the flow
# expensive to integrate).


# %%
def features(x, t):
    """(batch, 2), (batch,) -> (batch, 7)."""
    level = processes.log_snr(process, t)[:, None] / 8
    return jnp.concatenate([x, level, *(f(level * n) for f in (jnp.sin, jnp.cos) for n in (1, 2))], axis=1)


class LinenMLP(linen.Module):
    """Linen: parameters are made by `init` and passed to `apply`."""

    @linen.compact
    def __call__(self, x, t):
        """Predict v."""
        h = features(x, t)
        for _ in range(3):
            h = linen.swish(linen.Dense(128)(h))
        return linen.Dense(2)(h)


class NnxMLP(nnx.Module):
    """NNX: the module holds its parameters; `split` and `merge` take them out and put them back."""

    def __init__(self, rngs):
        sizes = [7, 128, 128, 128, 2]
        self.layers = nnx.List([nnx.Linear(m, n, rngs=rngs) for m, n in itertools.pairwise(sizes)])

    def __call__(self, x, t):
        """Predict v."""
        h = features(x, t)
        for layer in self.layers[:-1]:
            h = nnx.swish(layer(h))
        return self.layers[-1](h)


x, t = jnp.zeros((1, 2)), jnp.ones(1)

linen_params = LinenMLP().init(jax.random.key(0), x, t)
linen_apply = LinenMLP().apply

graph, nnx_params = nnx.split(NnxMLP(nnx.Rngs(params=jax.random.key(1))))
nnx_apply = lambda params, x, t: nnx.merge(graph, params)(x, t)

# Equinox: the module is a tree of parameters and of other things, and is written for one example.
module = eqx.nn.MLP(7, 2, 128, 3, activation=jax.nn.swish, key=jax.random.key(2))
eqx_params, static = eqx.partition(module, eqx.is_inexact_array)
eqx_apply = lambda params, x, t: jax.vmap(eqx.combine(params, static))(features(x, t))

# %% [markdown]
# ## One training step
#
# `make_train_step` knows of parameters that they are a tree of arrays, and of the loss that it gives one number per
# example. Example `i` of a batch has a key of its own; `batch["key"]` is one for the step, from which the times are
# drawn.


# %%
def train(apply, params, key):
    """Return averaged parameters of a network that predicts v."""

    def loss(params, keys, batch):
        t, _ = times.stratified(batch["key"], process, batch["index"], BATCH)
        field = lambda x, t: apply(params, x, t)
        return losses.denoising(keys, field, process, batch["x"], t, predict="v"), {}

    tx = training.adam(training.learning_rate(2e-3, warmup=100, total=STEPS + 100))
    state = training.init_state(params, tx)
    step = jax.jit(training.make_train_step(loss, tx, ema_decay=0.999), donate_argnums=0)
    data = np.asarray(truth.sample(jax.random.key(3), 100_000))
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        batch = {"x": data[rng.integers(len(data), size=BATCH)], "index": np.arange(BATCH)}
        state, _ = step(state, key, batch)
    return state.ema


# %% [markdown]
# ## One sampler, one likelihood
#
# What is compiled is a function of parameters and keys; the field is made inside, where the parameters are known.
# `predict` says which of the five kinds it is: the closed form is a score, the networks are `v`. The likelihood is
# that of the model at `t_min`, by the exact divergence (two derivatives in two dimensions). It is given the true
# density at `t_max` in the place of the usual N(0, I), so that the closed form has no error but the solver's.


# %%
@functools.partial(jax.jit, static_argnames=("apply", "predict"))
def use(apply, predict, params, key, x):
    """Return samples, the log-density of x, and the number of evaluations that each took."""
    field = lambda x, t: apply(params, x, t)
    flow = jdiff.probability_flow(process, field, predict=predict)
    samples = jdiff.sample(key, process, solvers.heun(flow), (POINTS, 2), times.karras(process, 40))
    exact = jdiff.log_likelihood(
        None, process, field, x, predict=predict, divergence="exact", prior_log_prob=lambda z: truth.log_prob(z, 1.0)
    )
    return samples, exact.log_prob, exact.evaluations


models = {
    "closed form": (closed_form, "score", (WEIGHTS, MEANS, STDS)),
    "Linen": (linen_apply, "v", train(linen_apply, linen_params, jax.random.key(4))),
    "NNX": (nnx_apply, "v", train(nnx_apply, nnx_params, jax.random.key(4))),
    "Equinox": (eqx_apply, "v", train(eqx_apply, eqx_params, jax.random.key(4))),
}

# %% [markdown]
# The model's mean log-density of new points falls short of the truth by the Kullback-Leibler divergence between the
# two, so that the difference, taken point by point, is the measure of a model; its error is the standard error over
# points. The energy distance is zero for samples of one distribution; it is estimated without bias, so that it may
# come out below zero, and two sets of true samples show how near to zero these numbers of points can tell.

# %%
axis = np.linspace(-3, 3, SIDE, dtype=np.float32)
lattice = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
test, other = truth.sample(jax.random.key(5), POINTS), truth.sample(jax.random.key(6), POINTS)
true = np.asarray(truth.log_prob(test, process.t_min))

print("               KL from the truth      energy distance   evaluations")
drawn, densities = {"true samples": other}, {"true samples": np.exp(truth.log_prob(lattice, process.t_min))}
print(f"{'true samples':14} {'':22} {metrics.energy_distance(other, test):.5f}")
for name, (apply, predict, params) in models.items():
    points = jnp.concatenate([test, lattice])
    drawn[name], log_prob, evaluations = use(apply, predict, params, jax.random.key(7), points)
    densities[name] = np.exp(log_prob[POINTS:])
    gap = true - np.asarray(log_prob[:POINTS])
    error = gap.std() / np.sqrt(POINTS)
    distance = metrics.energy_distance(drawn[name], test)
    print(f"{name:14} {gap.mean():9.2e} +- {error:7.1e}   {distance:.5f}           {evaluations[:POINTS].mean():.0f}")
    if name == "closed form":
        print(f"{'':14} largest error of a point {np.abs(gap).max():.1e} nats")

# %%
figure, axes = plt.subplots(2, 5, figsize=(10, 4.2), layout="constrained")
for column, name in zip(axes.T, drawn):
    column[0].plot(*np.asarray(drawn[name]).T, ",", alpha=0.6)
    column[1].imshow(densities[name].reshape(SIDE, SIDE), origin="lower", extent=(-3, 3, -3, 3), vmax=0.45)
    column[0].set_title(name)
    for ax in column:
        ax.set(xlim=(-3, 3), ylim=(-3, 3), xticks=[], yticks=[], aspect="equal")
axes[0, 0].set_ylabel("samples")
axes[1, 0].set_ylabel("density")
figure.savefig(PICTURES / "your_network.png", dpi=80)

# %% [markdown]
# ![Samples and densities of the truth, the closed form and three networks](../images/tutorials/your_network.png)
#
# The closed form differs from the truth by the solver's error alone (its tolerance is 1e-5 here). The networks lack a
# few hundredths of a nat, and the pictures show where: in bridges between the components. The three agree with each
# other, which is the point of this page.
#
# What a network must do: return the shape and dtype of `x` for any batch, treat every example by itself, and be
# smooth in `t` where likelihoods are wanted. What it need not: know of jdiff. The library's own networks (`jdiff.nn`)
# come through the same door by `nn.as_field`. Labels and other conditions are closed over: `lambda x, t:
# apply(params, x, t, label)`.
