"""Composable, controllable latent diffusion in JAX.

    import composer_jax as cj

    conditions = cj.decompose(image)          # dict: condition -> stored value
    pipe = cj.Pipeline.load("runs/scenes64")  # a model directory or a training workdir
    images = pipe({"caption": "a red cone", "sketch": cj.use(edges, strength=0.7)}, count=4)

Names are imported when first used; importing the package imports nothing heavy.
"""

import importlib

_WHERE = {
    "Condition": "composer_jax.conditions",
    "Pipeline": "composer_jax.sampling.pipeline",
    "decompose": "composer_jax.commands.decompose",
    "load_image": "composer_jax.conditions",
    "open_source": "composer_jax.data.sources",
    "register": "composer_jax.conditions",
    "use": "composer_jax.diffusion",
}
__all__ = list(_WHERE)


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"composer_jax has no {name!r}; it has {', '.join(_WHERE)}")
    return getattr(importlib.import_module(_WHERE[name]), name)
