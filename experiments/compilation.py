"""What XLA is told when the scripts compile on a CPU; the library itself tells it nothing."""

from __future__ import annotations

import functools

import jax

# The default schedule hoists work for concurrency: half as much memory again, no faster (docs/results.md).
LEAN = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
# Products and convolutions by YNNPACK: the same numbers up to rounding, sooner (docs/results.md).
FAST = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT"}


@functools.cache
def compiler_options() -> dict[str, str] | None:
    """Return the options of `jax.jit` for training and evaluation: None but on a CPU, where XLA must know them."""
    if jax.default_backend() != "cpu":
        return None
    options = {}
    for group in (LEAN, FAST):
        try:
            jax.jit(lambda x: x, compiler_options=group).lower(0.0).compile()
        except jax.errors.JaxRuntimeError:
            continue  # an experimental option of another version of XLA
        options |= group
    return options
