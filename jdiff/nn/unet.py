"""The U-Nets of DDPM, DDPM++ and NCSN++: one network, whose options give each."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from jdiff._array import check_count
from jdiff._typing import Array
from jdiff.nn.blocks import ACTIVATIONS, Attention, ResidualBlock, check_image, conv, merge, over_sigma
from jdiff.nn.conditioning import SMOOTH_FREQUENCIES, Conditioning, check_inputs, check_sizes
from jdiff.nn.conditions import Condition, read_condition, with_image
from jdiff.nn.normalisation import GroupNorm
from jdiff.nn.resampling import Downsample, Upsample, downsample, fir_downsample, fir_upsample, upsample

__all__ = ["UNet", "ddpm", "ddpmpp", "ncsnpp"]

_SIZES: dict[str, dict[str, Any]] = {
    "small": {"channels": 24, "multipliers": (1, 2, 2), "blocks": 1, "attention": (), "dropout": 0.0},
    "full": {"channels": 128, "multipliers": (1, 2, 2, 2), "blocks": 4, "attention": (16,), "dropout": 0.1},
    "deep": {"channels": 128, "multipliers": (1, 2, 2, 2), "blocks": 8, "attention": (16,), "dropout": 0.1},
}
_OPTIONS = {
    "activation": tuple(ACTIVATIONS),
    "resblock": ("biggan", "ddpm"),
    "progressive": ("none", "output_skip", "residual"),
    "progressive_input": ("none", "input_skip", "residual"),
    "progressive_combine": ("sum", "cat"),
}


class UNet(nn.Module):
    """U-Net of Song et al. 2021 (arXiv 2011.13456, appendix H); `ddpm`, `ddpmpp` and `ncsnpp` give its variants.

    Residual blocks; attention in the middle and at the listed heights, after each block on the way down and once per
    level on the way up. The input, downsampled, may join each level, and the output may be a sum over levels. Height
    and width are multiples of 2^(levels - 1).

    Attributes:
        noise_level: `(batch,) -> (batch,)`, from the time to what `embedding` embeds: log-SNR for "smooth", `999 t` or
            the label for the published "positional" networks, `log sigma` for "fourier" (see `Conditioning`).
        channels: of the first level.
        multipliers: channels of each level over `channels`, finest level first.
        blocks: residual blocks a level on the way down; there is one more on the way up.
        attention: heights, in pixels, of the levels with attention. One that no level has adds none: 16 where an image
            of 28 has levels of 28, 14 and 7.
        dropout: rate, in training only.
        embedding: "smooth", "positional" or "fourier".
        frequencies: angular frequencies of "smooth".
        fourier_scale: standard deviation of the frequencies of "fourier".
        num_classes: labels are `0 ... num_classes - 1`, and `num_classes` is the null label. None: no labels.
        vector_size: entries of a vector that is known (see `read_condition`). None: no vector.
        image_channels: channels of an image that is known, of x's height and width; the network sees it beside x, with
            a channel that says whether it is there. None: no image.
        out_channels: channels of the output; None is x's.
        rescale: divide every residual sum by sqrt(2).
        sigma: `(batch,) -> (batch,)`, from the time to what the output is divided by (the reference's
            `scale_by_sigma`), whatever is embedded. None: the output is not divided.
        activation: "swish", "elu", "relu" or "lrelu" (slope 0.2).
        groups: of the normalisations; None: min(channels // 4, 32). DDPM has 32.
        resblock: "biggan" (blocks resample inside) or "ddpm" (resampling stands between plain blocks).
        resamp_with_conv: with "ddpm", resampling has a 3x3 convolution.
        fir: resampling smooths by the filter (1, 3, 3, 1).
        progressive: the output is "none" (of the finest level), "output_skip" (a sum of one image per level,
            upsampled) or "residual" (of the finest level, to which coarser ones are added, upsampled by a convolution).
        progressive_input: to each level is added "none", "input_skip" (x downsampled, through a 1x1 convolution) or
            "residual" (x downsampled by convolutions, the sum being what the next level downsamples).
        progressive_combine: "input_skip" is added ("sum") or concatenated ("cat").
        timed: the blocks see the time, the label and the vector; else the network is unconditional but for `sigma`.
        center_input: the network sees `2 x - 1`: published networks of data in [0, 1].
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
    vector_size: int | None = None
    image_channels: int | None = None
    out_channels: int | None = None
    rescale: bool = True
    sigma: Callable[[Array], Array] | None = None
    activation: str = "swish"
    groups: int | None = None
    resblock: str = "biggan"
    resamp_with_conv: bool = True
    fir: bool = False
    progressive: str = "none"
    progressive_input: str = "none"
    progressive_combine: str = "sum"
    timed: bool = True
    center_input: bool = False
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: Condition = None, *, train: bool = False) -> Array:
        """Evaluate the network.

        Args:
            x: `(batch, height, width, c)`, of order 1.
            t: `(batch,)`.
            cond: labels `(batch,)`, or a dict of what the network was built for (see `read_condition`); None is the
                null condition. A label out of range gives NaN.
            train: dropout on; `apply` then needs `rngs={"dropout": key}`.

        Returns:
            `(batch, height, width, out_channels)` in the dtype of x.

        Raises:
            ValueError: wrong shapes, a height or width that the levels cannot halve, an unknown option, sizes below 1,
                a dropout outside [0, 1), what `read_condition` raises.
            TypeError: x or t not floating, sizes that are no integers, what `read_condition` raises.
        """
        self._check_options()
        check_inputs(x, t)
        last, dtype, out = len(self.multipliers) - 1, self.dtype or x.dtype, self.out_channels or x.shape[-1]
        check_image(x.shape, 2**last, "use fewer levels (multipliers)")
        act, add = ACTIVATIONS[self.activation], partial(merge, rescale=self.rescale)
        up, down = (fir_upsample, fir_downsample) if self.fir else (upsample, downsample)
        block = partial(
            ResidualBlock,
            dropout=self.dropout,
            rescale=self.rescale,
            activation=self.activation,
            groups=self.groups,
            dense=self.resblock == "ddpm",
            dtype=dtype,
        )
        attend = partial(Attention, rescale=self.rescale, groups=self.groups, dtype=dtype)

        def resample(h, plain, layer, name):
            if self.resblock == "biggan":
                return block(h.shape[-1], resample=plain, name=name)(h, emb, train=train)
            return layer(h.shape[-1], self.fir, dtype=dtype, name=name)(h) if self.resamp_with_conv else plain(h)

        def head(h, channels, name, *, scale=0.0, dtype=x.dtype):
            h = act(GroupNorm(self.groups, dtype=self.dtype or x.dtype, name=f"{name}_norm")(h))
            return conv(channels, scale=scale, dtype=dtype, name=name)(h)

        sizes = {name: getattr(self, name) for name in ("num_classes", "vector_size", "image_channels")}
        seen = read_condition(cond, x, **sizes)
        emb = self._embed(x, t, seen, dtype)
        x = 2 * x - 1 if self.center_input else x
        if "image" in seen:
            x = with_image(x, seen["image"], seen["present"])
        pyramid, h = x, conv(self.channels, dtype=dtype, name="stem")(x)
        skips = [h]
        for level, multiplier in enumerate(self.multipliers):
            for i in range(self.blocks):
                h = block(multiplier * self.channels, name=f"down_{level}_block_{i}")(h, emb, train=train)
                if h.shape[1] in self.attention:
                    h = attend(name=f"down_{level}_attention_{i}")(h)
                skips.append(h)
            if level < last:
                h = resample(h, down, Downsample, f"down_{level}_resample")
                if self.progressive_input == "input_skip":
                    pyramid = down(pyramid)
                    side = conv(h.shape[-1], size=1, dtype=dtype, name=f"down_{level}_input")(pyramid)
                    h = side + h if self.progressive_combine == "sum" else jnp.concatenate([side, h], axis=-1)
                elif self.progressive_input == "residual":
                    side = Downsample(h.shape[-1], self.fir, dtype=dtype, name=f"down_{level}_input")(pyramid)
                    pyramid = h = add(side, h)
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
            if self.progressive == "output_skip":
                image = head(h, out, f"up_{level}_output")
                pyramid = image if level == last else up(pyramid) + image
            elif self.progressive == "residual" and level == last:
                pyramid = head(h, h.shape[-1], f"up_{level}_output", scale=1.0, dtype=dtype)
            elif self.progressive == "residual":
                side = Upsample(h.shape[-1], self.fir, dtype=dtype, name=f"up_{level}_output")(pyramid)
                pyramid = h = add(side, h)
            if level > 0:
                h = resample(h, up, Upsample, f"up_{level}_resample")

        h = pyramid if self.progressive == "output_skip" else head(h, out, "head")
        return over_sigma(h, self.sigma, t)

    def _embed(self, x, t, seen, dtype):
        if not self.timed:
            return None
        embedded = {name: seen[name] for name in ("label", "vector") if name in seen}
        act = ACTIVATIONS[self.activation]
        emb = Conditioning(
            self.noise_level,
            4 * self.channels,
            embedding=self.embedding,
            features=self.channels,
            frequencies=self.frequencies,
            fourier_scale=self.fourier_scale,
            num_classes=self.num_classes,
            vector_size=self.vector_size,
            activation=act,
            dtype=dtype,
            name="conditioning",
        )(x, t, embedded | {"present": seen["present"]} if embedded else None)
        return act(emb)

    def _check_options(self):
        check_sizes(self, channels=1, blocks=0, out_channels=1, groups=1)
        if not len(self.multipliers):
            raise ValueError("multipliers must have an entry for each level, got none")
        for multiplier in self.multipliers:
            check_count(multiplier, "multipliers")
        for name, known in _OPTIONS.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("num_classes", "vector_size"):
            if getattr(self, name) is not None and not self.timed:
                what = "labels" if name == "num_classes" else "vectors"
                raise ValueError(f"a network that does not see the time (timed=False) sees no {what}: drop {name}")


