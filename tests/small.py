"""The smallest composer: for tests of what surrounds its network."""

import os

from composer_jax.training.config import load_config

UNET = {"block_out_channels": (16,), "attention": (False,), "heads": (2,)}
POOLS = f"pools={os.environ['COMPOSER_TEST_POOLS']}"  # what one test prepared, the next one takes
OVERRIDES = (
    POOLS,
    "sampler.steps=2",
    *(f"model.unet.{key}={value}" for key, value in UNET.items()),
)


def small_config(overrides=()):
    """`scenes64:smoke` with a UNet of one level."""
    return load_config("scenes64:smoke", [*OVERRIDES, *overrides])
