"""A ray caster in JAX: one scene of up to four solids on a floor, its depth and its id map.

`lax.map` over scenes and `lax.switch` over shapes, with the rays of a scene vectorised inside:
`vmap` would compute every shape for every object. A vector is a tuple
(x, y, z) of arrays [P]: a stacked axis would keep XLA from vectorising what it fuses.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

FAR = 1e9
# In units of an object's size: half a cube's edge, a cylinder's radius (height 2), a cone's radius
# by height from its tip (height 2), the radii of a torus' ring and tube.
CUBE, CYLINDER, SLOPE, TORUS = 0.8, 0.8, 0.5, (0.68, 0.32)


def _dot(a, b):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _add(a, b):
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


def _mul(a, number):
    return a[0] * number, a[1] * number, a[2] * number


def _unit(a):
    return _mul(a, lax.rsqrt(jnp.maximum(_dot(a, a), 1e-12)))


def _where(condition, a, b):
    return tuple(jnp.where(condition, p, q) for p, q in zip(a, b, strict=True))


def _turn(matrix, a):
    """A matrix (rows of numbers) times a vector."""
    return tuple(_dot(row, a) for row in matrix)


def _pick(table, index):
    """table [M] at index [P]; M is small: selections beat a gather."""
    picked = jnp.full(index.shape, table[0])
    for i in range(1, table.shape[0]):
        picked = jnp.where(index == i, table[i], picked)
    return picked


def _roots(a, b, c):
    """Smaller and larger root of a t^2 + 2 b t + c, and whether they are real."""
    discriminant = b * b - a * c
    root = jnp.sqrt(jnp.maximum(discriminant, 0.0))
    safe = jnp.where(jnp.abs(a) < 1e-9, 1e-9, a)
    near, far = (-b - root) / safe, (-b + root) / safe
    return jnp.minimum(near, far), jnp.maximum(near, far), discriminant > 0.0


def _none(origin, direction):
    del origin
    return jnp.full_like(direction[0], FAR)


def _sphere(origin, direction):
    t, _, real = _roots(
        _dot(direction, direction), _dot(origin, direction), _dot(origin, origin) - 1.0
    )
    return jnp.where(real & (t > 0.0), t, FAR)


def _cube(origin, direction):
    inverse = [1.0 / jnp.where(jnp.abs(d) < 1e-9, 1e-9, d) for d in direction]
    sides = [((-CUBE - o) * i, (CUBE - o) * i) for o, i in zip(origin, inverse, strict=True)]
    near = [jnp.minimum(*side) for side in sides]
    far = [jnp.maximum(*side) for side in sides]
    t = jnp.maximum(jnp.maximum(near[0], near[1]), near[2])
    leave = jnp.minimum(jnp.minimum(far[0], far[1]), far[2])
    return jnp.where((t < leave) & (t > 0.0), t, FAR)


def _disc(origin, direction, height, radius):
    """A horizontal disc."""
    dy = jnp.where(jnp.abs(direction[1]) < 1e-9, 1e-9, direction[1])
    t = (height - origin[1]) / dy
    x, z = origin[0] + t * direction[0], origin[2] + t * direction[2]
    return jnp.where((t > 0.0) & (x**2 + z**2 < radius**2), t, FAR)


def _side(origin, direction, a, b, c):
    """The first root whose height lies in [-1, 1]."""

    def one(t, real):
        y = origin[1] + t * direction[1]
        return jnp.where(real & (t > 0.0) & (jnp.abs(y) <= 1.0), t, FAR)

    near, far, real = _roots(a, b, c)
    return jnp.minimum(one(near, real), one(far, real))


def _cylinder(origin, direction):
    dx, dz, ox, oz = direction[0], direction[2], origin[0], origin[2]
    a, b, c = dx**2 + dz**2, ox * dx + oz * dz, ox**2 + oz**2 - CYLINDER**2
    side = _side(origin, direction, a, b, c)
    return jnp.minimum(side, _disc(origin, direction, 1.0, CYLINDER))


def _cone(origin, direction):
    (dx, dy, dz), (ox, oy, oz) = direction, (origin[0], origin[1] - 1.0, origin[2])
    a = dx**2 + dz**2 - SLOPE**2 * dy**2
    b = ox * dx + oz * dz - SLOPE**2 * oy * dy
    c = ox**2 + oz**2 - SLOPE**2 * oy**2
    side = _side(origin, direction, a, b, c)
    return jnp.minimum(side, _disc(origin, direction, -1.0, 2.0 * SLOPE))


def _torus(origin, direction):
    """Sphere tracing of the exact distance, from where the ray enters the bounding sphere."""
    ring, tube = TORUS
    length = jnp.sqrt(_dot(direction, direction))
    unit = _mul(direction, 1.0 / length)
    near, far, real = _roots(1.0, _dot(origin, unit), _dot(origin, origin) - 1.02)

    def distance(t):
        x, y, z = (origin[i] + t * unit[i] for i in range(3))
        around = jnp.sqrt(x**2 + z**2) - ring
        return jnp.sqrt(around**2 + y**2) - tube

    t = jnp.maximum(near, 0.0)
    for _ in range(14):  # unrolled: one fused kernel
        t = t + distance(t)
    hit = real & (t < far) & (jnp.abs(distance(t)) < 2e-2)
    return jnp.where(hit, t / length, FAR)


def _cube_normal(p):
    size = [jnp.abs(c) for c in p]
    most = jnp.maximum(jnp.maximum(size[0], size[1]), size[2])
    return tuple(jnp.sign(c) * (s >= most) for c, s in zip(p, size, strict=True))


def _capped(p, side, cap):
    """The side's normal, or straight up or down where the height says `cap`."""
    zero = jnp.zeros_like(p[1])
    return _where(cap, (zero, jnp.sign(p[1]), zero), side)


