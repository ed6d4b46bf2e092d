"""AutoencoderKL (arXiv 2112.10752, section 3.1), laid out like Stable Diffusion's in diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from composer_jax.models.blocks import (
    Attention,
    Downsample,
    ResnetBlock,
    Upsample,
    attend,
    conv1,
    conv3,
    depth_to_space,
    group_norm,
    linear,
    space_to_depth,
)
from composer_jax.models.initializers import start_at_zero

EPS = 1e-6


@dataclass(frozen=True)
class VAEConfig:
    """A codec's shape. The factor from image to latent is patch x 2^(levels - 1).

    `patch`: space-to-depth before the first convolution (1 for Stable Diffusion). `linear_skip`: a
    linear path around encoder and decoder, only with a single level. `latent_mean`, `latent_std`:
    by channel, what standardises latents.
    """

    in_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    patch: int = 1
    mid_attention: bool = True
    linear_skip: bool = False
    latent_mean: tuple[float, ...] = (0.0,) * 4
    latent_std: tuple[float, ...] = (1 / 0.18215,) * 4

    def __post_init__(self):
        check_sizes(self, "in_channels", "latent_channels", "patch")
        check_widths(self)
        for name in ("latent_mean", "latent_std"):
            numbers = getattr(self, name)
            if not isinstance(numbers, tuple) or len(numbers) != self.latent_channels:
                raise ValueError(
                    f"{name} is {numbers!r}; {self.latent_channels} numbers are wanted"
                )
            if not all(isinstance(n, int | float) and np.isfinite(n) for n in numbers):
                raise ValueError(f"{name} is {numbers!r}; finite numbers are wanted")
        if not all(std > 0 for std in self.latent_std):
            raise ValueError(f"latent_std is {self.latent_std!r}; it must be above 0")

    @property
    def factor(self) -> int:
        """Image size over latent size."""
        return self.patch * 2 ** (len(self.block_out_channels) - 1)

    def latents(self, moments: Float[Array, "b h w d"], key=None) -> Float[Array, "b h w c"]:
        """Standardised latents: the mean, or a draw from the posterior where a key is given."""
        z, logvar = jnp.split(moments, 2, axis=-1)
        if key is not None:
            z = z + jnp.exp(0.5 * logvar) * jax.random.normal(key, z.shape)
        return (z - _channel(self.latent_mean)) / _channel(self.latent_std)

    def to_dict(self) -> dict:
        """As JSON's types."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping) -> VAEConfig:
        """From `to_dict`'s result; raises ValueError for an unknown key."""
        return cls(**strict(cls, values))


def strict(cls, values: Mapping) -> dict:
    """`values` with lists as tuples; raises ValueError for a key that the data class lacks."""
    known = [f.name for f in fields(cls)]
    for key in values:
        if key not in known:
            raise ValueError(f"{cls.__name__} has no key {key!r}; it has {', '.join(known)}")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def check_sizes(config, *names: str, largest: int = 2**16) -> None:
    """Raises ValueError where one of these is no whole number from 1 to `largest`."""
    for name in names:
        check_size(name, getattr(config, name), largest)


def check_size(name: str, value, largest: int = 2**16) -> None:
    """Raises ValueError where a value is no whole number from 1 to `largest`."""
    if type(value) is not int or not 1 <= value <= largest:
        raise ValueError(f"{name} is {value!r}; a whole number from 1 to {largest} is wanted")


def check_widths(config) -> None:
    """Raises ValueError where `block_out_channels` are no multiples of `norm_num_groups`."""
    widths, groups = config.block_out_channels, config.norm_num_groups
    check_sizes(config, "norm_num_groups")
    check_sizes(config, "layers_per_block", largest=64)
    if not isinstance(widths, tuple) or not 1 <= len(widths) <= 16:
        raise ValueError(f"block_out_channels is {widths!r}; 1 to 16 widths are wanted")
    for width in widths:
        check_size("block_out_channels", width)
        if width % groups:
            raise ValueError(f"block_out_channels {width} is no multiple of {groups} groups")


PRESETS = {
    "sd": VAEConfig(),  # 83.7 M
    "scenes64": VAEConfig(
        latent_channels=6,
        block_out_channels=(112,),
        layers_per_block=1,
        norm_num_groups=8,
        patch=4,
        mid_attention=False,
        linear_skip=True,
        latent_mean=(0.0,) * 6,
        latent_std=(1.0,) * 6,
    ),  # 1.7 M
}


class AttentionBlock(nnx.Module):
    """Single-head self-attention over positions, as in the middle of Stable Diffusion's VAE."""

    def __init__(self, channels: int, groups: int, *, dtype, rngs: nnx.Rngs):
        self.group_norm = group_norm(channels, groups, EPS, dtype=dtype, rngs=rngs)
        attention = Attention(channels, channels, 1, bias=True, dtype=dtype, rngs=rngs)
        self.to_q, self.to_k, self.to_v = attention.to_q, attention.to_k, attention.to_v
        self.to_out = attention.to_out

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """x [B, H, W, C]; returns the same shape."""
        sequence = self.group_norm(x).reshape(x.shape[0], -1, x.shape[3])
        q, k, v = self.to_q(sequence), self.to_k(sequence), self.to_v(sequence)
        return x + self.to_out[0](attend(q, k, v, 1)).reshape(x.shape)


