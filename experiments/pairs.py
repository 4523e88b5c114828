"""Pairs (noise, image) that a trained flow makes: a coupling to train another flow on."""

from __future__ import annotations

import dataclasses
import sys

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from experiments import drawing, parts
from experiments.artefacts import Run, read_json
from experiments.processes import primary, together, wait_for_all
from jdiff import data

# Solvers of the flow itself: the image is a function of the noise, and of the label.
SOLVERS = ("euler", "midpoint", "heun", "rk4", "adaptive")
_DONE = "pairs.json"


def make(config: ConfigDict, run: Run, out: Run, number: int) -> str:
    """Solve the flow of a run folder from `number` draws of noise; return the folder of pairs, inside `out`.

    config.sampling says how: solver, steps, labels, guidance, batch_size. Batches are spread over devices and processes
    and kept, one file each: what was killed goes on. Pair i depends on (parameters, seed, i) alone; its noise is no
    sample's that `experiments.sample` would draw. Files hold "noise" and "image" in model space and, for conditional
    networks, "label".

    Raises:
      FileNotFoundError: nothing has been trained here.
      ValueError: not a flow with the noise at its end, a stochastic solver, number < 1, what `drawing.load` raises.
      FloatingPointError: values that are not finite.
    """
    if config.loss.name == "maximum_likelihood":
        raise ValueError("pairs are made by a rectified flow, not by one trained by maximum likelihood")
    if config.process.name != "Rectified" or config.network.predict != "velocity":
        raise ValueError(
            'pairs are made by a rectified flow: process.name = "Rectified" and network.predict = "velocity", got '
            f"{config.process.name!r} and {config.network.predict!r}"
        )
    if config.sampling.solver not in SOLVERS or config.protocol != "jdiff":
        raise ValueError(
            f"pairs need protocol jdiff and a solver of the flow, {', '.join(SOLVERS)}; got {config.sampling.solver!r}"
        )
    if number < 1:
        raise ValueError(f"the number of pairs must be positive, got {number}")
    config = ConfigDict(config)
    config.sampling.number = number
    sampler = drawing.load(config, run)
    kept = parts.Parts(out, "pairs", [*sampler.depends, number])
    total = -(-number // sampler.size)
    key = jax.random.fold_in(jax.random.key(config.sampling.seed), np.uint32(2**32 - 1))
    mine = [n for n in range(jax.process_index(), total, jax.process_count()) if not kept.has(n)]
    with together("pairs"):
        for n in tqdm(mine, desc="pairs", unit="batch", disable=not (sys.stderr.isatty() and primary())):
            image, _, _ = sampler.batch(n, key)
            arrays = {"noise": sampler.noise(n, key), "image": image}
            if config.network.conditional:
                null = np.full(len(image), sampler.trained.model.classes, np.int32)
                arrays["label"] = null if sampler.labels is None else sampler.cond(n)
            kept.write(n, **{name: np.asarray(array) for name, array in arrays.items()})
    if primary():
        about = {"number": number, "parts": total, "from": str(run.path), "step": sampler.trained.step}
        out.write_json(f"{kept.folder.name}/{_DONE}", about | {"sampling": config.sampling.to_dict()})
    wait_for_all("all pairs")
    return str(kept.folder)


def load(config: ConfigDict, source: data.Source) -> data.Source:
    """Return what is trained on: the pairs of config.data.pairs, in memory, or `source` where there are none.

    Raises:
      FileNotFoundError: no finished folder of pairs.
      ValueError: pairs of another shape than the data's.
    """
    if not config.data.pairs:
        return source
    folder = epath.Path(config.data.pairs).expanduser()
    if not (folder / _DONE).exists():
        raise FileNotFoundError(f"data.pairs = {config.data.pairs!r}: no finished pairs there; experiments.reflow does")
    about = read_json(folder / _DONE)
    files = [parts.read(folder / f"{n:06d}.npz") for n in range(about["parts"])]
    arrays = {name: np.concatenate([file[name] for file in files])[: about["number"]] for name in files[0]}
    if arrays["image"].shape[1:] != source.shape:
        raise ValueError(f"pairs in {folder} are {arrays['image'].shape[1:]}, images of {source.name} {source.shape}")
    return dataclasses.replace(
        source,
        split=f"pairs of {about['from']}",
        size=about["number"],
        dtype=arrays["image"].dtype,
        read=lambda positions: {name: array[positions] for name, array in arrays.items()},
    )