def _cylinder_normal(p):
    return _capped(p, (p[0], jnp.zeros_like(p[1]), p[2]), p[1] > 0.9995)


def _cone_normal(p):
    return _capped(p, (p[0], SLOPE**2 * (1.0 - p[1]), p[2]), p[1] < -0.9995)


def _torus_normal(p):
    ring = _unit((p[0], jnp.zeros_like(p[1]), p[2]))
    return _add(p, _mul(ring, -TORUS[0]))


SHAPES = (_none, _sphere, _cube, _cylinder, _cone, _torus)
HALF_HEIGHT = (0.0, 1.0, CUBE, 1.0, 1.0, TORUS[1])  # how high the centre floats over the floor


NORMALS = (lambda p: p, lambda p: p, _cube_normal, _cylinder_normal, _cone_normal, _torus_normal)


def _frame(scene, i):
    """Rotation of the world into object i's frame."""
    cos, sin, zero, one = jnp.cos(scene["yaw"][i]), jnp.sin(scene["yaw"][i]), 0.0, 1.0
    return ((cos, zero, -sin), (zero, one, zero), (sin, zero, cos))


def _local(scene, i, origin):
    """A point of the world, relative to object i, in its frame and units."""
    moved = tuple(o - scene["position"][i, axis] for axis, o in enumerate(origin))
    return _mul(_turn(_frame(scene, i), moved), 1.0 / scene["radius"][i])


def _nearest(scene, origin, direction):
    """The nearest object along each ray: t (`FAR` for none) and its index from 0."""

    def body(i, best):
        local_direction = _mul(_turn(_frame(scene, i), direction), 1.0 / scene["radius"][i])
        local_origin = tuple(
            jnp.broadcast_to(o, direction[0].shape) for o in _local(scene, i, origin)
        )
        t = lax.switch(scene["shape"][i], SHAPES, local_origin, local_direction)
        closer = t < best[0]
        return jnp.where(closer, t, best[0]), jnp.where(closer, i, best[1])

    rays = direction[0].shape
    start = (jnp.full(rays, FAR), jnp.zeros(rays, jnp.int32))
    return lax.fori_loop(0, scene["count"], body, start)


def _normals(scene, point, index):
    """Unit normals where the surface of object `index` is hit."""

    def body(i, normal):
        local = lax.switch(scene["shape"][i], NORMALS, _local(scene, i, point))
        back = tuple(zip(*_frame(scene, i), strict=True))
        return _where(index == i, _turn(back, local), normal)

    start = tuple(jnp.zeros_like(c) for c in point)
    return _unit(lax.fori_loop(0, scene["count"], body, start))