def ddpm(noise_level: Callable[[Array], Array], **changes: Any) -> UNet:
    """DDPM of Ho et al. 2020 (arXiv 2006.11239) for 32x32 images, of 35,218,947 parameters for 3 channels.

    Args:
        noise_level: `999 t`, or the label of a discrete network (see `UNet`).
        **changes: attributes of `UNet`; 256x256 images have `multipliers=(1, 1, 2, 2, 4, 4)`.
    """
    ours: dict[str, Any] = {"blocks": 2, "embedding": "positional", "resblock": "ddpm", "rescale": False, "groups": 32}
    return UNet(noise_level, **(_SIZES["full"] | ours | changes))


def ddpmpp(noise_level: Callable[[Array], Array], *, size: str = "full", **changes: Any) -> UNet:
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


def ncsnpp(noise_level: Callable[[Array], Array], *, size: str = "full", **changes: Any) -> UNet:
    """NCSN++ of Song et al. 2021 (arXiv 2011.13456, appendix H): DDPM++ with smoothed resampling and residual input.

    The published continuous VE networks for CIFAR-10 are `ncsnpp(log_sigma, size="full" | "deep", sigma=sigma,
    center_input=True)`, of 62,758,915 and 107,587,075 parameters for 32x32x3; those for 256x256 have in addition
    `multipliers=(1, 1, 2, 2, 2, 2, 2), blocks=2, dropout=0.0`, `progressive="output_skip"` and
    `progressive_input="input_skip"`.

    Args:
        noise_level: `log sigma(t)`, or what another `embedding` embeds (see `UNet`).
        size: see `ddpmpp`.
        **changes: attributes of `UNet` that override those above.

    Raises:
        ValueError: unknown size.
    """
    ours = {"embedding": "fourier", "fir": True, "progressive_input": "residual"}
    return ddpmpp(noise_level, size=size, **(ours | changes))
