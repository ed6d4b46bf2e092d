"""Composer's tasks: an image taken apart, some of its factors changed, put together again.

Each function is its definition in arXiv 2302.09778, sections 3.2 and 3.3, on top of three moves:

    sample        under any set c of factors
    reconfigure   x_T by DDIM inversion under the image's c1; from it, sampling under c2, guided by
                  w * eps(c2) + (1 - w) * eps(c1)
    within        a region, with either: the model sees the masked image, what x0 is predicted to be
                  is the image's outside, and so, at last, are the pixels

All take a pipeline, images (uint8 [H, W, 3], paths or `Picture`s) and, by keyword,

    given     condition -> value (as `Pipeline` takes it): factors the result is to have, whatever
              the image has
    hold      the factors that the result shares with the (first) image, each of which must be
              there; else the task's own choice, as far as the model has them and the image gives
    vary      factors that are left out of that choice
    region    float [H, W] in [0, 1], 1 where the picture may change; elsewhere pixels stay
    border    pixels over which the change fades in, from the region's edge inwards

with `count`, `seed` and the options of the pipeline. They return uint8 [count, size, size, 3], at
the model's size, and raise ValueError, one line, for what cannot be done. What is reconfigured
depends on the seed only where `eta` is above 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from composer_jax import conditions
from composer_jax.conditions import Value
from composer_jax.conditions.base import listed, slerp
from composer_jax.diffusion import Use, two_sets, use
from composer_jax.diffusion.inversion import SOLVER
from composer_jax.diffusion.settings import SETTINGS
from composer_jax.sampling.options import GRID
from composer_jax.sampling.picture import Picture
from composer_jax.sampling.pipeline import Pipeline
from composer_jax.utils.values import MOST, number, shown, whole

CONTENT = ("sketch", "depth", "instances")  # where things are, and their shapes
STYLE = ("palette", "semantics")  # how they look
GLOBAL = ("caption", *STYLE)  # what has no place in the picture
GUIDANCE = 1.5  # of reconfigurations: more changes more, also what should stay


def variation(pipe, image, *, given=None, hold=None, vary=(), **options) -> np.ndarray:
    """New images that share an image's global factors, or others by `hold` (3.2, Variations)."""
    picture, given = _picture(pipe, image), pipe.uses(given or {})
    return _sample(pipe, picture, picture.held(GLOBAL, given, hold, vary) | given, **options)


def interpolation(
    pipe,
    first,
    second,
    *,
    given=None,
    hold=(),
    hold_second=(),
    vary=None,
    count=7,
    seed=0,
    **options,
) -> np.ndarray:
    """`count` images on the way from one to another (3.2, Interpolations).

    The factors `vary`, by default the global ones, move, embeddings on the sphere, histograms
    straight, and so does x_T, on the sphere between the two that inversion gives under each image's
    own factors. `hold` and `hold_second` name factors of the first and of the second image that
    stay. Where none stays, the way begins and ends at the images themselves.
    """
    if not whole(2).holds(count):
        raise ValueError(f"count is {shown(count)}; a way has at least 2 images, its ends")
    hold, hold_second = listed(hold), listed(hold_second)
    vary = None if vary is None else listed(vary)
    _check_apart(hold=hold, hold_second=hold_second, given=given or {}, vary=vary or ())
    a, b = _picture(pipe, first), _picture(pipe, second)
    stay = {n: a.factor(n) for n in hold} | {n: b.factor(n) for n in hold_second}
    stay = pipe.uses(stay | (given or {}))
    options = {"guidance": 1.0, "solver": SOLVER} | options
    for name in vary or ():
        a.factor(name), b.factor(name)  # what is asked for must be there
    vary = GLOBAL if vary is None else vary
    own = [picture.factors([*vary, *stay]) for picture in (a, b)]
    ends = [_inverted(pipe, picture, c, options) for picture, c in zip((a, b), own, strict=True)]
    move = [n for n in vary if n not in stay and all(n in c for c in own)]
    amounts = np.linspace(0.0, 1.0, count)
    stored = [
        {n: [u.value for u in uses] for n, uses in stay.items()}
        | {n: [_blend(n, *(c[n] for c in own), amount)] for n in move}
        for amount in amounts
    ]
    noise = np.concatenate([_between(*ends, amount) for amount in amounts])
    uses = stay | {n: [Use(None)] for n in move}
    return pipe.sample(
        uses, stored, seeds=[(seed, i) for i in range(count)], noise=noise, **options
    )


def reconfiguration(pipe, image, given, *, hold=None, vary=(), **options) -> np.ndarray:
    """The image, but for the factors given: x_T under its c1, then c2 (3.2, Reconfigurations)."""
    picture, given = _picture(pipe, image), pipe.uses(given)
    held = picture.held(CONTENT, given, hold, vary)
    return _reconfigure(pipe, picture, held, given, **options)


