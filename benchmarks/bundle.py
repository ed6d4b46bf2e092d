"""Puts what was trained into the package, in half precision: `python benchmarks/bundle.py RUN...`.

    composer train --config scenes64_codec --workdir runs/codec       and so on
    python benchmarks/bundle.py runs/codec runs/depth runs/objects

A RUN is the workdir of a codec, a CLIP, a detector or a composer; of a composer its UNet and
model.json are taken. Prints how large the bundle is.
"""

import argparse
import shutil
from pathlib import Path

from composer_jax.models.files import open_tensors, write_tensors
from composer_jax.storage.models import BUNDLED

PARTS = ("vae", "clip", "depth", "objects")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="+", type=Path)
    for run in parser.parse_args().run:
        model = run / "model"
        if (model / "model.json").is_file():
            halve(model / "unet.safetensors", BUNDLED / "unet.safetensors")
            shutil.copy2(model / "model.json", BUNDLED / "model.json")
            continue
        found = [part for part in PARTS if (model / part).is_dir()]
        if not found:
            raise SystemExit(f"{model} holds none of {', '.join(PARTS)}, and no composer")
        for part in found:
            (BUNDLED / part).mkdir(parents=True, exist_ok=True)
            for path in (model / part).iterdir():
                if path.suffix == ".safetensors":
                    halve(path, BUNDLED / part / path.name)
                else:
                    shutil.copy2(path, BUNDLED / part / path.name)
    size = sum(path.stat().st_size for path in BUNDLED.parent.rglob("*") if path.is_file())
    print(f"{size / 1e6:.1f} MB in {BUNDLED.parent}")


def halve(source: Path, target: Path) -> None:
    """Copies tensors as float16."""
    write_tensors(target, {k: tensor.cast("float16") for k, tensor in open_tensors(source).items()})


if __name__ == "__main__":
    main()
