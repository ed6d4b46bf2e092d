"""Dense prediction transformers for monocular depth: DPT (arXiv 2103.13413) on a plain ViT, and
Depth Anything (arXiv 2401.10891, V2: 2406.09414) on DINOv2, with the numerics of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from composer_jax.models.blocks import conv, conv1, conv3, depth_to_space, layer_norm, linear
from composer_jax.models.depth import Preprocess, check_types, depth_tool
from composer_jax.models.initializers import embedding_normal, lecun_normal, zeros
from composer_jax.models.resample import resample
from composer_jax.models.transformer import TransformerLayer
from composer_jax.models.vae import strict

CHOICES = {
    "family": ("depth_anything", "dpt"),
    "readout": ("ignore", "add", "project"),
    "output": ("relative", "metric"),
}
MAX_LAYERS = 256


@dataclass(frozen=True)
class DPTConfig:
    """A depth network's shape; the defaults are Depth Anything V2's small one.

    `family`: "depth_anything" is DINOv2, bicubic positions, maps fused at the size of the next
    one, a head at the image's size; "dpt" is ViT, bilinear positions, maps doubled each time.
    `grid`: patches along a side that positions were trained for. `taps`: the layers, counted from
    1 and up to the last, whose tokens become maps; `factors`: by how much each map is larger than
    the grid of patches. `readout`: what the class token does to the others. `output`: "metric"
    networks give distances up to `max_depth`, "relative" ones inverse depth.
    """

    family: str = "depth_anything"
    grid: int = 37
    patch: int = 14
    width: int = 384
    hidden: int = 1536
    heads: int = 6
    eps: float = 1e-6
    taps: tuple[int, ...] = (3, 6, 9, 12)
    normed_taps: bool = True
    readout: str = "ignore"
    factors: tuple[float, ...] = (4.0, 2.0, 1.0, 0.5)
    neck_widths: tuple[int, ...] = (48, 96, 192, 384)
    fusion_width: int = 64
    head_width: int = 32
    output: str = "relative"
    max_depth: float = 1.0
    preprocess: Preprocess = field(default=Preprocess())

    def __post_init__(self):
        check_types(self)
        for name, allowed in CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"DPTConfig: {name} is {value!r}; allowed: {', '.join(allowed)}")
        if self.width % self.heads:
            raise ValueError(f"DPTConfig: {self.heads} heads do not divide a width of {self.width}")
        if self.fusion_width % 2:
            raise ValueError(f"DPTConfig: fusion_width is {self.fusion_width}, not even")
        if not len(self.taps) == len(self.factors) == len(self.neck_widths):
            raise ValueError("DPTConfig: taps, factors and neck_widths must be of one length")
        if list(self.taps) != sorted(set(self.taps)) or self.taps[-1] > MAX_LAYERS:
            raise ValueError(
                f"DPTConfig: taps are {list(self.taps)}; they must rise, to {MAX_LAYERS} at most"
            )
        for factor in self.factors:
            if factor % 1 and (1 / factor) % 1:
                raise ValueError(
                    f"DPTConfig: factor {factor} is neither a whole number nor one over one"
                )

    def to_dict(self) -> dict:
        """As JSON's types."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return values | {"preprocess": self.preprocess.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping) -> DPTConfig:
        """From `to_dict`'s result; raises ValueError for an unknown key or a wrong value."""
        values = strict(cls, values)
        if isinstance(values.get("preprocess"), Mapping):
            values["preprocess"] = Preprocess.from_dict(values["preprocess"])
        return cls(**values)


