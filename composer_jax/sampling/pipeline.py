"""The sampler: any subset of conditions, weighed, windowed and mixed, as one compiled program."""

from __future__ import annotations

import copy
import logging
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from composer_jax import conditions
from composer_jax.conditions import Value
from composer_jax.conditions.image import fit_photo, fit_region
from composer_jax.diffusion import Use, as_uses, inversion
from composer_jax.diffusion.process import Process
from composer_jax.models.clip import Clip
from composer_jax.models.files import values_of
from composer_jax.sampling.compiled import Programs
from composer_jax.sampling.job import Frame, Job, make_job, place
from composer_jax.sampling.options import EXTRAS, Options, check_extras, idle
from composer_jax.sampling.program import Networks, program
from composer_jax.storage.models import Model, load_model
from composer_jax.utils.values import shown, whole

log = logging.getLogger("composer_jax")

OUTSIDE = "lies outside the middle of the picture, which is all that the model sees of it"


class _Ready(Use):
    """A use whose value is stored, at the model's size."""


class Pipeline:
    """A model ready to sample. `names`: its conditions, in order; `size`: of its images.

    Calls with the same steps, solver and bucket of guidance rows and values share one compilation,
    whatever the conditions, how they are used, and how many images are asked for. `guide`: a
    smaller or less trained model of the same conditions and codec, for autoguidance
    (arXiv 2406.02507). Images are sampled on all devices of this process.
    """

    def __init__(self, model: Model, guide: Model | None = None, size: int | None = None):
        self.model, self.guide = model, guide
        self.names: tuple[str, ...] = model.composer.config.conditions
        with values_of(model.clip.parent / "model.json"):
            self.process = Process.from_dict(model.info["process"])
            own_size = operator.index(model.info["image_size"])
            self.defaults = Options().but(**model.info["sampler"])
        self.size: int = own_size if size is None else _checked_size(model, size)
        if guide is not None:
            for what in ("image_size", "process"):
                if _same(guide.info, what) != _same(model.info, what):
                    raise ValueError(f"the guide's {what} is {guide.info[what]}, not the model's")
            if guide.composer.config.conditions != self.names:
                raise ValueError(f"the guide has other conditions; {', '.join(self.names)} wanted")
        side = self.size // model.vae.factor
        config = model.composer.config
        self._frame = Frame(config, self.process, self.size, side, guide is not None)
        graph, state = nnx.split(_networks(model, guide))
        names, tree = list(_by_name(state)), jax.tree.structure(state)
        self._weights = place(_by_name(state))
        self._told: set[str] = set()  # what does nothing is said once
        self._preview: list[Callable] = []  # who looks now, so that another one compiles nothing

        def merged(weights) -> Networks:
            state = jax.tree.unflatten(tree, [weights[name] for name in names])
            return Networks(*nnx.merge(graph, state))

        def run(kind, weights, inputs):
            return program(merged(weights), self.process, kind, inputs, self._show)

        def encode(weights, images):
            vae = merged(weights).vae
            latents = vae.latents(vae.encode(images.astype(jnp.float32) / 127.5 - 1.0))
            return latents.astype(jnp.float32)

        about = {"model": model.composer.config.to_dict(), "codec": model.vae.config.to_dict()}
        about |= {"guide": guide and guide.composer.config.to_dict()}
        about |= {"process": self.process.to_dict()}
        about |= {"conditions": conditions.fingerprint(self.names)}
        self._program = Programs(run, about, model.clip.parent / "programs")
        self._encode = jax.jit(encode)

    @classmethod
    def load(
        cls,
        where: str | Path | None = None,
        dtype=None,
        guide: str | Path | None = None,
        size: int | None = None,
    ) -> Pipeline:
        """Opens a model directory or training workdir; without `where` the bundled model.

        `dtype`: what networks are held and compute in, "float32" or "bfloat16", by default the
        latter on accelerators, the former on CPU. `guide`: the second network's directory. `size`
        of the images, by default that of training.
        """
        second = None if guide is None else load_model(guide, dtype)
        return cls(load_model(where, dtype), second, size)

    def with_weights(self, model: Model) -> Pipeline:
        """The same pipeline for other weights of the same architecture; nothing is recompiled."""
        other = copy.copy(self)
        other.model = model
        other._weights = place(_by_name(nnx.state(_networks(model, self.guide))))
        return other

    @cached_property
    def clip(self) -> Clip:
        """The model's CLIP, opened when first needed."""
        return Clip.load(self.model.clip, **self.model.info.get("clip_text", {}))

    def tool(self, name: str) -> Any:
        """The tool that a condition's `extract`, `parse` and `measure` want, or None."""
        return self.tools([name]).get(conditions.get(name).tool)

    def tools(self, names: Sequence[str]) -> dict[str, Any]:
        """The tools of some conditions that come with the model, by name: CLIP, if one wants it."""
        return {"clip": self.clip} if any(conditions.get(n).tool == "clip" for n in names) else {}

    def __call__(
        self, given: Mapping[str, Any], *, count: int = 1, seed: int = 0, **options: Any
    ) -> np.ndarray:
        """Images uint8 [count, H, W, 3] that obey `given`.

        `given`: condition -> a value, a `use(...)` of one, or a list of uses. A value is what
        `decompose` returns, what the condition's `parse` reads, or a `Value`. Image i depends on
        `seed` and i alone. Raises ValueError, one line, for what a condition, the plan or the
        sampler cannot take. `options`: fields of `Options`, and

            noise    float32 [count, h, w, c]: x_T, in place of what seeds draw
            image    uint8 [H, W, 3], or one for each: what sampling begins from, with `start` < 1
            keep     [H, W] in [0, 1], or an image (white is 1): where x0 is to be the image's
            preview  called with (evaluation, uint8 [B, H, W, 3]), what x0 is predicted to be
            every    evaluations between previews (5)
            output   "images", or "latents" float32 [count, h, w, c], before they are decoded
        """
        return np.stack(list(self.stream(given, count=count, seed=seed, **options)))

    def stream(
        self,
        given: Mapping[str, Any],
        *,
        count: int = 1,
        seed: int = 0,
        first: int = 0,
        **options: Any,
    ) -> Iterator[np.ndarray]:
        """Images `first` to `count` - 1 of that call, one by one as they are made."""
        if not whole(1).holds(count):
            raise ValueError(f"count is {shown(count)}; a whole number, at least 1, is wanted")
        uses = self.uses(given)
        stored = {name: [u.value for u in candidates] for name, candidates in uses.items()}
        seeds = [(seed, i) for i in range(count)]
        return self._stream(self._job(uses, [stored] * count, seeds, options), first)

    def sample(
        self,
        uses: Mapping[str, Sequence[Use]],
        stored: Sequence[Mapping[str, Sequence[Any]]],
        *,
        seeds: Sequence[tuple[int, int]],
        **options: Any,
    ) -> np.ndarray:
        """One image for each entry of `stored`, used as `uses` says; uint8 [B, H, W, 3].

        `stored[b][name]`: the values of condition `name` for image b, one for each of `uses[name]`.
        `seeds[b]`: (seed, index), which the image's noise is drawn from.
        """
        if not stored:
            raise ValueError("count must be at least 1")
        return np.stack(list(self._stream(self._job(uses, stored, seeds, options))))

    def invert(
        self,
        images: np.ndarray,
        given: Mapping[str, Any],
        *,
        solver: str = inversion.SOLVER,
        way: str = inversion.WAY,
        iterations: int = inversion.ITERATIONS,
        guidance: float = 1.0,
        **options: Any,
    ) -> np.ndarray:
        """The noise float32 [B, h, w, c] that sampling makes images uint8 [B, H, W, 3] of.

        Deterministic, under any conditions; sampling takes it as `noise`, with the same conditions,
        solver, steps and guidance. `way`, `iterations`: of `diffusion.invert`; much guidance in few
        steps wants more iterations.
        """
        images = self._batch(images)
        uses = self.uses(given)
        stored = {name: [u.value for u in candidates] for name, candidates in uses.items()}
        options |= {"image": images, "solver": solver, "guidance": guidance}
        seeds = [(0, 0)] * len(images)
        job = self._job(
            uses, [stored] * len(images), seeds, options, way=way, iterations=iterations
        )
        return np.concatenate([found["latents"][wanted] for found, wanted in self._run(job)])

    def conflict(self, given: Mapping[str, Any], *, seed: int = 0, **options: Any):
        """Whether conditions pull one image apart: (names, cosines float32 [S, m, m]).

        Of the m conditions given, the cosine between each two directions of guidance, what either
        alone changes of the output for nothing given, at every evaluation on the way to the image
        that all of them give: 1 agree, 0 have nothing to do with each other, -1 contradict.
        """
        uses = self.uses(given)
        names = [name for name in self.names if any(not one.negative for one in uses.get(name, ()))]
        if len(names) < 2:
            raise ValueError("a conflict is between conditions; give two or more")
        stored = {name: [u.value for u in candidates] for name, candidates in uses.items()}
        job = self._job(uses, [stored], [(seed, 0)], {**options, "batch": 1}, probe=names)
        (found, _), *_ = self._run(job)
        return names, np.mean(found["cosines"], axis=1)

    def compile(
        self, folder: Path | None = None, *, rows: int = 2, values: int = 1, **options: Any
    ) -> Path:
        """Writes the program of a bucket as StableHLO into `folder`; returns its path.

        `rows`, `values`: K and J that it must hold: two rows are guidance, more are several values,
        regions or scales. By default into the model's `programs`, where sampling looks for it.
        """
        job = self._job({}, [{}], [(0, 0)], options, rows=rows, values=values)
        (inputs, _), *_ = job.inputs()
        folder = self._program.shipped if folder is None else folder
        return self._program.export(folder, job.kind, self._weights, inputs)

    def check(self, uses: Mapping[str, Sequence[Use]], *, seed: int = 0, **options: Any) -> None:
        """Raises ValueError for what sampling under `uses` would refuse; nothing is computed."""
        self._job(uses, [{}], [(seed, 0)], options)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Latents float32 [B, h, w, c] of images uint8 [B, H, W, 3] at the model's size."""
        return np.concatenate([self._encode(self._weights, x[None]) for x in self._batch(images)])

    def _batch(self, images: np.ndarray) -> np.ndarray:
        """Images, or one of them, as uint8 [B, H, W, 3] at the model's size; else ValueError."""
        images = np.asarray(images)
        images = images[None] if images.ndim == 3 else images
        if images.dtype != np.uint8 or images.shape[1:] != (self.size, self.size, 3):
            raise ValueError(
                f"images are {images.dtype} {list(images.shape)}; "
                f"uint8 [B, {self.size}, {self.size}, 3] are wanted, "
                "and fit_image cuts a photo to that size"
            )
        return images

    def fit_image(self, image: np.ndarray) -> np.ndarray:
        """The middle of an image uint8 [H, W, 3], at the model's size, as training sees it."""
        return fit_photo(image, (self.size, self.size))

    def uses(self, given: Mapping[str, Any]) -> dict[str, list[Use]]:
        """What a call is given, as uses of values at this model's size."""
        if not isinstance(given, Mapping):
            raise ValueError(
                f"given is {shown(given)}; a dict of conditions is wanted: {{'caption': 'a cat'}}"
            )
        return {name: self._uses(name, value) for name, value in given.items()}

    def _uses(self, name: str, value: Any) -> list[Use]:
        if name not in self.names:
            conditions.get(name)  # a name that nobody knows gets the better message
            raise ValueError(f"this model has no {name}; it has {', '.join(self.names)}")
        return [
            one if isinstance(one, _Ready) else self._ready(name, one) for one in as_uses(value)
        ]

    def _ready(self, name: str, one: Use) -> _Ready:
        region = one.region
        if region is not None:
            region = fit_region(region, (self.size, self.size))
            if not region.any():
                raise ValueError(f"{name}: the region {OUTSIDE}")
        changes = {"value": self.stored(name, one.value), "region": region}
        return _Ready(**{**vars(one), **changes})

    def stored(self, name: str, value: Any) -> Any:
        """What a person hands in, or stored already, as stored at this model's size."""
        condition = conditions.get(name)
        if isinstance(value, Value):
            return value
        tool = self.tool(name)
        stored = condition.unpacked(value, tool)
        stored = condition.parse(value, tool) if stored is None else stored
        return condition.fit(stored, (self.size, self.size))

    def _job(self, uses, stored, seeds, options: Mapping[str, Any], **how: Any) -> Job:
        """`make_job` of what a call says; tells, once, what of it does nothing."""
        said = {name: value for name, value in options.items() if value is not None}
        extras = {name: said.pop(name) for name in EXTRAS if name in said}
        options = self.defaults.but(**said)
        check_extras(options, extras, inversion="way" in how, probe="probe" in how)
        if options.autoguidance != 1.0 and self.guide is None:
            raise ValueError("autoguidance needs a second model, the pipeline's guide")
        lines = list(idle(options, said, uses, "noise" in extras, seeds))
        image = extras.pop("image", None)
        if image is not None:
            extras["known"] = self.encode(image)
        job = make_job(self._frame, options, uses, stored, seeds, **extras, **how)
        for line in lines:  # not of a call that is refused
            if line not in self._told:
                self._told.add(line)
                log.warning(line)
        return job

    def _run(self, job: Job, first: int = 0) -> Iterator[tuple[dict[str, np.ndarray], slice]]:
        """Results of one microbatch after the other, and which of their rows are wanted."""
        for inputs, wanted in job.inputs(first):
            if job.preview:
                self._preview[:] = [lambda i, x0, w=wanted: job.preview(int(i), np.asarray(x0)[w])]
            found = jax.device_get(self._program(job.kind, self._weights, inputs))
            jax.effects_barrier()
            self._preview.clear()
            yield found, wanted

    def _stream(self, job: Job, first: int = 0) -> Iterator[np.ndarray]:
        for found, wanted in self._run(job, first):
            yield from found[job.output][wanted]

    def _show(self, index: jax.Array, images: jax.Array) -> None:
        for look in self._preview:
            look(index, images)


def _checked_size(model: Model, size: int) -> int:
    step = model.composer.config.multiple
    if not isinstance(size, int) or size < step or size % step:
        raise ValueError(f"size is {size!r}; a multiple of {step} pixels is wanted")
    return size


def _same(info: Mapping, what: str) -> Any:
    """What a model says, with what older ones leave out."""
    return Process.from_dict(info[what]) if what == "process" else info[what]


def _networks(model: Model, guide: Model | None) -> tuple:
    """The fields of `Networks`."""
    return model.composer, model.vae, guide and guide.composer


def _by_name(state: nnx.State) -> dict[str, jax.Array]:
    """The arrays of networks by their dotted names."""
    leaves = jax.tree.leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
