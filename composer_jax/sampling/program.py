"""The sampler as one XLA program: plain dicts of arrays in, images out.

Everything a person can turn is an array here, so turning it compiles nothing anew: values, the plan
of guidance, the grid of times, noise, an image to start from. What does compile a program of its
own is in `Kind`, and the sizes of the arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from composer_jax.diffusion import inversion, solvers
from composer_jax.diffusion.guidance import mix, rescale
from composer_jax.diffusion.process import Process
from composer_jax.models.composer import Composer
from composer_jax.models.vae import VAE
from composer_jax.sampling.once import hoisted
from composer_jax.sampling.rows import Rows, arrange, evaluate_rows
from composer_jax.utils.seeds import key_of


@dataclass(frozen=True)
class Kind:
    """What compiles a program of its own, beside the sizes of the inputs.

    `solver`; `noisy`: ddim draws noise; `guide`: how many rows the second network evaluates;
    `inversion`: a way of `diffusion.invert`, from image to noise, or nothing; `iterations`: its;
    `probe`: rows are compared with each other at every evaluation; `preview`: the host sees x0 on
    the way.
    """

    solver: str
    noisy: bool = False
    guide: int = 0
    inversion: str = ""
    iterations: int = 0
    probe: bool = False
    preview: bool = False


@dataclass(frozen=True)
class Networks:
    """What a program evaluates; `guide` is the second network of autoguidance."""

    composer: Composer
    vae: VAE
    guide: Composer | None = None


def program(
    networks: Networks,
    process: Process,
    kind: Kind,
    inputs: Mapping[str, Any],
    preview: Callable[[Any, Any], None] | None = None,
) -> dict[str, jax.Array]:
    """Encodes conditions once, solves, decodes.

    `inputs`, of B images, a plan of K rows and a bank of J values:

        values      condition -> part -> float32 [B, J, ...]: the bank
        plan        the fields of `diffusion.Plan`
        times       float32 [steps + 1]: the solver's grid
        seeds       uint32 [B, 3]: the seed's words and the index of each image's noise
        noise       float32 [B, h, w, c], in place of drawn noise where `own_noise`
        known       float32 [B, h, w, c]: latents of given images
        from_known  whether sampling starts from them, diffused to the first time
        keep        float32 [B, h, w, 1]: where the predicted x0 is theirs
        eta, rescale  ddim's noise, CFG rescale
        every       evaluations between previews (if `kind.preview`)
        probe       int32 [P]: rows, whose differences from the first are compared (`kind.probe`)

    Returns `images` uint8 [B, H, W, 3] and `latents` float32 [B, h, w, c]; an inversion `latents`
    alone, x_T; a probe also `cosines` float32 [S, B, P - 1, P - 1]. `preview(index, images)` is
    called on the host every so many evaluations, with what x0 is predicted to be.
    """
    known, times = inputs["known"], inputs["times"]
    evaluate = _evaluation(networks, process, kind, inputs, preview)
    if kind.inversion:
        way = (kind.solver, kind.inversion, kind.iterations)
        return {"latents": inversion.invert(evaluate, known, times, process, *way)}
    keys = jax.vmap(lambda s: jax.random.fold_in(key_of(s[:2]), s[2]))(inputs["seeds"])
    drawn = jax.vmap(lambda key: jax.random.normal(key, known.shape[1:]))(keys)
    noise = jnp.where(inputs["own_noise"], inputs["noise"], drawn)
    latents = solvers.sample(
        evaluate,
        jnp.where(inputs["from_known"], process.diffuse(known, noise, times[0]), noise),
        times,
        process,
        kind.solver,
        key=jax.vmap(jax.random.fold_in, (0, None))(keys, 1) if kind.noisy else None,
        eta=inputs["eta"] if kind.noisy else 0.0,
        has_aux=kind.probe,
    )
    found = {}
    if kind.probe:
        latents, found["cosines"] = latents
    return found | {"images": to_images(networks.vae, latents), "latents": latents}


def to_images(vae: VAE, latents: Float[Array, "b h w c"]) -> jax.Array:
    """Decodes latents to uint8 [B, H, W, 3]."""
    images = jnp.clip(vae.decode(latents).astype(jnp.float32), -1.0, 1.0)
    return jnp.round((images + 1.0) * 127.5).astype(jnp.uint8)


def _evaluation(networks, process, kind, inputs, preview) -> solvers.Evaluate:
    """The evaluation that a solver asks for: the rows of the plan, mixed."""
    plan, values, amount = inputs["plan"], inputs["values"], inputs["rescale"]
    source = plan["source"]
    rows = arrange(networks.composer, values, source)
    shapes = inputs["known"], inputs["times"][0], plan["strength"][0], plan["area"][0]
    every_row = hoisted(partial(evaluate_rows, networks.composer, rows), *shapes)
    if len(source) > 1:
        row = hoisted(partial(_evaluate_row, networks.composer, rows), jnp.int32(0), *shapes)
    if kind.guide:
        guides = arrange(networks.guide, values, source[: kind.guide])
        shapes = *shapes[:2], shapes[2][: kind.guide], shapes[3]
        guide_rows = hoisted(partial(evaluate_rows, networks.guide, guides), *shapes)

    def evaluate(x, t, index):
        at = process.timestep(t)
        weight, given, guide, strength, area = (
            plan[key][index] for key in ("weight", "given", "guide", "strength", "area")
        )

        def mixed():
            outputs = every_row(x, at, strength, area)
            return mix(outputs, weight), mix(outputs, given)

        def one_mixed():
            k = jnp.argmax(acting)
            output = row(k, x, at, strength, area)
            one = partial(jax.lax.dynamic_slice_in_dim, start_index=k, slice_size=1)
            return mix(output, one(weight)), mix(output, one(given))

        acting = jnp.any((weight != 0.0) | ((amount > 0.0) & (given != 0.0)), axis=(1, 2))
        if kind.probe:
            outputs = every_row(x, at, strength, area)
            cosines = _cosines(outputs[inputs["probe"]])
            output, positive = mix(outputs, weight), mix(outputs, given)
        elif len(source) > 1:
            # an evaluation in which one row alone has weight runs that row alone
            output, positive = jax.lax.cond(acting.sum() == 1, one_mixed, mixed)
        else:
            output, positive = mixed()
        if kind.guide:
            output += jax.lax.cond(
                jnp.any(guide != 0.0),
                lambda: mix(guide_rows(x, at, strength[: kind.guide], area), guide[: kind.guide]),
                lambda: jnp.zeros_like(x),
            )
        output = rescale(output, positive, amount)
        output = _keep(process, output, x, t, inputs["known"], inputs["keep"])
        if kind.preview:
            _show(networks.vae, process, output, x, t, index, inputs["every"], preview)
        return (output, cosines) if kind.probe else output

    return evaluate


def _evaluate_row(composer, rows: Rows, k, x, timestep, strength, area) -> jax.Array:
    """Row k's output alone, [1, B, h, w, c]."""
    strength_1xn = jax.lax.dynamic_slice_in_dim(strength, k, 1)
    return evaluate_rows(composer, rows.only(k), x, timestep, strength_1xn, area)


