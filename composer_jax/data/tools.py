"""The networks that conditions are taken by, from what a user named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from composer_jax.models.files import member, read_json
from composer_jax.storage.models import clip_source, find_part, load_depth

WORLD = 64  # pixels: the built-in world's images, which depth regressors are trained on


def load_tools(
    *, clip: str = "", depth: str = "", edges: str = "", segmenter: str = ""
) -> dict[str, Any]:
    """Tools by name, as conditions ask for them; what is "" is left out.

    `clip`: "bundled", a folder or a hub's name; `depth`: as `load_depth_tool` takes it; `edges`:
    HED's weights, as `load_hed` takes them; `segmenter`: an ONNX network's path. Raises ValueError,
    one line, where one cannot be had.
    """
    tools: dict[str, Any] = {}
    if clip:
        from composer_jax.models.clip import Clip

        tools["clip"] = Clip.load(clip_source(clip))
    if depth:
        tools["depth"] = load_depth_tool(depth)
    if edges:
        from composer_jax.models.hed import load_hed

        tools["edges"] = load_hed(edges).tool()
    if segmenter:
        from composer_jax.conditions.segmenter import OnnxSegmenter

        tools["segmenter"] = OnnxSegmenter(segmenter)
    return tools


def load_depth_tool(where: str) -> Callable[[np.ndarray], np.ndarray]:
    """The tool of a depth network: "bundled", a folder or hub name of Depth Anything or DPT, or a
    folder (or a workdir) of ours.

    Raises ValueError, one line, where it is none of these.
    """
    from composer_jax.models.depth import Preprocess, depth_tool
    from composer_jax.models.dpt_files import is_dpt, load_dpt

    if where != "bundled" and not Path(where).exists():
        return load_dpt(where).tool()
    folder = find_part(where, "depth")
    values = read_json(member(folder, "config.json"))
    if is_dpt(values) or "model_type" in values:  # of transformers: it says which it reads
        return load_dpt(folder).tool()
    if "widths" not in values:
        raise ValueError(
            f"{folder} holds no depth network; a folder of Depth Anything, of DPT or of a depth "
            "regressor that `composer train` made is wanted, or 'bundled'"
        )
    half = (0.5, 0.5, 0.5)
    size = (WORLD, WORLD)
    return depth_tool(load_depth(folder), Preprocess(size=size, multiple=8, mean=half, std=half))
