"""Group normalisation by `jdiff.nn` over the same from centred values, as it is usually written: CPU time.

    python -m benchmarks.group_norm [--repeats 15]

Forward, forward derivative, and forward with backward, at the sizes of the MNIST U-Net. Least CPU time of all threads,
which other processes disturb less than they do the clock.
"""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp

from benchmarks import common
from experiments.compilation import compiler_options
from jdiff.nn.normalisation import GroupNorm

_SHAPES = ((32, 28, 28, 64), (32, 14, 14, 128), (32, 7, 7, 192))


def _plain(params, x, groups):
    grouped = x.reshape(len(x), -1, groups, x.shape[-1] // groups)
    centred = grouped - grouped.mean(axis=(1, 3), keepdims=True)
    variance = jnp.square(centred).mean(axis=(1, 3), keepdims=True)
    return (centred * jax.lax.rsqrt(variance + 1e-6)).reshape(x.shape) * params["scale"] + params["bias"]


def main() -> None:
    """Measure, write JSON."""
    parser = common.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    options = common.parse(parser)
    rows = []
    for shape in _SHAPES:
        x, tangent = (jax.random.normal(jax.random.key(n), shape) for n in range(2))
        groups = min(shape[-1] // 4, 32)
        module = GroupNorm(groups)
        params = module.init(jax.random.key(0), x)["params"]
        row = {"shape": shape}
        for name, norm in (
            ("plain", lambda p, x, groups=groups: _plain(p, x, groups)),
            ("ours", lambda p, x, module=module: module.apply({"params": p}, x)),
        ):
            programs = {
                "forward": lambda p, x, g, norm=norm: norm(p, x),
                "jvp": lambda p, x, g, norm=norm: jax.jvp(lambda x: norm(p, x), (x,), (g,)),
                "backward": lambda p, x, g, norm=norm: jax.vjp(norm, p, x)[1](g),
            }
            for kind, program in programs.items():
                row[f"{kind}_{name}_ms"] = _cpu_time(program, (params, x, tangent), options.repeats)
        rows.append(row)
        print(row, flush=True)
    common.write(options, "group_norm", {"rows": rows})


def _cpu_time(program, args, repeats):
    compiled = jax.jit(program, compiler_options=compiler_options("ddpmpp")).lower(*args).compile()
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        jax.block_until_ready(compiled(*args))
        times.append(time.process_time() - start)
    return min(times) * 1e3


if __name__ == "__main__":
    main()
