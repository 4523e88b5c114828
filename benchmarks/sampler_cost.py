"""What a sampler costs beyond its network: time, compile time and memory.

    python -m benchmarks.sampler_cost [--workdir runs/digits] [--batch 64] [--repeats 15]

Time: 20 solver steps over a `lax.scan` of 20 bare network calls (goal: at most 1.05), from the same state on the same
times, in one jitted call. Compile time: 1,000 steps over 20 (goal: 1). Memory, by XLA's own analysis at a batch of 256
with the initial state donated, to the sampler as to the network: what the one needs beyond one call of the other, in
copies of the state (goal: at most 3, the same for 20 and 1,000 steps), and with the path kept.
"""

from __future__ import annotations

import statistics
import time

import jax
import jax.numpy as jnp

from benchmarks import common
from experiments import samplers
from experiments.compilation import compiler_options
from jdiff import solvers, times

STEPS, LARGE = 20, 256
SOLVERS = {
    "ddim": lambda p, d: solvers.ddim(p, d),
    "dpmpp_2m": lambda p, d: solvers.dpmpp_2m(p, d),
    "dpmpp_3m": lambda p, d: solvers.dpmpp_3m(p, d),
    "ancestral": lambda p, d: solvers.ancestral(p, d),
}


def main() -> None:
    """Measure all solvers, write JSON."""
    parser = common.parser(__doc__)
    parser.add_argument("--workdir", default="runs/digits")
    parser.add_argument("--batch", type=int, default=64, help="of the timing")
    parser.add_argument("--repeats", type=int, default=15)
    options = common.parse(parser)
    jax.config.update("jax_enable_compilation_cache", False)
    config, process, field, trained, source = common.trained_model(options.workdir)
    compiler = compiler_options()
    state = lambda batch: jax.random.normal(jax.random.key(0), (batch, *source.shape))
    grid = lambda steps: times.uniform_log_snr(process, steps)

    def sampler(make, path=False):
        def call(params, key, x, ts):
            denoise = samplers.denoiser(config, field(params))
            return solvers.integrate(key, make(process, denoise), x, ts, path=path)

        return call

    def network(params, x, t):
        return field(params)(x, jnp.full(len(x), t))

    def compiled(function, *args, donate=()):
        start = time.perf_counter()
        program = jax.jit(function, donate_argnums=donate, compiler_options=compiler).lower(*args).compile()
        return program, time.perf_counter() - start

    key, x, ts = jax.random.key(1), state(options.batch), grid(STEPS)
    bare = lambda params, x: jax.lax.scan(lambda x, t: (network(params, x, t), None), x, ts[:-1])[0]
    bare_program, _ = compiled(bare, trained.params, x)
    large = state(LARGE)
    alone, _ = compiled(network, trained.params, large, ts[0], donate=1)
    copies = lambda program: (_bytes(program) - _bytes(alone)) / large.nbytes
    result = {}
    for name, make in SOLVERS.items():
        program, _ = compiled(sampler(make), trained.params, key, x, ts)
        row = common.ratio(
            lambda program=program: program(trained.params, key, x, ts),
            lambda: bare_program(trained.params, x),
            repeats=options.repeats,
        )
        lengths = {
            steps: statistics.median(compiled(sampler(make), trained.params, key, x, grid(steps))[1] for _ in range(3))
            for steps in (STEPS, 1000)
        }
        row |= {"compile_seconds": lengths[STEPS], "compile_ratio_1000_steps": lengths[1000] / lengths[STEPS]}
        for label, steps, path in (("20", 20, False), ("1000", 1000, False), ("100_with_path", 100, True)):
            program, _ = compiled(sampler(make, path), trained.params, key, large, grid(steps), donate=2)
            row[f"copies_{label}"] = copies(program)
        result[name] = row
        print(name, {k: round(v, 3) for k, v in row.items()}, flush=True)
    megabytes = {"state_megabytes": large.nbytes / 1e6, "network_megabytes": _bytes(alone) / 1e6}
    common.write(options, "sampler_cost", {"steps": STEPS, "batch": options.batch, **megabytes, **result})


def _bytes(program):
    """Temporaries and results; a donated argument's memory is not new."""
    found = program.memory_analysis()
    return found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes


if __name__ == "__main__":
    main()