class Middle(nnx.Module):
    """Resnet, attention where wanted, resnet."""

    def __init__(self, channels: int, config: VAEConfig, *, dtype, rngs: nnx.Rngs):
        options = {"dtype": dtype, "rngs": rngs}
        block = (channels, channels, None, config.norm_num_groups, EPS)
        self.resnets = nnx.List([ResnetBlock(*block, **options) for _ in range(2)])
        if config.mid_attention:
            attention = AttentionBlock(channels, config.norm_num_groups, **options)
            self.attentions = nnx.List([attention])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """x [B, H, W, C]; returns the same shape."""
        x = self.resnets[0](x)
        if hasattr(self, "attentions"):
            x = self.attentions[0](x)
        return self.resnets[1](x)


class Level(nnx.Module):
    """Resnets at one resolution, then a change of resolution unless it is the last level."""

    def __init__(self, c_in: int, c_out: int, layers: int, groups: int, resample, *, dtype, rngs):
        options = {"dtype": dtype, "rngs": rngs}
        self.resnets = nnx.List(
            [
                ResnetBlock(c_in if i == 0 else c_out, c_out, None, groups, EPS, **options)
                for i in range(layers)
            ]
        )
        if resample == "down":
            self.downsamplers = nnx.List([Downsample(c_out, asymmetric=True, **options)])
        elif resample == "up":
            self.upsamplers = nnx.List([Upsample(c_out, **options)])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W d"]:
        """x [B, H, W, C_in]; returns C_out channels at the next level's resolution."""
        for resnet in self.resnets:
            x = resnet(x)
        for name in ("downsamplers", "upsamplers"):
            if hasattr(self, name):
                x = getattr(self, name)[0](x)
        return x