def region_edit(pipe, image, region, given, **options) -> np.ndarray:
    """A reconfiguration within a region, the picture around it known (3.2, Editable region)."""
    return reconfiguration(pipe, image, given, region=region, **options)


def colourisation(pipe, image, palette, *, given=None, hold=None, vary=(), **options) -> np.ndarray:
    """Grey levels of an image, colours of a palette (3.3, Palette-based colorization).

    A reconfiguration, of the paper's two ways the one that it prefers. With "intensity" in `vary`
    a palette may change the grey levels, too.
    """
    options = {"guidance": 1.0} | options  # more overshoots the palette
    picture, given = _picture(pipe, image), pipe.uses({**(given or {}), "palette": palette})
    held = picture.held(("intensity", *CONTENT), given, hold, vary)
    return _reconfigure(pipe, picture, held, given, **options)


def style_transfer(
    pipe, content, style, *, strength=1.0, given=None, hold=None, vary=(), **options
) -> np.ndarray:
    """Content of one image in the style of another; `strength` leads from the style of the first
    (0) to that of the second (1) (3.3, Style transfer)."""
    picture, given = _picture(pipe, content), pipe.uses(given or {})
    held = picture.held(CONTENT, given, hold, vary)
    own, other = (p.factors(STYLE) for p in (picture, _picture(pipe, style)))
    strength = use(None, strength).strength  # checked
    styled = {n: _blend(n, own[n], other[n], strength) for n in own if n in other}
    return _sample(pipe, picture, styled | held | given, **options)


def translation(pipe, image, caption, *, given=None, hold=None, vary=(), **options) -> np.ndarray:
    """The content of an image in the domain that a caption names (3.3, Image translation)."""
    return reconfiguration(
        pipe, image, {**(given or {}), "caption": caption}, hold=hold, vary=vary, **options
    )


def pose_transfer(
    pipe, image, instances, *, given=None, hold=None, vary=(), **options
) -> np.ndarray:
    """What an image shows, by its semantics, where new instances say (3.3, Pose transfer)."""
    options = {"guidance": 1.0} | options  # more distorts what moves
    picture = _picture(pipe, image)
    given = pipe.uses({**(given or {}), "instances": instances})
    held = picture.held(("semantics", "palette"), given, hold, vary)
    return _reconfigure(pipe, picture, held, given, **options)


def try_on(
    pipe, body, garment, region, *, garment_region=None, given=None, hold=None, vary=(), **options
) -> np.ndarray:
    """A garment, by its semantics, worn in the region of another image (3.3, Virtual try-on).

    `garment_region` float [H, W]: where the garment is in its own image. By default the body's
    depth and instances are held: the garment takes its shape.
    """
    picture, worn = _picture(pipe, body), _picture(pipe, garment)
    worn = worn if garment_region is None else worn.alone(garment_region)
    given = pipe.uses({"semantics": worn.factor("semantics"), **(given or {})})
    held = picture.held(("depth", "instances"), given, hold, vary)
    return _sample(pipe, picture, held | given, region=region, **options)


def image_to_image(
    pipe, image, *, strength=0.6, given=None, hold=(), vary=(), **options
) -> np.ndarray:
    """Sampling from the image, diffused to process time `strength` (arXiv 2108.01073)."""
    SETTINGS["start"].check("strength", strength)
    if "start" in options:
        raise ValueError("start is what strength says here; give strength alone")
    picture, given = _picture(pipe, image), pipe.uses(given or {})
    held = picture.held((), given, hold, vary)
    if strength < 1.0:
        options |= {"image": picture.pixels, "start": strength}
    return _sample(pipe, picture, held | given, **options)


def inpainting(pipe, image, region, *, given=None, hold=(), vary=(), **options) -> np.ndarray:
    """A region filled by what is around it and, if anything is, given."""
    picture, given = _picture(pipe, image), pipe.uses(given or {})
    held = picture.held((), given, hold, vary)
    return _sample(pipe, picture, held | given, region=region, **options)


def composite(image, made, region, border: float = 0.0) -> np.ndarray:
    """`made` uint8 [B, H, W, 3] within a region float32 [H, W], else `image` uint8 [H, W, 3].

    `border`: pixels over which `made` fades in, from the region's edge inwards.
    """
    from scipy.ndimage import distance_transform_edt

    inside = region > 0.0
    deep = np.full(region.shape, np.inf) if inside.all() else distance_transform_edt(inside)
    share = (region * np.minimum(deep / (border + 1.0), 1.0))[..., None]
    return np.rint(image + share * (made.astype(np.float32) - image)).astype(np.uint8)


def _check_apart(**named) -> None:
    """Raises ValueError for a factor that two options name."""
    seen: dict[str, str] = {}
    for option, names in named.items():
        for name in names:
            conditions.get(name)
            if seen.setdefault(name, option) != option:
                raise ValueError(f"{seen[name]} and {option} both name {name}; one can have it")


