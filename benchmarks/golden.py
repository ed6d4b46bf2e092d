"""Golden outputs: what the commands give, as digests, to compare two commits on one machine.

    python benchmarks/golden.py record golden.json     at one commit
    python benchmarks/golden.py compare golden.json    at another; names what differs, exit code 1

Samples, edits, decomposed images, two training steps of each task, a prepared cache, a converted
UNet and a plan, each by its command line, all with the bundled model or `smoke` configs. Compared
are pixels, arrays, tensors, shards and losses, not how files are laid out, nor times. XLA's numbers
differ between machines, so both runs must be on the same one.
"""

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

import composer_jax

SAMPLE = "sample --count 2 --steps 4 --seed 3"
RED_CONE = "--caption 'a red cone left of a blue ball'"
RUNS = {
    "photo": f"{SAMPLE} {RED_CONE}",  # its first image is what the others start from
    **{
        f"sample {solver}": f"{SAMPLE} {RED_CONE} --solver {solver}"
        for solver in ("ddim", "euler", "heun", "dpmpp2m", "unipc", "plms")
    },
    "sample given an image": f"{SAMPLE} --from PHOTO --use sketch,palette,depth,instances,semantics"
    " --sketch.strength 0.7 --palette.window 0:0.5",
    "sample in a region": f"{SAMPLE} {RED_CONE} --caption.region REGION"
    " --palette '#d62828,#003049'",
    "sample with negatives": f"{SAMPLE} {RED_CONE} --caption.negative 'a green cube' --guidance 3"
    " --interval 0.2:0.8",
    "sample with noise": f"{SAMPLE} {RED_CONE} --eta 0.5 --spacing karras",
    "edit variation": "edit variation PHOTO --count 2 --steps 4",
    "edit interpolation": "edit interpolation PHOTO OTHER --count 3 --steps 4",
    "edit translation": "edit translation PHOTO --caption 'a blue cube' --count 2 --steps 4",
    "edit image-to-image": "edit image-to-image PHOTO --strength 0.5 --count 2 --steps 4",
    "edit inpainting": "edit inpainting PHOTO --region REGION --count 2 --steps 4",
    "decompose": "decompose PHOTO",
    "prepare": "prepare scenes:24 --config scenes64:smoke",
    "plan": "plan --config scenes64:smoke --topology here",
    "convert to diffusers": "convert MODEL --to diffusers --only vae",
    **{
        f"train {config}": f"train --config {config}:smoke --config.steps=2 --config.log_every=1"
        " --config.sample_every=0"
        for config in ("scenes64", "scenes64_codec", "scenes64_clip", "scenes64_depth",
                       "scenes64_objects")
    },
}  # fmt: skip
TIMES = ("second", "time", "memory", "bytes", "utilisation")  # in names of what a log row measures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = outputs(Path(folder))
    if args.action == "record":
        args.file.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{len(found)} outputs recorded in {args.file}")
        return 0
    recorded = json.loads(args.file.read_text())
    names = sorted({*found, *recorded})
    different = [name for name in names if found.get(name) != recorded.get(name)]
    print(*(f"differs: {name}" for name in different), sep="\n")
    print(f"{len(recorded) - len(different)} of {len(recorded)} outputs are the same")
    return 1 if different else 0


def outputs(folder: Path) -> dict[str, str]:
    """The digest of every file that a run leaves, by run and path."""
    region = np.zeros((64, 64), np.uint8)
    region[16:48, 8:40] = 255
    Image.fromarray(region).save(folder / "region.png")
    found = {}
    for name, line in RUNS.items():
        print(name, file=sys.stderr)
        out = folder / name.replace(" ", "-")
        run(folder, line, out)
        for path in sorted(out.rglob("*")):
            if path.is_file() and (digest := digest_of(path)):
                found[f"{name}: {path.relative_to(out)}"] = digest
    return found


def run(folder: Path, line: str, out: Path) -> None:
    words = {
        "PHOTO": folder / "photo" / "000000.png",
        "OTHER": folder / "photo" / "000001.png",
        "REGION": folder / "region.png",
        "MODEL": Path(composer_jax.__file__).parent / "assets" / "scenes64",
    }
    command = [str(words.get(word, word)) for word in shlex.split(line)]
    target = {"train": "--workdir", "plan": "--json"}.get(command[0], "--out")
    where = out / "plan.json" if command[0] == "plan" else out
    composer = Path(sys.executable).with_name("composer")
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([composer, *command, target, where], cwd=folder, env=environment,
                   check=True, stdout=subprocess.DEVNULL)  # fmt: skip


def digest_of(path: Path) -> str:
    """A digest of what a file holds, "" for one that only describes others."""
    if path.suffix == ".png":
        content = np.asarray(Image.open(path)).tobytes()
    elif path.suffix == ".npy":
        content = np.load(path).tobytes()
    elif path.suffix == ".npz":
        with np.load(path) as arrays:
            content = b"".join(arrays[name].tobytes() for name in sorted(arrays))
    elif path.suffix == ".safetensors":
        from safetensors.numpy import load_file

        content = b"".join(t.tobytes() for _, t in sorted(load_file(path).items()))
    elif path.name == "metrics.jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        content = json.dumps([untimed(row) for row in rows]).encode()
    elif path.name == "plan.json":
        content = json.dumps(untimed(json.loads(path.read_text()))).encode()
    elif ".array_record" in path.name:
        content = path.read_bytes()
    else:
        return ""
    return hashlib.sha256(content).hexdigest()[:16]


def untimed(row: dict) -> dict:
    return {key: value for key, value in row.items() if not any(word in key for word in TIMES)}


if __name__ == "__main__":
    sys.exit(main())
