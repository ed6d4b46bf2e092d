"""`composer ema WORKDIR --length L --out DIR`: an average of another length, after training."""

from __future__ import annotations

import argparse
import shutil

from composer_jax.commands import arguments
from composer_jax.models.files import open_tensors, read_json, write_tensors
from composer_jax.training.ema import LONGEST, SHORTEST, reconstruct
from composer_jax.utils.atomic import check_writable, write_json
from composer_jax.utils.owned import check_apart, check_replaceable, replaced_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "workdir", type=arguments.path, help="a run with config.ema_lengths=0.05,0.1"
    )
    parser.add_argument(
        "--length",
        type=arguments.number(SHORTEST, LONGEST),
        required=True,
        help="relative length, for example 0.08",
    )
    parser.add_argument(
        "--step", type=arguments.whole(0), help="of a snapshot; by default the newest"
    )
    parser.add_argument(
        "--out", type=arguments.folder, required=True, help="the model directory to write"
    )


def run(args: argparse.Namespace) -> int:
    """Writes a model directory whose parameters are that average."""
    if not args.workdir.is_dir():
        what = "is a file" if args.workdir.exists() else "does not exist"
        raise ValueError(f"{args.workdir} {what}; the workdir of a run is wanted")
    check_apart([args.out], [args.workdir / "model", args.workdir / "ema"])
    check_replaceable(args.out)
    check_writable(args.out)
    step, tensors = reconstruct(args.workdir, args.length, args.step)
    trained = args.workdir / "model"
    info = read_json(trained / "model.json")
    fixed = open_tensors(trained / "unet.safetensors")
    if missing := set(tensors) - set(fixed):
        raise ValueError(f"{trained} lacks {sorted(missing)[0]}, which the snapshots have")
    with replaced_folder(args.out) as new:
        for part in ("vae", "clip"):
            shutil.copytree(trained / part, new / part)
        write_tensors(new / "unet.safetensors", {**fixed, **tensors})
        write_json(new / "model.json", {**info, "step": step, "ema_length": args.length})
    print(f"the average of length {args.length:g} after step {step} is in {args.out}")
    return 0
