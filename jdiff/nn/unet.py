"""The U-Net of the DDPM++ family."""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from flax import linen as nn

from jdiff._typing import Array
from jdiff.nn.blocks import Attention, ResidualBlock, conv, downsample, upsample
from jdiff.nn.conditioning import SMOOTH_FREQUENCIES, Conditioning
from jdiff.nn.normalisation import GroupNorm

_SIZES = {
    "small": {"channels": 24, "multipliers": (1, 2, 2), "blocks": 1, "attention": (), "dropout": 0.0},
    "full": {"channels": 128, "multipliers": (1, 2, 2, 2), "blocks": 4, "attention": (16,), "dropout": 0.1},
    "deep": {"channels": 128, "multipliers": (1, 2, 2, 2), "blocks": 8, "attention": (16,), "dropout": 0.1},
}


class UNet(nn.Module):
    """U-Net of Song et al. 2021 (arXiv 2011.13456, appendix H) with the choices of DDPM++; `ddpmpp` gives its sizes.

    Residual blocks of BigGAN type that resample inside, every sum over sqrt(2); attention in the middle and at the
    listed heights, after each block on the way down and once per level on the way up. Height and width are multiples
    of 2^(levels - 1).

    Attributes:
        noise_level: `(batch,) -> (batch,)`, from the time to what `embedding` embeds: log-SNR for "smooth", `999 t` for
            the published "positional" networks, `log sigma` for "fourier" (see `Conditioning`).
        channels: of the first level.
        multipliers: channels of each level over `channels`, finest level first.
        blocks: residual blocks a level on the way down; there is one more on the way up.
        attention: heights, in pixels, of the levels with attention.
        dropout: rate, in training only.
        embedding: "smooth", "positional" or "fourier".
        frequencies: angular frequencies of "smooth".
        fourier_scale: standard deviation of the frequencies of "fourier".
        num_classes: labels are `0 ... num_classes - 1`, and `num_classes` is the null label. None: no labels.
        out_channels: channels of the output; None is x's.
        rescale: divide every residual sum by sqrt(2).
        dtype: of the computation, such as bfloat16; None is x's. Parameters are float32, the last layer is in x's.
    """

    noise_level: Callable[[Array], Array]
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    blocks: int = 4
    attention: tuple[int, ...] = (16,)
    dropout: float = 0.1
    embedding: str = "smooth"
    frequencies: tuple[float, ...] = SMOOTH_FREQUENCIES
    fourier_scale: float = 16.0
    num_classes: int | None = None
    out_channels: int | None = None
    rescale: bool = True
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: Array | None = None, *, train: bool = False) -> Array:
        """Evaluate the network.

        Args:
            x: `(batch, height, width, c)`, of order 1.
            t: `(batch,)`.
            cond: labels `(batch,)`, integer; None is the null label. A label out of range gives NaN.
            train: dropout on; `apply` then needs `rngs={"dropout": key}`.

        Returns:
            `(batch, height, width, out_channels)` in the dtype of x.

        Raises:
            ValueError: wrong shapes, a height or width that the levels cannot halve, labels for a network without.
            TypeError: x or t not floating, labels not integer.
        """
        last, dtype = len(self.multipliers) - 1, self.dtype or x.dtype
        _check_image(x.shape, 2**last)
        block = partial(ResidualBlock, dropout=self.dropout, rescale=self.rescale, dtype=dtype)
        attend = partial(Attention, rescale=self.rescale, dtype=dtype)
        emb = Conditioning(
            self.noise_level,
            4 * self.channels,
            embedding=self.embedding,
            features=self.channels,
            frequencies=self.frequencies,
            fourier_scale=self.fourier_scale,
            num_classes=self.num_classes,
            dtype=dtype,
            name="conditioning",
        )(x, t, cond)
        emb = nn.swish(emb)

        h = conv(self.channels, dtype=dtype, name="stem")(x)
        skips = [h]
        for level, multiplier in enumerate(self.multipliers):
            for i in range(self.blocks):
                h = block(multiplier * self.channels, name=f"down_{level}_block_{i}")(h, emb, train=train)
                if h.shape[1] in self.attention:
                    h = attend(name=f"down_{level}_attention_{i}")(h)
                skips.append(h)
            if level < last:
                h = block(h.shape[-1], resample=downsample, name=f"down_{level}_resample")(h, emb, train=train)
                skips.append(h)

        h = block(h.shape[-1], name="middle_block_0")(h, emb, train=train)
        h = attend(name="middle_attention")(h)
        h = block(h.shape[-1], name="middle_block_1")(h, emb, train=train)

        for level, multiplier in reversed(tuple(enumerate(self.multipliers))):
            for i in range(self.blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = block(multiplier * self.channels, name=f"up_{level}_block_{i}")(h, emb, train=train)
            if h.shape[1] in self.attention:
                h = attend(name=f"up_{level}_attention")(h)
            if level > 0:
                h = block(h.shape[-1], resample=upsample, name=f"up_{level}_resample")(h, emb, train=train)

        h = nn.swish(GroupNorm(dtype=dtype, name="head_norm")(h))
        return conv(self.out_channels or x.shape[-1], scale=0.0, dtype=x.dtype, name="head")(h)


def ddpmpp(noise_level: Callable[[Array], Array], *, size: str = "full", **changes) -> UNet:
    """DDPM++ of Song et al. 2021 (arXiv 2011.13456, appendix H), conditioned smoothly on log-SNR unless told otherwise.

    The published CIFAR-10 networks are `ddpmpp(lambda t: 999 * t, size="full" | "deep", embedding="positional")`, of
    61,804,419 and 106,632,579 parameters for 32x32x3.

    Args:
        noise_level: see `UNet`.
        size: "small" (for 28x28 or 8x8 images on a CPU), "full" or "deep".
        **changes: attributes of `UNet` that override those of the size.

    Raises:
        ValueError: unknown size.
    """
    if size not in _SIZES:
        raise ValueError(f"size must be one of {', '.join(_SIZES)}, got {size!r}")
    return UNet(noise_level, **(_SIZES[size] | changes))


def _check_image(shape: tuple[int, ...], multiple: int) -> None:
    if len(shape) != 4:
        raise ValueError(f"x must have shape (batch, height, width, channels), got {shape}")
    if shape[1] % multiple or shape[2] % multiple:
        raise ValueError(
            f"height and width must be multiples of {multiple}, 2^(levels - 1), got {shape[1]}x{shape[2]}: "
            "pad the images or use fewer levels (multipliers)"
        )