def _keep(process, output, x, t, known, keep) -> jax.Array:
    """The raw output whose x0 is `known`'s where `keep` says so, and the network's elsewhere."""
    alpha, sigma = process.alpha_sigma(t)
    x0, _ = process.x0_eps(output, x, t)
    x0 = keep * known + (1.0 - keep) * x0
    kept = process.target(x0, (x - alpha * x0) / jnp.maximum(sigma, 1e-8), t)
    return jnp.where(keep > 0.0, kept, output)


def _show(vae, process, output, x, t, index, every, preview) -> None:
    """Calls `preview` with the prediction of x0, every so many evaluations."""

    def show():
        x0, _ = process.x0_eps(output, x, t)
        jax.debug.callback(preview, index, to_images(vae, x0))

    jax.lax.cond(index % every == 0, show, lambda: None)


def _cosines(outputs: Float[Array, "p b h w c"]) -> Float[Array, "b q q"]:
    """Cosines between the differences of rows 1, 2, ... from row 0; 0 where one has no length."""
    moved = (outputs[1:] - outputs[:1]).reshape(outputs.shape[0] - 1, outputs.shape[1], -1)
    moved /= jnp.maximum(jnp.linalg.norm(moved, axis=-1, keepdims=True), 1e-12)
    return jnp.einsum("pbd,qbd->bpq", moved, moved)
