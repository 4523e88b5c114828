"""Import a published checkpoint of Song et al. 2021 into a run folder, which the other scripts then use.

    python -m experiments.import_checkpoint --from score_sde --config NAME --path FILE --workdir RUN [--sha256 HEX]

NAME: a row, such as vp/cifar10_ddpmpp_continuous, or the path of a configuration.
--from score_sde: flax 0.3 msgpack; score_sde_pytorch: safetensors (docs/reproduce.md says how to convert a .pth).
"""

from __future__ import annotations

import argparse
import hashlib
import pathlib

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from experiments import build, checks, cli, tensors
from experiments.artefacts import Run, read_json
from jdiff import checkpoint
from jdiff.importers import flax_msgpack, score_sde, score_sde_pytorch

SOURCES = ("score_sde", "score_sde_pytorch")
_CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
_CHANNELS, _LEVELS = 3, 256  # what a network without precondition does not depend on
# A zip (PyTorch since 1.6), a tar, and pickles of the protocols 2 to 5.
_CODE = (b"PK\x03\x04", *(bytes((0x80, protocol)) for protocol in range(2, 6)))


def import_checkpoint(
    config: ConfigDict, run: Run, path: str, *, source: str | None = None, sha256: str | None = None
) -> dict:
    """Write the averaged parameters of a published checkpoint as a checkpoint of the run folder.

    Again with the same file it does nothing. import.json says which file it was.

    Args:
      config: of the network that the file is a checkpoint of.
      run: the run folder; it need not exist.
      path: the file.
      source: one of SOURCES; None: as the file begins.
      sha256: what the file's SHA-256 must be.

    Returns:
      What import.json holds: "path", "sha256", "source", "step", "parameters".

    Raises:
      ValueError: another SHA-256, a damaged file, a pickle, leaves that do not fit (each is named with its shape), a
        configuration of no published network, a folder that holds another run.
      OSError: the file cannot be read, or the folder not be written.
    """
    if source is not None:
        build.pick(SOURCES, source, "--from")
    digest = _sha256(path)
    print(f"{path}: SHA-256 {digest}")
    if sha256 is not None and sha256.strip().lower() != digest:
        raise ValueError(f"{path} has SHA-256 {digest}, not {sha256}: another file, or a damaged one")
    if _vacant(config, run, digest):
        step, params, source = read(config, path, source)
        count = sum(leaf.size for leaf in jax.tree.leaves(params))
        record = {"path": path, "sha256": digest, "source": source, "step": step, "parameters": count}
        _write(config, run, step, params, record)
    record = read_json(run / "import.json")
    print(f"{run.path}: {record['parameters']:,} parameters (EMA) of step {record['step']:,}, from {record['source']}")
    return record


def read(config: ConfigDict, path: str, source: str | None = None) -> tuple[int, dict, str]:
    """Return (step, parameters of the configuration's network, source) of a published checkpoint."""
    size = config.data.size
    if config.network.precondition != "none" or not size:
        raise ValueError(
            "published networks have no precondition and a fixed size of images, got network.precondition = "
            f"{config.network.precondition!r}, data.size = {size}"
        )
    with open(path, "rb") as file:
        head = file.read(4)
    is_safetensors = tensors.is_safetensors(path)
    if not is_safetensors and head.startswith(_CODE):
        raise ValueError(
            f"{path} is a PyTorch file, that is a pickle, and could run code if opened: it is refused. Convert it "
            "to safetensors with the few lines in docs/reproduce.md, section 1"
        )
    found = SOURCES[int(is_safetensors)]
    if source is not None and found != source:
        raise ValueError(f"{path} looks like {found}, not {source}: flax msgpack is score_sde, safetensors the port")
    module = build.network(config, _CHANNELS, _LEVELS, None)
    if is_safetensors:
        metadata, flat = tensors.read(path)
        step, flat = _step(path, metadata), score_sde_pytorch.to_reference(flat, module, image_size=size)
    else:
        step, flat = flax_msgpack.read(path)
    try:
        return step, score_sde.rename(flat, module, image_size=size), found
    except ValueError as error:
        raise ValueError(f"{path} does not fit network {config.network.name}: {error}") from error


def _vacant(config, run, digest):
    """Return whether the folder has no checkpoint yet; raise where it has another's."""
    if (run / "config.json").exists():
        run.match(config)
    if not (run / "checkpoints").exists():
        return True
    with checkpoint.open_manager(str(run / "checkpoints"), read_only=True) as manager:
        if not manager.all_steps():
            return True
    record = read_json(run / "import.json") if (run / "import.json").exists() else {}
    if record.get("sha256") != digest:
        origin = f"of the file with SHA-256 {record['sha256']}" if record else "of a training"
        raise ValueError(f"{run.path} holds checkpoints {origin}: use another --workdir")
    return False


def _write(config, run, step, params, record):
    channels = params["stem"]["kernel"].shape[2]
    shape = (config.data.size, config.data.size, channels)
    # A network without precondition never looks at statistics, so that no data set is needed here.
    statistics = {"mean": np.zeros(shape, np.float32), "std": np.ones(shape, np.float32)}
    identity = {"data": config.data.name, "network": config.network.name}
    run.open(config)
    # First: a kill in between leaves a folder that the same command fills, and never parameters of unknown origin.
    run.write_json("import.json", record)
    with checkpoint.open_manager(str(run / "checkpoints")) as manager:
        checkpoint.save(manager, step, {"ema": params, "statistics": statistics, "meta": identity}, force=True)


def _step(path, metadata):
    """Return the step that the conversion of docs/reproduce.md notes; 0 where another was used."""
    step = metadata.get("step", "0")
    if not (step.isascii() and step.isdecimal() and len(step) <= 9):
        raise ValueError(f"{path}: the step in its metadata must be a number below 10^9, got {step[:80]!r}")
    return int(step)


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _configuration(name):
    """Return the configuration of a row's name, such as vp/cifar10_ddpmpp_continuous, or of a path."""
    file = pathlib.Path(name)
    return cli.load(name if file.suffix == ".py" else str(_CONFIGS / f"{name}.py"))


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", choices=SOURCES, help="which code wrote it; left out: as it begins")
    parser.add_argument("--config", required=True, help="row, such as vp/cifar10_ddpmpp_continuous, or a file")
    parser.add_argument("--path", required=True, help="the checkpoint")
    parser.add_argument("--workdir", required=True, help="run folder")
    parser.add_argument("--sha256", default=None, help="what the file's SHA-256 must be")
    options = parser.parse_args()
    logging.set_verbosity(logging.ERROR)

    def run():
        config = _configuration(options.config)
        checks.check(config)
        given = {"source": options.source, "sha256": options.sha256}
        import_checkpoint(config, Run(options.workdir), options.path, **given)
        return 0

    return cli.exit_code(run)


if __name__ == "__main__":
    raise SystemExit(main())