def _rays(scene, size: int, samples: int):
    """Camera rays as unit vectors, S^2 samples for each pixel, the sample's axis first."""
    at = (jnp.arange(size * samples) + 0.5) / (size * samples) * 2.0 - 1.0
    y, x = jnp.meshgrid(-at, at, indexing="ij")

    def order(v):
        return v.reshape(size, samples, size, samples).transpose(1, 3, 0, 2).reshape(-1)

    pitch, yaw = scene["pitch"], scene["turn"]
    forward = (jnp.sin(yaw) * jnp.cos(pitch), -jnp.sin(pitch), jnp.cos(yaw) * jnp.cos(pitch))
    right = (jnp.cos(yaw), 0.0, -jnp.sin(yaw))
    up = (forward[1] * right[2], forward[2] * right[0] - forward[0] * right[2],
          -forward[1] * right[0])  # fmt: skip
    sideways = _mul(right, scene["lens"] * order(x))
    return _unit(_add(_add(forward, sideways), _mul(up, scene["lens"] * order(y))))


def _render(scene, size: int, samples: int):
    camera = tuple(scene["camera"])
    direction = _rays(scene, size, samples)
    t_object, index = _nearest(scene, camera, direction)
    falling = direction[1] < -1e-6
    t_floor = jnp.where(falling, -camera[1] / jnp.where(falling, direction[1], -1.0), FAR)
    on_object = t_object < t_floor
    t = jnp.minimum(t_object, t_floor)
    sky = t > 60.0
    point = _add(camera, _mul(direction, jnp.minimum(t, 60.0)))
    normal = _where(on_object, _normals(scene, point, index), (0.0, 1.0, 0.0))

    # every sample of a pixel sees the light from a slightly different place: soft shadows
    around = jnp.repeat(2.4 * jnp.arange(samples**2), size * size)
    spread = (0.1 * jnp.cos(around), 0.0, 0.1 * jnp.sin(around))
    light = _unit(_add(tuple(scene["light"]), spread))
    shadow_t, _ = _nearest(scene, _add(point, _mul(normal, 2e-2)), light)
    lit = (shadow_t >= FAR) | sky

    facing = jnp.clip(_dot(normal, light), 0.0, 1.0) * lit
    half = _unit(_add(light, _mul(direction, -1.0)))
    shine = jnp.clip(_dot(normal, half), 0.0, 1.0) ** 40 * lit
    tile = jnp.floor(point[0] * 0.5) + jnp.floor(point[2] * 0.5)
    checker = 1.0 - scene["checker"] * (tile % 2.0)
    gloss = jnp.where(on_object, 0.75 * _pick(scene["gloss"], index), 0.0) * shine
    bright = 0.42 + 0.14 * normal[1] + 0.62 * facing
    haze = jnp.where(on_object, 0.0, jnp.clip((t - 9.0) / 30.0, 0.0, 1.0))
    height = jnp.clip(direction[1] * 2.0 + 0.15, 0.0, 1.0)

    def channel(c: int):
        own = _pick(scene["colour"][:, c], index)
        colour = jnp.where(on_object, own, scene["floor"][c] * checker)
        horizon = 0.55 * scene["sky"][c] + 0.42
        shaded = (colour * bright + gloss) * (1.0 - haze) + horizon * haze
        value = jnp.where(sky, scene["sky"][c] * height + horizon * (1.0 - height), shaded)
        return value.reshape(samples**2, size, size).mean(0)

    image = jnp.stack([channel(c) for c in range(3)], -1)
    # depth and id come from one sample: an average over an edge is the depth of nothing
    one = slice(-size * size, None)
    depth = jnp.where(sky, jnp.inf, t)[one].reshape(size, size)
    ids = jnp.where(on_object & ~sky, index + 1, 0)[one].reshape(size, size)
    return {
        "image": jnp.round(jnp.clip(image, 0.0, 1.0) * 255.0).astype(jnp.uint8),
        "depth": depth,
        "instances": ids.astype(jnp.int32),
    }


@partial(jax.jit, static_argnames=("size", "samples"))
def cast(scenes: dict, size: int, samples: int) -> dict:
    """Renders scenes (arrays with a leading axis [B], of `data.scenes.describe`).

    Returns image uint8 [B, size, size, 3], depth float32 [B, size, size] (distance along the ray,
    inf for the sky) and instances int32 [B, size, size] (0 where no object is). `samples`^2 rays
    are cast for a pixel.
    """
    return lax.map(lambda scene: _render(scene, size, samples), scenes)


def field_of_view(degrees: float) -> float:
    """Half the width of the image plane at distance 1."""
    return math.tan(math.radians(degrees) / 2)
