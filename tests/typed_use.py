"""Not a test to run: what a user's type checker says of the library, checked by mypy in `make lint`."""

import jax
import jax.numpy as jnp

import jdiff
from jdiff import nn, training

process: jdiff.Process = jdiff.VP(beta_min=0.2)
field = nn.as_field(nn.ddpmpp(lambda t: 999 * t, size="small", dtype=jnp.bfloat16), {}, cond=jnp.zeros(4, int))
flow = jdiff.probability_flow(jdiff.EDM(sigma_max=10.0), field, predict="eps")
ts = jdiff.times.karras(process, 8)
x: jax.Array = jdiff.sample(jax.random.key(0), process, jdiff.solvers.heun(flow), (4, 8), ts)
_, path = jdiff.sample(jax.random.key(0), process, jdiff.solvers.heun(flow), (4, 8), ts, path=True)
log_prob: jax.Array = jdiff.log_likelihood(jax.random.key(1), process, field, x, variable="log_snr").log_prob
step = training.make_train_step(lambda params, keys, batch: (batch["image"], {}), training.adam(1e-3), ema_decay=0.9)

jdiff.convert(process, x, x, jnp.ones(4), "x0", "noise")  # type: ignore[arg-type]  # not a kind
jdiff.VP(sigma_min=0.1)  # type: ignore[call-arg]  # not VP's
