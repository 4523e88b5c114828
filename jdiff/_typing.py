"""The types every room speaks: arrays, keys, fields, prediction kinds and processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, runtime_checkable

import jax

Array = jax.Array
Key = jax.Array
PyTree = Any
Field = Callable[[PyTree, Array], PyTree]
Kind = Literal["x0", "eps", "v", "score", "velocity"]
KINDS: tuple[str, ...] = get_args(Kind)


@runtime_checkable
class Process(Protocol):
    """A Gaussian forward process, p(x_t | x_0) = N(alpha_t x_0, sigma_t^2 I), for t in [0, t_max].

    `marginal` is the one method to write; it is elementwise in t and keeps t's shape and dtype. `t_min` is where
    sampling ends and likelihoods are evaluated by default. Optional: an attribute `prior_std` (default sigma(t_max))
    and a method `time_at(log_snr)`, the inverse of log alpha^2/sigma^2 (default: bisection).
    """

    # Read only for a type checker, as fields of frozen dataclasses are; a class that inherits may set them.
    if TYPE_CHECKING:

        @property
        def t_min(self) -> float:
            """Where sampling ends."""
            ...

        @property
        def t_max(self) -> float:
            """The end of time, pure noise."""
            ...

    else:
        t_min: float
        t_max: float

    def marginal(self, t: Array) -> tuple[Array, Array]:
        """Return alpha(t), sigma(t)."""
        ...
