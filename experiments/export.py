"""Write the averaged parameters of a run to one safetensors file, which plain NumPy can read.

    python -m experiments.export --workdir RUN --out FILE.safetensors [--step N]

Tensors: `params/<path>`, the EMA, and `statistics/<name>`, what the field is preconditioned with. Metadata, each a JSON
text: `config`; `provenance`: step, versions and, of an imported checkpoint, its file's SHA-256.
"""

from __future__ import annotations

import argparse
import json
import pathlib

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from experiments import checks, cli, model, tensors
from experiments.artefacts import Run, read_json
from jdiff import data


def export(config: ConfigDict, run: Run, out: str, *, step: int | None = None) -> dict[str, np.ndarray]:
    """Write and return the tensors of the newest good checkpoint, or of that step.

    Raises:
      FileNotFoundError: no checkpoint in the folder, or no folder to write to.
      ValueError: the file would not end in .safetensors.
    """
    file = pathlib.Path(out).expanduser()
    if file.suffix != ".safetensors":
        raise ValueError(f"--out must end in .safetensors, got {out}")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {file.parent}")
    trained = model.load(
        config,
        run,
        data.load(config.data.name, config.data.train),
        step=step,
        classifier=config.loss.name == "classifier",
    )
    paths, _ = jax.tree_util.tree_flatten_with_path({"params": trained.params, "statistics": trained.statistics})
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in paths}
    records = {
        name: read_json(run / f"{name}.json") for name in ("versions", "import") if (run / f"{name}.json").exists()
    }
    provenance = {"step": trained.step, **records}
    tensors.write(file, flat, {"config": json.dumps(config.to_dict()), "provenance": json.dumps(provenance)})
    print(f"{file}: {sum(leaf.size for leaf in jax.tree.leaves(trained.params)):,} parameters of step {trained.step:,}")
    return flat


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="run folder")
    parser.add_argument("--out", required=True, help="file to write, .safetensors")
    parser.add_argument("--step", type=int, default=None, help="which checkpoint; left out: the newest")
    options = parser.parse_args()
    logging.set_verbosity(logging.ERROR)

    def run():
        folder = Run(options.workdir)
        config = cli.from_dict(folder.config())
        checks.check(config)
        export(config, folder, options.out, step=options.step)
        return 0

    return cli.exit_code(run)


if __name__ == "__main__":
    raise SystemExit(main())