def _check_border(region, border: float) -> None:
    number(0.0, MOST).check("border", border)
    if border and region is None:
        raise ValueError("border is for region, which is not given")


def _picture(pipe: Pipeline, image: Any) -> Picture:
    return image if isinstance(image, Picture) else Picture(pipe, image)


def _sample(pipe, picture, given, *, region=None, border=0.0, **options) -> np.ndarray:
    """Samples under `given`; within a region, if there is one."""
    _check_border(region, border)
    if region is None:
        return pipe(given, **options)
    region = picture.region(region)
    options = {"image": picture.pixels} | options
    made = pipe(_masked(pipe, picture, region) | given, keep=1.0 - region, **options)
    return composite(picture.pixels, made, region, border)


def _reconfigure(pipe, picture, held, given, *, count=1, eta=0.0, **options) -> np.ndarray:
    """From the x_T of the picture under its c1, samples under c2, in which `given` differs."""
    _check_border(options.get("region"), options.get("border", 0.0))
    if options.get("start", 1.0) != 1.0:
        raise ValueError("start is 1 here: a reconfiguration begins from the noise it inverts to")
    whole(1).check("count", count)
    if count > 1 and not eta:
        raise ValueError(f"count is {count}, but all would be the same; give eta above 0, too")
    options = {"guidance": GUIDANCE, "solver": SOLVER} | options
    if options.get("region") is not None:
        held = held | _masked(pipe, picture, picture.region(options["region"]))
    c1, c2 = held | picture.factors(given), held | given
    noise = np.repeat(_inverted(pipe, picture, c1, options), count, axis=0)
    options |= {"noise": noise, "count": count, "eta": eta}
    both = c2 if options["guidance"] == 1.0 else two_sets(c1, c2)  # 1 - w is 0
    return _sample(pipe, picture, both, **options)


def _inverted(pipe, picture, given, options) -> np.ndarray:
    """x_T float32 [1, h, w, c] that a picture is made of under its factors."""
    way = {name: options[name] for name in (*GRID, "solver", "steps") if name in options}
    return pipe.invert(picture.pixels, given, batch=1, **way)


def _blend(name: str, a: Any, b: Any, amount: float) -> Value:
    """A condition between two stored values."""
    condition = conditions.get(name)
    values = [one if isinstance(one, Value) else condition.value(one) for one in (a, b)]
    return condition.blend(*values, amount)


def _between(a: np.ndarray, b: np.ndarray, amount: float) -> np.ndarray:
    """Noise between two, on the sphere."""
    return np.asarray(slerp(a.ravel(), b.ravel(), amount)).reshape(a.shape)


def _masked(pipe, picture, region: np.ndarray) -> dict[str, Any]:
    """What a model that knows masks is told of the picture around a region."""
    if "mask" not in pipe.names:
        return {}
    return {"mask": {"image": picture.pixels, "keep": np.uint8(255) * (region == 0.0)}}


@dataclass(frozen=True)
class Task:
    """What a task takes by hand.

    `doc`: what it does, for a person. `images`: what its images are, in order. `needs`: which of
    its options and of the conditions must be given ("given": any condition). `options`: those it
    takes beside `given`, `seed` and the pipeline's. `count`: of images, where nobody says.
    """

    function: Callable[..., np.ndarray]
    doc: str
    images: tuple[str, ...] = ("image",)
    needs: tuple[str, ...] = ()
    options: tuple[str, ...] = ("hold", "vary", "region", "border")
    count: int = 4


TASKS = {
    "variation": Task(variation, "new images that share some factors of one, by default its look"),
    "interpolation": Task(
        interpolation,
        "images on the way from one to another",
        images=("first", "second"),
        options=("hold", "hold_second", "vary"),
        count=7,
    ),
    "reconfiguration": Task(
        reconfiguration, "an image with some factors changed", needs=("given",), count=1
    ),
    "region-edit": Task(
        region_edit,
        "an image with some factors changed, in a region alone",
        needs=("region", "given"),
        count=1,
    ),
    "colourisation": Task(
        colourisation, "the same image in other colours", needs=("palette",), count=1
    ),
    "style-transfer": Task(
        style_transfer,
        "the content of one image in the style of another",
        images=("content", "style"),
        options=("strength", *Task.options),
    ),
    "translation": Task(
        translation, "the content of an image in what a caption says", needs=("caption",), count=1
    ),
    "pose-transfer": Task(
        pose_transfer, "what an image shows, where new instances are", needs=("instances",), count=1
    ),
    "try-on": Task(
        try_on,
        "what one image shows, worn in a region of another",
        images=("body", "garment"),
        needs=("region",),
        options=("garment_region", *Task.options),
    ),
    "image-to-image": Task(
        image_to_image,
        "new images near one, by strength",
        options=("strength", *Task.options),
    ),
    "inpainting": Task(inpainting, "a region filled anew", needs=("region",)),
}
