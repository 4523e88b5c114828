"""Where the time of a training step goes: shares of its operations, from JAX's profiler.

    TFDS_DATA_DIR=... python -m benchmarks.step_profile [--config configs/mnist.py] [--batch 32]

Operations are grouped as the compiler names them (numbers dropped); the ten largest are listed, with where in the
program they mostly come from. On a CPU the events of the threads of XLA are added up, on an accelerator those of the
device; what XLA:CPU hands on to other threads (convolutions of oneDNN or Eigen) is seen only in part.
"""

from __future__ import annotations

import collections
import pathlib
import re
import tempfile

import jax

from benchmarks import common, step_cost

_STEPS, _SHOWN = 3, 10
_LINES = ("XLAEigen", "XLA Ops", "Stream")
_NO_WORK = ("Thunk", "end:", "SlinkyThreadPool::Await")


def main() -> None:
    """Measure, write JSON."""
    parser = common.parser(__doc__)
    parser.add_argument("--config", default="configs/mnist.py")
    parser.add_argument("--mode", choices=["full", "smoke"], default="full")
    parser.add_argument("--batch", type=int, help="images a step (default: training.batch_size)")
    parser.add_argument("--dtype", choices=step_cost.DTYPES, default="float32")
    options = common.parse(parser)
    call, _, _, text = step_cost.step(options, options.dtype, "none", 1)
    jax.block_until_ready(call())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(_STEPS):
                jax.block_until_ready(call())
        files = pathlib.Path(folder).rglob("*.xplane.pb")
        spent = _spent(jax.profiler.ProfileData.from_file(str(path)) for path in files)
    total, kinds, places = sum(spent.values()), collections.Counter(), collections.defaultdict(collections.Counter)
    sources = dict(re.findall(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name="([^"]*)"', text, re.MULTILINE))
    for name, time in spent.items():
        kind = re.sub(r"[.\d]+$", "", name)
        kinds[kind] += time
        places[kind][re.sub(r"_?\d+", "", sources.get(name, "?"))] += time
    rows = [
        {"operation": kind, "share": time / total, "mostly": places[kind].most_common(1)[0][0]}
        for kind, time in kinds.most_common(_SHOWN)
    ]
    common.write(
        options,
        "step_profile",
        {"config": options.config, "milliseconds_a_step_of_all_threads": total / _STEPS / 1e6, "rows": rows},
    )


def _spent(profiles):
    """Return nanoseconds by the name of the operation."""
    spent = collections.Counter()
    for line in (line for profile in profiles for plane in profile.planes for line in plane.lines):
        if any(part in line.name for part in _LINES):
            for event in line.events:
                if not event.name.startswith(_NO_WORK):
                    spent[event.name] += event.duration_ns
    return spent


if __name__ == "__main__":
    main()
