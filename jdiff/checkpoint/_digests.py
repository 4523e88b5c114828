"""Digests of the bits of arrays, the same on one device and on many."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

_SEED = 0x243F6A88


def digests(leaves: Mapping[str, jax.Array]) -> dict[str, str]:
    """{path: 16 hex digits}, computed where the arrays are: nothing but 8 bytes an array comes to the host."""
    # A call an array, not one program for all: a network has hundreds of arrays and a few dozen shapes to compile for.
    # CPU collectives of several programs in the queue were seen to wait for each other for ever.
    one_by_one = jax.process_count() > 1 and jax.default_backend() == "cpu"
    sums = jax.device_get([_checksum(leaf, wait=one_by_one) for leaf in leaves.values()])
    return {path: f"{high:08x}{low:08x}" for path, (high, low) in zip(leaves, sums, strict=True)}


def _checksum(array, *, wait):
    sums = _sums(array)
    return jax.block_until_ready(sums) if wait else sums


@jax.jit
def _sums(array):
    """Two sums modulo 2^32 over the array's 32-bit words: of hashes of (position, word), plain and with odd weights.

    Both are bijections of each word, so that a change within one word never escapes; others escape with probability
    about 2^-64. Sums of integers do not depend on their order, hence not on the sharding, and positions are counted
    axis by axis because flattening a sharded array would gather it.
    """
    words = _words(array)
    position = jnp.zeros_like(words)
    stride = 1
    for axis in reversed(range(words.ndim)):
        count = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        position += count * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    place = _mix(position ^ jnp.uint32(_SEED))
    hashed = _mix(words ^ place)
    return jnp.stack([jnp.sum(part, dtype=jnp.uint32) for part in (hashed, hashed * (place | jnp.uint32(1)))])


def _words(array):
    """The bits of an array as uint32, with a further axis where elements have more than 32 bits."""
    if jnp.iscomplexobj(array):
        return _words(jnp.stack([jnp.real(array), jnp.imag(array)], -1))
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)


def _mix(words):
    """The finaliser of MurmurHash3 (A. Appleby, public domain): a bijection of words in which every bit matters."""
    words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
    return words ^ (words >> 16)
