"""What an image is made of: one file a condition, found by name (`get`, `names`)."""

from composer_jax.conditions.base import (
    Condition,
    Feature,
    Part,
    Value,
    fingerprint,
    get,
    names,
    register,
)
from composer_jax.conditions.image import load_array, load_image, load_region

__all__ = [
    "Condition",
    "Feature",
    "Part",
    "Value",
    "fingerprint",
    "get",
    "load_array",
    "load_image",
    "load_region",
    "names",
    "register",
]
