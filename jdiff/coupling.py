"""Which noise goes with which example: a coupling of a batch of data with a batch of noise.

Here example i does not depend on its key alone, as it does everywhere else in the library: its noise is chosen among
those of its group. That is the purpose, and it is why groups are explicit: of a fixed size they are the same for every
number of devices, as long as no group is cut.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from jdiff._array import check_array, check_count, check_integers, check_like, coefficient_dtype
from jdiff._typing import Array

__all__ = ["optimal_transport"]


def optimal_transport(x0: Array, x1: Array, *, labels: Array | None = None, group: int | None = None) -> Array:
    """Return the permutation p with the least sum_i |x0_i - x1_(p_i)|^2 within each group of neighbours.

    Minibatch optimal transport, Tong et al. 2023 (arXiv 2302.00482), section 3.2 (Pooladian et al. 2023, arXiv
    2304.14772): flow matching on the pairs (x0, x1[p]) has straighter paths, exact optimal transport as groups grow.
    Marginals are those of x0 and x1 still, but given x0's label those of x1[p] are not: with `labels`, partners are
    exchanged among examples of one label only, so that a conditional flow starts from unbiased noise too. The
    assignment is found by optax's Hungarian algorithm, of cubic cost in the group; no gradient flows through it.

    Args:
      x0: data, shape (batch, *event).
      x1: their independent partners, of the same shape; partner i was drawn for example i.
      labels: integers, shape (batch,).
      group: examples in a group, a divisor of batch (default: the whole batch).

    Returns:
      Integers, shape (batch,).

    Raises:
      ValueError: shapes that disagree, a group that does not divide the batch.
      TypeError: x0 or x1 not floating point, labels or group not integer.
    """
    batch = check_array(x0, "x0")
    check_like(x1, x0, "x1", "x0")
    if labels is not None:
        check_integers(labels, "labels")
        if labels.shape != (batch,):
            raise ValueError(f"labels must have shape ({batch},), got {labels.shape}")
    group = batch if group is None else group
    check_count(group, "group")
    if batch % group:
        raise ValueError(f"group must divide the batch of {batch}, got {group}")
    if labels is None:
        labels = jnp.zeros(batch, jnp.int32)
    split = lambda a: jax.lax.stop_gradient(a).reshape(batch // group, group, -1)
    partners = jax.vmap(_assign)(split(x0), split(x1), split(labels)[..., 0])
    return (partners + group * jnp.arange(batch // group, dtype=partners.dtype)[:, None]).reshape(batch)


def _assign(x0, x1, labels):
    # |x0|^2 and |x1|^2 sum to the same for all permutations.
    cost = -jnp.matmul(x1, x0.T, precision="highest").astype(coefficient_dtype(x0))
    # More than any permutation can save: those without a change of label, such as the identity, win.
    forbidden = 2 * len(x0) * jnp.max(jnp.abs(cost)) + 1
    cost = cost + jnp.where(labels[:, None] == labels[None], 0, forbidden)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        rows, columns = optax.assignment.hungarian_algorithm(cost)
    return jnp.zeros_like(rows).at[columns].set(rows)