class Backbone(nnx.Module):
    """A vision transformer (arXiv 2010.11929; DINOv2: 2304.07193) that gives several layers."""

    def __init__(self, config: DPTConfig, *, dtype, rngs: nnx.Rngs):
        self.config, width, side = config, config.width, config.patch
        self.cls_token = nnx.Param(embedding_normal(rngs.params(), (1, 1, width)))
        positions = (1, config.grid**2 + 1, width)
        self.position_embeddings = nnx.Param(embedding_normal(rngs.params(), positions))
        options = {"dtype": dtype, "rngs": rngs}
        self.projection = conv(3, width, (side, side), strides=side, padding="VALID", **options)
        options |= {"eps": config.eps, "layer_scale": config.family == "depth_anything"}
        self.layers = nnx.List(
            [
                TransformerLayer(width, config.hidden, config.heads, **options)
                for _ in range(config.taps[-1])
            ]
        )
        if config.normed_taps:
            self.layernorm = layer_norm(width, config.eps, dtype=dtype, rngs=rngs)

    def __call__(self, images: Float[Array, "b H W 3"]) -> list[jax.Array]:
        """images [B, H, W, 3], at least a patch large; returns class and patch tokens apart,
        [B, 1, C] and [B, h, w, C], of every layer that is tapped."""
        x_BxhxwxC = self.projection(images)
        batch, height, width, channels = x_BxhxwxC.shape
        class_1x1xC, positions_1xhwxC = self._positions((height, width))
        x_BxhwxC = x_BxhxwxC.reshape(batch, -1, channels) + positions_1xhwxC.astype(x_BxhxwxC.dtype)
        class_Bx1xC = jnp.broadcast_to(class_1x1xC, (batch, 1, channels)).astype(x_BxhwxC.dtype)
        x_BxnxC = jnp.concatenate([class_Bx1xC, x_BxhwxC], axis=1)
        found = []
        for number, layer in enumerate(self.layers, 1):
            x_BxnxC = layer(x_BxnxC)
            if number in self.config.taps:
                tokens = self.layernorm(x_BxnxC) if self.config.normed_taps else x_BxnxC
                maps = tokens[:, 1:].reshape(batch, height, width, channels)
                found.append((tokens[:, :1], maps))
        return found

    def _positions(self, shape: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
        """The class token at its position, and positions for `shape` patches; float32."""
        positions = self.position_embeddings[...]
        grid_1xgxgxC = positions[:, 1:].reshape(1, self.config.grid, self.config.grid, -1)
        kind = "bicubic" if self.config.family == "depth_anything" else "bilinear"
        grid_1xhxwxC = resample(grid_1xgxgxC, shape, kind)
        class_1x1xC = self.cls_token[...] + positions[:, :1]
        return class_1x1xC, grid_1xhxwxC.reshape(1, -1, positions.shape[-1])


class Enlarge(nnx.Module):
    """A transposed convolution whose stride is its kernel's size: no two results overlap."""

    def __init__(self, channels: int, factor: int, *, dtype, rngs: nnx.Rngs):
        self.factor, self.dtype = factor, dtype
        kernel = (factor, factor, channels, channels)
        self.up_kernel = nnx.Param(lecun_normal(rngs.params(), kernel))
        self.bias = nnx.Param(zeros(rngs.params(), (channels,)))

    def __call__(self, x_BxhxwxC: Float[Array, "b h w c"]) -> Float[Array, "b H W c"]:
        """x [B, h, w, C]; returns [B, f h, f w, C], f the factor."""
        channels = x_BxhxwxC.shape[-1]
        kernel = self.up_kernel[...].astype(self.dtype).transpose(2, 0, 1, 3).reshape(channels, -1)
        bias = self.bias[...].astype(self.dtype)[None, None, None]
        return depth_to_space(x_BxhxwxC.astype(self.dtype) @ kernel, self.factor) + bias


class Reassemble(nnx.Module):
    """A layer's tokens as a map of its own size and width."""

    def __init__(self, config: DPTConfig, factor: float, width: int, *, dtype, rngs: nnx.Rngs):
        self.kind, options = config.readout, {"dtype": dtype, "rngs": rngs}
        if config.readout == "project":
            self.readout = linear(2 * config.width, config.width, **options)
        self.projection = conv1(config.width, width, **options)
        if factor > 1:
            self.resize = Enlarge(width, int(factor), **options)
        elif factor < 1:
            self.resize = conv3(width, width, stride=int(1 / factor), **options)

    def __call__(self, token_Bx1xC, x_BxhxwxC) -> Float[Array, "b h w c"]:
        """The class token [B, 1, C] and the others [B, h, w, C]; returns [B, H, W, D]."""
        token_BxhxwxC = jnp.broadcast_to(token_Bx1xC[:, :, None], x_BxhxwxC.shape)
        if self.kind == "add":
            x_BxhxwxC = x_BxhxwxC + token_BxhxwxC
        elif self.kind == "project":
            both = jnp.concatenate([x_BxhxwxC, token_BxhxwxC], axis=-1)
            x_BxhxwxC = jax.nn.gelu(self.readout(both), approximate=False)
        x_BxhxwxD = self.projection(x_BxhxwxC)
        return self.resize(x_BxhxwxD) if hasattr(self, "resize") else x_BxhxwxD


class Residual(nnx.Module):
    """Two convolutions, each after its ReLU, around a skip."""

    def __init__(self, width: int, **options):
        self.convolution1 = conv3(width, width, **options)
        self.convolution2 = conv3(width, width, **options)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """x [B, H, W, C]; returns the same shape."""
        return x + self.convolution2(jax.nn.relu(self.convolution1(jax.nn.relu(x))))


class Fusion(nnx.Module):
    """A map refined, and joined by the next larger one; `first` has none to join."""

    def __init__(self, width: int, first: bool, **options):
        if not first:
            self.residual_layer1 = Residual(width, **options)
        self.residual_layer2 = Residual(width, **options)
        self.projection = conv1(width, width, **options)

    def __call__(self, fused, x, shape: tuple[int, int]) -> Float[Array, "b H W c"]:
        """`fused` [B, h, w, C], or None for the first, and the map x; returns [B, *shape, C]."""
        if fused is not None:
            x = fused + self.residual_layer1(resample(x, fused.shape[1:3], "bilinear"))
        # The peer enlarges first: the same, as a matrix's rows sum to 1, at four times the work.
        return resample(self.projection(self.residual_layer2(x)), shape, "corners")


class Head(nnx.Module):
    """Depth from the last map."""

    def __init__(self, config: DPTConfig, **options):
        self.config, half = config, config.fusion_width // 2
        self.conv1 = conv3(config.fusion_width, half, **options)
        self.conv2 = conv3(half, config.head_width, **options)
        self.conv3 = conv1(config.head_width, 1, **options)

    def __call__(self, x, shape: tuple[int, int]) -> Float[Array, "b H W"]:
        """The map [B, h, w, C]; returns depth float32 [B, *shape]."""
        x = resample(self.conv1(x), shape, "corners")
        x = self.conv3(jax.nn.relu(self.conv2(x)))[..., 0].astype(jnp.float32)
        squash = jax.nn.sigmoid if self.config.output == "metric" else jax.nn.relu
        return squash(x) * self.config.max_depth


class DPT(nnx.Module):
    """Depth from an image of any size."""

    def __init__(self, config: DPTConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config, options = config, {"dtype": dtype, "rngs": rngs}
        self.backbone = Backbone(config, **options)
        pairs = list(zip(config.factors, config.neck_widths, strict=True))
        self.reassemble = nnx.List([Reassemble(config, *pair, **options) for pair in pairs])
        width = config.fusion_width
        self.convs = nnx.List(
            [conv3(narrow, width, use_bias=False, **options) for _, narrow in pairs]
        )
        self.fusion = nnx.List([Fusion(width, i == 0, **options) for i in range(len(pairs))])
        self.head = Head(config, **options)

    def __call__(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b h w"]:
        """images [B, H, W, 3], normalised as `config.preprocess` does; returns float32 [B, h, w].

        It is relative inverse depth, near = large, or the distance where the network is metric.
        h and w are H and W down to whole patches ("dpt" with other factors: as they give).
        """
        taps = self.backbone(images)
        maps = [
            conv(reassemble(*tap))
            for conv, reassemble, tap in zip(self.convs, self.reassemble, taps, strict=True)
        ][::-1]
        any_size = self.config.family == "depth_anything"
        fused = None
        for i, (fusion, x) in enumerate(zip(self.fusion, maps, strict=True)):
            last = i + 1 == len(maps)
            shape = _double(x if fused is None else fused)
            fused = fusion(fused, x, maps[i + 1].shape[1:3] if any_size and not last else shape)
        grid = taps[0][1].shape[1:3]
        side = self.config.patch
        return self.head(fused, (grid[0] * side, grid[1] * side) if any_size else _double(fused))

    def tool(self):
        """The depth network that the condition `depth` takes: uint8 [B, H, W, 3] to [B, H, W]."""
        metric = self.config.output == "metric"
        return depth_tool(self, self.config.preprocess, self.config.max_depth if metric else None)


def _double(x: Float[Array, "b h w c"]) -> tuple[int, int]:
    return 2 * x.shape[1], 2 * x.shape[2]
