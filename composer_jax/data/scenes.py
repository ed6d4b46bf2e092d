"""The built-in world: procedural 3-D scenes whose depth, objects and caption are known exactly.

One to four coloured solids stand on a floor under a sky. A scene is a pure function of
(seed, index); held-out scenes are those of other seeds. Needs nothing to download.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from composer_jax.data.captions import NUMBERS, PLURALS, caption
from composer_jax.data.raycast import HALF_HEIGHT, cast, field_of_view
from composer_jax.data.sources import Source

SHAPES = ("", "ball", "cube", "cylinder", "cone", "torus")  # by raycast's number
COLOURS = {
    "red": (0.84, 0.10, 0.12),
    "orange": (0.96, 0.50, 0.08),
    "yellow": (0.96, 0.83, 0.16),
    "green": (0.16, 0.60, 0.22),
    "cyan": (0.20, 0.78, 0.80),
    "blue": (0.12, 0.27, 0.82),
    "purple": (0.48, 0.18, 0.66),
    "pink": (0.95, 0.52, 0.68),
    "brown": (0.44, 0.26, 0.12),
    "white": (0.93, 0.93, 0.92),
}
FLOORS = {
    "grey": (0.55, 0.55, 0.56),
    "dark": (0.24, 0.25, 0.28),
    "sandy": (0.82, 0.71, 0.52),
    "green": (0.46, 0.60, 0.36),
    "wooden": (0.62, 0.42, 0.27),
    "pale": (0.82, 0.82, 0.80),
}
SKIES = {
    "clear": (0.36, 0.58, 0.90),
    "grey": (0.62, 0.66, 0.70),
    "pink": (0.88, 0.56, 0.60),
    "dark": (0.14, 0.16, 0.30),
}
SIZES = {"small": (0.48, 0.58), "large": (0.84, 1.02)}
MATERIALS = ("matte", "shiny")
KINDS = ("shape", "colour", "size")
EXCLUSIVE = (  # words of captions of which one makes another false
    SHAPES[1:],
    tuple(PLURALS.get(shape, shape + "s") for shape in SHAPES[1:]),
    tuple(COLOURS),
    tuple(SIZES),
    MATERIALS,
    NUMBERS[2:],
    ("left of", "right of"),
    ("in front of", "behind"),
)
MOST = 4
CHUNK = 16
TEST_SEED = 1 << 20  # added to the seed for held-out scenes; training's from here on are moved
MOVED = 1 << 63  # by this, so that no scene is both


def describe(seed: int, index: int) -> dict:
    """Everything about one scene: arrays for the ray caster, and attributes by name.

    Arrays have `MOST` rows for objects, of which the first `count` stand in the scene. `objects`
    is a list of dicts (shape, colour, size, material, screen x in [-1, 1], distance).
    """
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, index], np.uint64)))
    count = int(rng.integers(1, MOST + 1))
    distance, height = rng.uniform(4.6, 6.6), rng.uniform(1.5, 4.0)
    turn, lens = rng.uniform(0, 2 * math.pi), field_of_view(rng.uniform(44, 58))
    camera = np.array([-math.sin(turn) * distance, height, -math.cos(turn) * distance])
    pitch = math.atan2(height - 0.5, distance) + rng.uniform(-0.07, 0.05)
    objects, rows = [], []
    for _ in range(200):
        if len(rows) == count:
            break
        shape, colour = int(rng.integers(1, len(SHAPES))), str(rng.choice(list(COLOURS)))
        size, material = str(rng.choice(list(SIZES))), int(rng.integers(2))
        if objects and rng.random() < 0.15:  # twins, so that captions can count
            twin = objects[-1]
            shape, colour, size = SHAPES.index(twin["shape"]), twin["colour"], twin["size"]
            material = MATERIALS.index(twin["material"])
        radius = rng.uniform(*SIZES[size])
        where, far = rng.uniform(0, 2 * math.pi), 2.4 * math.sqrt(rng.random())
        position = np.array([math.cos(where) * far, HALF_HEIGHT[shape] * radius,
                             math.sin(where) * far])  # fmt: skip
        x, z = _on_screen(position, camera, turn, pitch, lens)
        wide = radius / (z * lens)
        row = {"position": position, "radius": radius, "x": x, "z": z, "wide": wide}
        if abs(x) + wide > 0.98 or any(_clash(row, other) for other in rows):
            continue
        rows.append(row | {"shape": shape, "material": material, "yaw": rng.uniform(0, math.pi)})
        rows[-1]["colour"] = np.clip(np.array(COLOURS[colour]) + rng.normal(0, 0.02, 3), 0, 1)
        objects.append({"shape": SHAPES[shape], "colour": colour, "size": size,
                        "material": MATERIALS[material], "x": x, "distance": z})  # fmt: skip
    floor, sky = str(rng.choice(list(FLOORS))), str(rng.choice(list(SKIES)))
    azimuth, elevation = rng.uniform(0, 2 * math.pi), rng.uniform(0.6, 1.2)
    light = [math.cos(azimuth) * math.cos(elevation), math.sin(elevation),
             math.sin(azimuth) * math.cos(elevation)]  # fmt: skip
    scene = {
        "count": len(rows),
        "shape": _rows(rows, "shape", ()).astype(np.int32),
        "position": _rows(rows, "position", (3,)),
        "radius": np.maximum(_rows(rows, "radius", ()), 1e-3),
        "yaw": _rows(rows, "yaw", ()),
        "colour": _rows(rows, "colour", (3,)),
        "gloss": _rows(rows, "material", ()),
        "camera": camera,
        "pitch": pitch,
        "turn": turn,
        "lens": lens,
        "light": np.array(light),
        "floor": np.clip(np.array(FLOORS[floor]) + rng.normal(0, 0.02, 3), 0, 1),
        "checker": 0.14 * rng.integers(2),
        "sky": np.clip(np.array(SKIES[sky]) + rng.normal(0, 0.02, 3), 0, 1),
    }
    words = caption(objects, floor, sky, rng)
    return {"scene": scene, "objects": objects, "floor": floor, "sky": sky, "caption": words}


def _on_screen(position, camera, turn: float, pitch: float, lens: float) -> tuple[float, float]:
    """Screen x in [-1, 1] and distance along the view of a point."""
    relative = position - camera
    forward = np.array([math.sin(turn) * math.cos(pitch), -math.sin(pitch),
                        math.cos(turn) * math.cos(pitch)])  # fmt: skip
    right = np.array([math.cos(turn), 0.0, -math.sin(turn)])
    z = float(relative @ forward)
    return float(relative @ right) / (z * lens), z


def _clash(a: dict, b: dict) -> bool:
    """Whether two objects touch, or one hides most of the other."""
    apart = np.hypot(*(a["position"] - b["position"])[[0, 2]])
    if apart < 1.15 * (a["radius"] + b["radius"]) + 0.1:
        return True
    return abs(a["x"] - b["x"]) < 0.75 * max(a["wide"], b["wide"])


def _rows(rows: Sequence[dict], key: str, shape: tuple[int, ...]) -> np.ndarray:
    padded = np.zeros((MOST, *shape), np.float32)
    for i, row in enumerate(rows):
        padded[i] = row[key]
    return padded


def render(described: Sequence[dict], size: int, samples: int = 2) -> dict[str, np.ndarray]:
    """Pictures of scenes that `describe` gave.

    Returns image uint8 [B, size, size, 3], depth float32 [B, size, size] (distance along the ray,
    inf for the sky), instances int32 [B, size, size] (object i of the scene is i + 1).
    """
    starts = range(0, len(described), CHUNK)
    host = _host()

    def one(start: int) -> dict[str, np.ndarray]:
        chunk = list(described[start : start + CHUNK])
        chunk += chunk[-1:] * (-len(chunk) % CHUNK)  # one shape, one compilation
        scenes = {key: np.stack([d["scene"][key] for d in chunk]) for key in chunk[0]["scene"]}
        with jax.default_device(host):
            as_jax = {
                key: jnp.asarray(v, jnp.int32 if v.dtype.kind == "i" else jnp.float32)
                for key, v in scenes.items()
            }
            return jax.device_get(cast(as_jax, size, samples))

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # a chunk keeps one core busy
        parts = [one(0), *pool.map(one, starts[1:])]
    return {key: np.concatenate([p[key] for p in parts])[: len(described)] for key in parts[0]}


def _host() -> jax.Device | None:
    """The CPU, as a GPU would wait for it at every branch of the ray caster; None where
    JAX_PLATFORMS leaves it out."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


