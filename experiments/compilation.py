"""What XLA is told when the scripts compile on a CPU; the library itself tells it nothing."""

from __future__ import annotations

import functools

import jax

# The default schedule hoists work for concurrency: half as much memory again, no faster (docs/results.md).
LEAN = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
# Products and convolutions by YNNPACK: the same numbers up to rounding, sooner (docs/results.md).
FAST = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT"}


# Nothing but products after products: YNNPACK makes one of them, which took up to 40 times longer (docs/results.md).
DENSE = ("mlp", "coupling")


def compiler_options(network: str = "") -> dict[str, str] | None:
    """Return the options of `jax.jit` for training and evaluation: None but on a CPU, where XLA must know them.

    Args:
      network: as config.network.name has it.
    """
    if jax.default_backend() != "cpu":
        return None
    options = {}
    for group in (LEAN, {} if network in DENSE else FAST):
        if _known(tuple(group.items())):
            options |= group
    return options


@functools.cache
def _known(group):
    try:
        jax.jit(lambda x: x, compiler_options=dict(group)).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return False  # an experimental option of another version of XLA
    return True
