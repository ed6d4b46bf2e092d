"""A ray caster in JAX: one scene of up to four solids on a floor, its depth and its id map.

`lax.map` over scenes and `lax.switch` over shapes, with the rays of a scene vectorised inside:
`vmap` would compute every shape for every object. Vectors are [3, P]: their last axis is long.
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


def _unit(a):
    return a * lax.rsqrt(jnp.maximum(_dot(a, a), 1e-12))[None]


def _turn(matrix, a):
    """matrix [3, 3] times a [3, P], as multiplications that fuse."""
    rows = [sum(matrix[i][j] * a[j] for j in range(3)) for i in range(3)]
    return jnp.stack(rows)


def _pick(table, index):
    """table [C, M] at index [P] as [C, P]; M is small: selections beat a gather."""
    picked = jnp.broadcast_to(table[:, :1], (table.shape[0], index.shape[0]))
    for i in range(1, table.shape[1]):
        picked = jnp.where((index == i)[None], table[:, i, None], picked)
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
    return jnp.full(direction.shape[1], FAR)


def _sphere(origin, direction):
    t, _, real = _roots(
        _dot(direction, direction), _dot(origin, direction), _dot(origin, origin) - 1.0
    )
    return jnp.where(real & (t > 0.0), t, FAR)


def _cube(origin, direction):
    inverse = 1.0 / jnp.where(jnp.abs(direction) < 1e-9, 1e-9, direction)
    low, high = (-CUBE - origin) * inverse, (CUBE - origin) * inverse
    t, leave = jnp.minimum(low, high).max(0), jnp.maximum(low, high).min(0)
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
    unit = direction / length[None]
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
    size = jnp.abs(p)
    return jnp.sign(p) * (size >= size.max(0, keepdims=True))


def _capped(p, side, cap):
    """The side's normal, or straight up or down where the height says `cap`."""
    up = jnp.stack([jnp.zeros_like(p[1]), jnp.sign(p[1]), jnp.zeros_like(p[1])])
    return jnp.where(cap[None], up, jnp.stack(side))


def _cylinder_normal(p):
    return _capped(p, (p[0], jnp.zeros_like(p[1]), p[2]), p[1] > 0.9995)


def _cone_normal(p):
    return _capped(p, (p[0], SLOPE**2 * (1.0 - p[1]), p[2]), p[1] < -0.9995)


def _torus_normal(p):
    flat = jnp.stack([p[0], jnp.zeros_like(p[1]), p[2]])
    return p - TORUS[0] * _unit(flat)


SHAPES = (_none, _sphere, _cube, _cylinder, _cone, _torus)
HALF_HEIGHT = (0.0, 1.0, CUBE, 1.0, 1.0, TORUS[1])  # how high the centre floats over the floor


NORMALS = (lambda p: p, lambda p: p, _cube_normal, _cylinder_normal, _cone_normal, _torus_normal)


def _frame(scene, i):
    """Rotation of the world into object i's frame."""
    cos, sin, zero, one = jnp.cos(scene["yaw"][i]), jnp.sin(scene["yaw"][i]), 0.0, 1.0
    return ((cos, zero, -sin), (zero, one, zero), (sin, zero, cos))


def _nearest(scene, origin, direction):
    """The nearest object along each ray: t (`FAR` for none) and its index from 0."""

    def body(i, best):
        turn, radius = _frame(scene, i), scene["radius"][i]
        local_direction = _turn(turn, direction) / radius
        local_origin = _turn(turn, origin - scene["position"][i][:, None]) / radius
        local_origin = jnp.broadcast_to(local_origin, direction.shape)
        t = lax.switch(scene["shape"][i], SHAPES, local_origin, local_direction)
        closer = t < best[0]
        return jnp.where(closer, t, best[0]), jnp.where(closer, i, best[1])

    rays = direction.shape[1]
    start = (jnp.full(rays, FAR), jnp.zeros(rays, jnp.int32))
    return lax.fori_loop(0, scene["count"], body, start)