class Scenes(Source):
    """`count` scenes of a seed, rendered when asked for; `split="test"` are never trained on."""

    def __init__(self, count: int, *, size: int, seed: int = 0, split: str = "train"):
        self.name, self.size, self.count, self.split = f"scenes:{count}", size, count, split
        trained = 0 if seed < TEST_SEED else MOVED
        self.seed = seed + (TEST_SEED if split == "test" else trained)

    @property
    def key(self) -> str:
        """Scenes of another seed are others."""
        return f"{self.name} of seed {self.seed}"

    def __len__(self) -> int:
        return self.count

    def drawn(self, count: int, seed: int) -> np.ndarray:
        """The first ones: each was drawn by itself."""
        return np.arange(min(count, self.count))

    def batch(self, indices: Sequence[int]) -> dict:
        """Images and all that is known: caption, distance, instances, classes, attributes."""
        described = [describe(self.seed, int(i)) for i in indices]
        rendered = render(described, self.size)
        objects = np.zeros((len(described), MOST + 1, 5), np.float32)
        for rows, scene in zip(objects, described, strict=True):
            for i, thing in enumerate(scene["objects"]):
                kinds = zip((SHAPES, list(COLOURS), list(SIZES)), KINDS, strict=True)
                rows[i + 1] = [*(known.index(thing[key]) for known, key in kinds),
                               thing["x"], thing["distance"]]  # fmt: skip
        given = {
            "caption": [d["caption"] for d in described],
            "distance": rendered["depth"],
            "instances": rendered["instances"],
            "classes": objects[..., 0].astype(np.int32),
            "objects": objects,  # by id: shape, colour, size as numbers, screen x, distance
        }
        facts = [{key: d[key] for key in ("objects", "floor", "sky")} for d in described]
        return {"image": rendered["image"], "given": given, "facts": facts}
