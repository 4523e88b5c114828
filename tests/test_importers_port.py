"""Tensors of the PyTorch port, named by PyTorch itself, give the outputs that PyTorch computed with them.

`data/nn_port.npz` was recorded with PyTorch 2.13 on a CPU from a restatement of models/ddpm.py and models/ncsnpp.py of
yang-song/score_sde_pytorch, wrapped in DataParallel: its state dict's names and shapes, and outputs for these inputs.
Tensors are filled by the rule of `nn_reference`, under the port's names and in the port's layouts.
"""

import json

import jax
import jax.numpy as jnp
import nn_reference
import numpy as np
import pytest

from experiments import tensors
from jdiff import nn
from jdiff.importers import score_sde, score_sde_pytorch


def network(name):
    if name != "ncsnpp_skip":
        return nn_reference.small(name)
    # Not FIR: PyTorch refuses the port's FIR upsampling with a convolution (it flips axes by a negative step).
    changes = {"fir": False, "resblock": "ddpm", "progressive": "output_skip", "progressive_input": "input_skip"}
    scaled = {"embedding": "fourier", "sigma": lambda sigma: sigma, "center_input": True, "rescale": False}
    return nn_reference.small_network(jnp.log, nn.ncsnpp, **changes, **scaled)


@pytest.mark.slow_but("ddpmpp", "ncsnpp_skip")
@pytest.mark.parametrize("name", ["ddpm", "ddpmpp", "ncsnpp", "ncsnpp_skip"])
def test_pytorch_gives_the_same_outputs(name, tmp_path):
    recorded, module = nn_reference.load("port"), network(name)
    shapes = {k: tuple(v) for k, v in json.loads(str(recorded[f"{name}/shapes"])).items()}
    filled = nn_reference.fill({k.replace(".", "/"): shape for k, shape in shapes.items()})
    port = {k: filled[k.replace(".", "/")] for k in shapes} | {"module.sigmas": np.ones(10)}  # float64, as there
    tensors.write(tmp_path / "port.safetensors", port, {"step": "7"})
    _, port = tensors.read(tmp_path / "port.safetensors")
    params = score_sde.rename(score_sde_pytorch.to_reference(port, module, image_size=16), module, image_size=16)
    x = jnp.asarray(recorded["x"].transpose(0, 2, 3, 1))
    ours = nn_reference.quick_jit(nn.as_field(module, params))(x, jnp.asarray(recorded["labels"]))
    expected = recorded[f"{name}/output"].transpose(0, 2, 3, 1)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sum(np.prod(shape) for shape in shapes.values())
    assert np.abs(ours - expected).max() <= 1e-5 * np.abs(expected).max()
