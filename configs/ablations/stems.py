"""Convolutional stems, wide and narrow sums, against maps resized without parameters."""

from composer_jax.configs.ablations import sweep


def get_sweep() -> dict:
    return sweep(
        {
            "resized": ["model.stems=resize"],
            "stems, 8 channels": ["model.local_channels=8", "model.unet.in_channels=14"],
            "stems, 32 channels": ["model.local_channels=32", "model.unet.in_channels=38"],
        }
    )
