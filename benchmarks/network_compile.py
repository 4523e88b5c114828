"""Trace, compile, memory and time of the published DDPM++ sizes at batch 4: forward, jvp and training gradient.

    python -m benchmarks.network_compile [--size full deep] [--repeats 3]

The reference's network compiled the plain way on two quiet cores of the same kind of machine: forward 1.7 + 5.4 s
(trace + compile), jvp 2.6 + 15.5 s, training gradient 7.5 + 45.8 s, 245 GFLOP and 537 MB of temporaries.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import platform
import statistics
import time

import jax
import jax.numpy as jnp

from experiments.compilation import compiler_options
from jdiff import nn

BATCH = 4


def main() -> None:
    """Measure and print; JSON goes to benchmarks/out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", nargs="+", default=["full", "deep"], choices=["full", "deep"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", default="benchmarks/out")
    options = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    rows = [row for size in options.size for row in measure(size, options.repeats)]
    folder = pathlib.Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    result = {"batch": BATCH, "device": jax.devices()[0].device_kind, "platform": platform.platform(), "rows": rows}
    (folder / "network_compile.json").write_text(json.dumps(result, indent=2) + "\n")


def measure(size: str, repeats: int) -> list[dict]:
    """Return one row per function of a published size."""
    module = nn.ddpmpp(lambda t: 999 * t, size=size, embedding="positional")
    x, t = jnp.ones((BATCH, 32, 32, 3)), jnp.full((BATCH,), 0.5)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x, t)["params"])
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 1e-3, leaf.dtype), shapes)
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))

    def forward(params, x, t):
        return module.apply({"params": params}, x, t)

    def jvp(params, x, t):
        return jax.jvp(lambda x: forward(params, x, t), (x,), (jnp.ones_like(x),))

    def gradient(params, x, t):
        def loss(params):
            rngs = {"dropout": jax.random.key(1)}
            return jnp.mean(module.apply({"params": params}, x, t, train=True, rngs=rngs) ** 2)

        return jax.value_and_grad(loss)(params)

    rows = []
    ours = compiler_options()  # as the scripts compile
    cases = (
        ("forward", forward, ours),
        ("jvp", jvp, ours),
        ("gradient", gradient, ours),
        ("forward, default options", forward, None),
        ("jvp, default options", jvp, None),
        ("gradient, default options", gradient, None),
    )
    for name, function, options in cases:
        start, busy = time.perf_counter(), time.process_time()
        lowered = jax.jit(function).lower(params, x, t)
        traced = time.perf_counter()
        compiled = lowered.compile(options)
        done, busy = time.perf_counter(), time.process_time() - busy
        jax.block_until_ready(compiled(params, x, t))
        row = {
            "size": size,
            "parameters": count,
            "function": name,
            "trace_seconds": traced - start,
            "compile_seconds": done - traced,
            "cpu_seconds": busy,
            "temporaries_megabytes": compiled.memory_analysis().temp_size_in_bytes / 1e6,
            "gigaflop": compiled.cost_analysis()["flops"] / 1e9,
            "seconds": statistics.median(_once(compiled, params, x, t) for _ in range(repeats)),
        }
        print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
        rows.append(row)
    return rows


def _once(function, *arguments):
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