class Encoder(nnx.Module):
    """Image to moments, before `quant_conv`."""

    def __init__(self, config: VAEConfig, *, dtype, rngs: nnx.Rngs):
        options = {"dtype": dtype, "rngs": rngs}
        widths, groups = config.block_out_channels, config.norm_num_groups
        last = len(widths) - 1
        self.conv_in = conv3(config.in_channels * config.patch**2, widths[0], **options)
        self.down_blocks = nnx.List(
            [
                Level(
                    widths[max(i - 1, 0)],
                    width,
                    config.layers_per_block,
                    groups,
                    "down" if i < last else None,
                    **options,
                )
                for i, width in enumerate(widths)
            ]
        )
        self.mid_block = Middle(widths[-1], config, **options)
        self.conv_norm_out = group_norm(widths[-1], groups, EPS, **options)
        self.conv_out = conv3(widths[-1], 2 * config.latent_channels, **options)

    def __call__(self, x: Float[Array, "b H W c"]) -> Float[Array, "b h w d"]:
        """x [B, H, W, C], folded by `patch`; returns [B, h, w, 2 c]."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """Latents to image, after `post_quant_conv`."""

    def __init__(self, config: VAEConfig, *, dtype, rngs: nnx.Rngs):
        options = {"dtype": dtype, "rngs": rngs}
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        last = len(widths) - 1
        self.conv_in = conv3(config.latent_channels, widths[0], **options)
        self.mid_block = Middle(widths[0], config, **options)
        self.up_blocks = nnx.List(
            [
                Level(
                    widths[max(i - 1, 0)],
                    width,
                    config.layers_per_block + 1,
                    groups,
                    "up" if i < last else None,
                    **options,
                )
                for i, width in enumerate(widths)
            ]
        )
        self.conv_norm_out = group_norm(widths[-1], groups, EPS, **options)
        self.conv_out = conv3(widths[-1], config.in_channels * config.patch**2, **options)

    def __call__(self, z: Float[Array, "b h w c"]) -> Float[Array, "b H W d"]:
        """z [B, h, w, c]; returns [B, H, W, C], still folded by `patch`."""
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class VAE(nnx.Module):
    """Encoder and decoder. Images float32 [B, H, W, 3] in [-1, 1]; latents are standardised."""

    def __init__(self, config: VAEConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        if config.linear_skip and len(config.block_out_channels) > 1:
            raise ValueError("linear_skip needs a single level, the patch alone makes the factor")
        self.config = config
        options = {"dtype": dtype, "rngs": rngs}
        c = config.latent_channels
        self.encoder, self.decoder = Encoder(config, **options), Decoder(config, **options)
        self.quant_conv = conv1(2 * c, 2 * c, **options)
        self.post_quant_conv = conv1(c, c, **options)
        if config.linear_skip:
            folded = config.in_channels * config.patch**2
            self.encoder_skip = linear(folded, c, **options)
            self.decoder_skip = linear(c, folded, **options)

    @property
    def factor(self) -> int:
        """Image size over latent size."""
        return self.config.factor

    def encode(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b h w d"]:
        """Moments [B, h, w, 2 c] of q(z | image): mean, then log-variance clipped to [-30, 20]."""
        x = space_to_depth(images, self.config.patch)
        mean, logvar = jnp.split(self.quant_conv(self.encoder(x)), 2, axis=-1)
        if self.config.linear_skip:
            mean = mean + self.encoder_skip(x)
        return jnp.concatenate([mean, jnp.clip(logvar, -30.0, 20.0)], axis=-1).astype(jnp.float32)

    def latents(self, moments: Float[Array, "b h w d"], key=None) -> Float[Array, "b h w c"]:
        """Standardised latents, as `VAEConfig.latents` gives them."""
        return self.config.latents(moments, key)

    def decode(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b H W 3"]:
        """The images of standardised latents, about [-1, 1], not clipped."""
        z = latents * _channel(self.config.latent_std) + _channel(self.config.latent_mean)
        return self._decode(z)

    def _decode(self, z):
        x = self.decoder(self.post_quant_conv(z))
        if self.config.linear_skip:
            x = x + self.decoder_skip(z)
        return depth_to_space(x, self.config.patch).astype(jnp.float32)


def _channel(values: tuple[float, ...]) -> jax.Array:
    return jnp.asarray(values, jnp.float32)[None, None, None, :]


def pca_skip(vae: VAE, images: Float[Array, "b H W 3"]) -> None:
    """Sets the linear skips to the principal components of patches, scaled to unit variance.

    The nonlinear paths' last layers start at zero, so that training starts from the best linear
    codec. Raises ValueError where the codec has no skip.
    """
    config = vae.config
    if not config.linear_skip:
        raise ValueError("this codec has no linear skip")
    patches = np.asarray(space_to_depth(images, config.patch), np.float64)
    patches = patches.reshape(-1, patches.shape[-1])
    mean = patches.mean(0)
    values, vectors = np.linalg.eigh(np.cov((patches - mean).T))
    keep = slice(-1, -config.latent_channels - 1, -1)
    basis, std = vectors[:, keep], np.sqrt(values[keep])
    logvar = np.repeat([0.0, -6.0], config.latent_channels)
    for variable, numbers in (
        (vae.encoder_skip.kernel, basis / std),
        (vae.encoder_skip.bias, -mean @ (basis / std)),
        (vae.decoder_skip.kernel, (basis * std).T),
        (vae.decoder_skip.bias, mean),
        (vae.quant_conv.bias, logvar),
    ):
        variable.set_value(jax.device_put(numbers.astype(np.float32)))
    for layer in (vae.quant_conv, vae.decoder.conv_out):
        start_at_zero(layer.kernel)


def standardised(config: VAEConfig, moments: np.ndarray) -> VAEConfig:
    """`config` with the mean and standard deviation by channel of moments [N, h, w, 2 c]."""
    z = moments[..., : config.latent_channels].astype(np.float64)
    mean, std = z.mean((0, 1, 2)), z.std((0, 1, 2))
    return replace(config, latent_mean=tuple(map(float, mean)), latent_std=tuple(map(float, std)))


NORMS = ("l1", "l2")
SMALL = 0.01  # in [-1, 1]: "l1" is smooth below 1.3 grey levels


def codec_loss(
    vae: VAE,
    images: Float[Array, "b H W 3"],
    keys: jax.Array,
    kl_weight: float,
    edge_weight: float,
    norm: str = "l2",
) -> tuple[jax.Array, dict]:
    """Reconstruction, its gradients, KL to the unit normal; a key for each example.

    Mean error + `edge_weight` x that of horizontal and vertical differences + `kl_weight` x KL per
    latent number. `norm` of an error: "l2" (its square) or "l1" (Charbonnier's, sqrt(e^2 + s^2)),
    which cares as much for faint edges as for strong ones. Returns the loss and metrics of each
    image, [B] (psnr in dB over [-1, 1], kl).
    """
    if norm not in NORMS:
        raise ValueError(f"codec norm {norm!r}; allowed: {', '.join(NORMS)}")
    of = jnp.square if norm == "l2" else lambda e: jnp.sqrt(e**2 + SMALL**2)
    mean, logvar = jnp.split(vae.encode(images), 2, axis=-1)
    noise = jax.vmap(lambda k: jax.random.normal(k, mean.shape[1:]))(keys)
    decoded = vae._decode(mean + jnp.exp(0.5 * logvar) * noise)
    error = decoded - images
    each = partial(jnp.mean, axis=(1, 2, 3))
    edges = sum(each(of(jnp.diff(error, axis=axis))) for axis in (1, 2))
    kl = 0.5 * each(mean**2 + jnp.exp(logvar) - 1.0 - logvar)
    loss = each(of(error)) + edge_weight * edges + kl_weight * kl
    return loss, {"psnr": -10.0 * jnp.log10(each(error**2) / 4.0), "kl": kl}
