"""Collectives are read from programs as accelerators write them too."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from experiments import plan
from jdiff import parallel

LINES = {
    # Variadic, as gradients are combined; by kinds: results alone, operands and results, and two counters besides.
    "%a = (f32[8]{0}, bf16[4,2]{1,0}, /*index=2*/f32[]) all-reduce(%x, %y, %z), replica_groups={{0,1}}": (
        "all-reduce",
        52,
    ),
    "%b = (f32[8]{0}, f32[4]{0}) all-reduce-start(%x, %y), replica_groups=[1,8]<=[8]": ("all-reduce", 48),
    "%c = (f32[2]{0}, f32[16]{0}) all-gather-start(%x), replica_groups=[1,8]<=[8], dimensions={0}": ("all-gather", 64),
    "%d = (f32[2], f32[2], u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}": (
        "collective-permute",
        8,
    ),
    "%e = f8e4m3fn[16]{0} reduce-scatter(%x), replica_groups={{0,1}}": ("reduce-scatter", 16),
    # Over one device alone, and what only speaks of one.
    "%f = f32[8]{0} all-reduce(%x), replica_groups={{0},{1}}": None,
    "%g = f32[8]{0} all-reduce(%x), replica_groups=[8,1]<=[8]": None,
    "%h = f32[8]{0} all-reduce-done(%b)": None,
    "%i = f32[8]{0} add(%x, %all-reduce.1)": None,
}


@pytest.mark.parametrize(("line", "expected"), LINES.items())
def test_collectives(line, expected):
    assert plan.collectives(line) == ({} if expected is None else dict([expected]))


def test_bytes_are_those_of_one_device():
    mesh = parallel.data_mesh(fsdp=4)
    shapes = {"w": jax.ShapeDtypeStruct((8, 6), jnp.float32), "b": jax.ShapeDtypeStruct((6,), jnp.bfloat16)}
    places = parallel.state_sharding(shapes, mesh, min_size=8)
    assert plan.bytes_per_device(shapes, places) == 4 * 8 * 6 / 4 + 2 * 6
    assert plan.bytes_per_device(shapes, NamedSharding(mesh, PartitionSpec())) == 4 * 8 * 6 + 2 * 6


def test_a_plan_that_does_not_fit_names_its_largest_terms():
    found = {"bytes": {"parameters": 3 * 2**20, "average": 1 * 2**20, "batch": 2**20 // 2, "optimiser": 2 * 2**20}}
    plan.check_fits(found, None)
    plan.check_fits(found, 7 * 2**20)
    wanted = (
        "needs 6.5 MiB a device and there are 6.0 MiB; the largest: parameters 3.0 MiB, optimiser 2.0 MiB, average 1.0"
    )
    with pytest.raises(ValueError, match=wanted):
        plan.check_fits(found, 6 * 2**20)