def _normals(scene, point, index):
    """Unit normals where the surface of object `index` is hit."""

    def body(i, normal):
        turn = _frame(scene, i)
        local = _turn(turn, point - scene["position"][i][:, None]) / scene["radius"][i]
        local = lax.switch(scene["shape"][i], NORMALS, local)
        back = tuple(zip(*turn, strict=True))
        return jnp.where((index == i)[None], _turn(back, local), normal)

    return _unit(lax.fori_loop(0, scene["count"], body, jnp.zeros_like(point)))


def _rays(scene, size: int, samples: int):
    """Camera rays, unit directions [3, P S^2], samples of a pixel next to each other."""
    step = 1.0 / (size * samples)
    at = (jnp.arange(size * samples) + 0.5) * step * 2.0 - 1.0
    y, x = jnp.meshgrid(-at, at, indexing="ij")
    x, y = (
        v.reshape(size, samples, size, samples).transpose(0, 2, 1, 3).reshape(-1) for v in (x, y)
    )
    pitch, yaw = scene["pitch"], scene["turn"]
    forward = jnp.stack(
        [jnp.sin(yaw) * jnp.cos(pitch), -jnp.sin(pitch), jnp.cos(yaw) * jnp.cos(pitch)]
    )
    right = jnp.stack([jnp.cos(yaw), jnp.zeros(()), -jnp.sin(yaw)])
    up = jnp.cross(forward, right)
    lens = scene["lens"]
    return _unit(forward[:, None] + lens * (x[None] * right[:, None] + y[None] * up[:, None]))


def _render(scene, size: int, samples: int):
    origin = scene["camera"][:, None]
    direction = _rays(scene, size, samples)
    t_object, index = _nearest(scene, origin, direction)
    falling = direction[1] < -1e-6
    t_floor = jnp.where(falling, -origin[1] / jnp.where(falling, direction[1], -1.0), FAR)
    on_object = t_object < t_floor
    t = jnp.minimum(t_object, t_floor)
    sky = t > 60.0
    point = origin + jnp.minimum(t, 60.0)[None] * direction
    up = jnp.array([[0.0], [1.0], [0.0]])
    normal = jnp.where(on_object[None], _normals(scene, point, index), up)

    # every sample of a pixel sees the light from a slightly different place: soft shadows
    around = 2.4 * jnp.arange(samples**2)
    spread = 0.10 * jnp.stack([jnp.cos(around), jnp.zeros_like(around), jnp.sin(around)])
    light = _unit(scene["light"][:, None] + jnp.tile(spread, (1, size * size)))
    shadow_t, _ = _nearest(scene, point + 2e-2 * normal, light)
    lit = (shadow_t >= FAR) | sky

    facing = jnp.clip(_dot(normal, light), 0.0, 1.0) * lit
    shine = jnp.clip(_dot(normal, _unit(light - direction)), 0.0, 1.0) ** 40 * lit
    tile = jnp.floor(point[0] * 0.5) + jnp.floor(point[2] * 0.5)
    checker = 1.0 - scene["checker"] * (tile % 2.0)
    floor = scene["floor"][:, None] * checker[None]
    colour = jnp.where(on_object[None], _pick(scene["colour"].T, index), floor)
    gloss = jnp.where(on_object, _pick(scene["gloss"][None], index)[0], 0.0)
    ambient = 0.42 + 0.14 * normal[1]
    shaded = colour * (ambient + 0.62 * facing)[None] + (gloss * 0.75 * shine)[None]
    sky_colour = scene["sky"][:, None]
    horizon = 0.55 * sky_colour + 0.42
    height = jnp.clip(direction[1] * 2.0 + 0.15, 0.0, 1.0)[None]
    haze = jnp.clip((t - 9.0) / 30.0, 0.0, 1.0)[None] * (~on_object)[None]
    shaded = shaded * (1.0 - haze) + horizon * haze
    shaded = jnp.where(sky[None], sky_colour * height + horizon * (1.0 - height), shaded)
    image = shaded.reshape(3, size, size, samples**2).mean(3).transpose(1, 2, 0)

    # depth and id come from one sample: an average over an edge is the depth of nothing
    pick = samples**2 // 2
    depth = jnp.where(sky, jnp.inf, t).reshape(size, size, -1)[..., pick]
    ids = jnp.where(on_object & ~sky, index + 1, 0).reshape(size, size, -1)[..., pick]
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
