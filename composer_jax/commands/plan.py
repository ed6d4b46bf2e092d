"""`composer plan --config NAME --topology v5p:4x4x4`: what a train step will cost."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import jax

from composer_jax.commands import arguments
from composer_jax.commands.arguments import take_rest  # noqa: F401 (the cli calls it)
from composer_jax.commands.unused import tell, tell_keys
from composer_jax.models.unet import REMAT
from composer_jax.training.config import load_config
from composer_jax.training.hardware import Chip, devices_of
from composer_jax.training.plan import Cost, known_chip, largest, plan
from composer_jax.training.schema import BATCH
from composer_jax.training.sharding import make_mesh
from composer_jax.utils.atomic import check_writable, write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options; `--config.KEY=VALUE` is taken by `take_rest`."""
    parser.add_argument(
        "--config", required=True, type=arguments.text, help="NAME[:variant] or FILE.py[:variant]"
    )
    parser.add_argument(
        "--topology",
        required=True,
        type=arguments.text,
        help="chips: v4:2x2x1, v5e:4x4, v5p:2x2x1, v6e:4x4, tpu7x:2x2x1, ...; or 'here'",
    )
    parser.add_argument(
        "--batch", type=_batch, help="over all devices (default: the config's); 'auto': what fits"
    )
    parser.add_argument(
        "--images",
        type=arguments.number(0.0, 1e18, above=True),
        help="to train on (default: the config's steps)",
    )
    parser.add_argument(
        "--price", type=arguments.number(0.0, 1e9), default=0.0, help="of a device's hour"
    )
    parser.add_argument("--json", type=arguments.file, help="file to write the same numbers to")
    parser.epilog = "--config.KEY=VALUE sets a key of the config, for example --config.remat=blocks"


def _batch(text: str) -> int | str:
    wanted = replace(BATCH, wanted=f"{BATCH.wanted}, or auto,")
    return text if text == "auto" else arguments.value(wanted)(text)


def run(args: argparse.Namespace) -> None:
    """Compiles, prints a table; nothing is run, no weights and no data are read."""
    config = load_config(args.config, args.overrides)
    tell_keys(config, args.overrides, "plan")
    if config.task != "composer":
        raise ValueError(f"{args.config} trains a {config.task}; plans are made for composers")
    if args.json:
        check_json(args.json)
    # a program out of the cache has neither a text nor a time that it took to compile
    jax.config.update("jax_enable_compilation_cache", False)
    devices = devices_of(args.topology)
    mesh, chip = make_mesh(**config.mesh.to_dict(), devices=devices), known_chip(devices)
    head = {
        "config": args.config,
        "topology": args.topology,
        "device": devices[0].device_kind,
        "mesh": {axis: size for axis, size in mesh.shape.items()},
        "remat": config.remat,
    }
    if args.batch == "auto":
        cost, larger = _auto(config, devices, mesh.shape["data"] * mesh.shape["fsdp"], chip)
    else:
        batch = args.batch or config.batch
        cost, larger = _announced(config, devices, batch), None
    report = head | cost.to_dict(chip)
    report |= _run(report, args.images or config.steps * config.batch, args.price)
    print(table(report, chip))
    if not report["hours"]:
        for option in sorted({"--images", "--price"} & args.typed):
            tell(option, "there is no estimate of a step's time")
    if larger:
        report["larger"] = larger
        print(f"batch {larger['batch']} {larger['says']}")
    if args.json:
        write_json(args.json, report)


def check_json(path: Path) -> None:
    """Raises ValueError where `path` is a folder, or a file that an earlier plan did not write;
    `WriteError` where it cannot be written."""
    if path.is_dir():
        raise ValueError(f"--json {path} is a folder; a file is wanted")
    check_writable(path.absolute().parent)
    if not path.is_file() or not path.stat().st_size:
        return
    try:
        found = set(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError):
        found = set()
    if not found >= {"config", "topology", "device", "mesh", "remat"}:
        raise ValueError(f"--json {path} is there, and no plan; give another file")


def _run(report: dict, images: float, price: float) -> dict:
    """How long it takes to train on so many images, and what that costs, by the estimate."""
    rate = report["images_per_second"]
    hours = images / rate / 3600 if rate else None
    spent = hours * report["devices"] if rate else None
    cost = spent * price if rate and price else None
    return {"images": images, "hours": hours, "device_hours": spent, "cost": cost}


def _announced(config, devices, batch: int) -> Cost:
    where = f"{len(devices)} x {devices[0].device_kind}"
    print(f"compiling batch {batch} for {where}, remat {config.remat} ...", file=sys.stderr)
    cost = plan(config, devices, batch)
    said = f"{cost.compile_seconds:.0f} s, peak {readable(cost.peak)} a device"
    print(f"compiled batch {batch}: {said}", file=sys.stderr)
    return cost


def _auto(config, devices, parts: int, chip: Chip | None) -> tuple[Cost, dict]:
    """The largest batch that fits, and which remat makes room for twice that.

    Where `largest` ends before the memory does: what would fit, instead.
    """
    if chip is None:
        raise ValueError(f"--batch auto: the memory of {devices[0].device_kind!r} is not known")

    def measured(n: int, remat: str = config.remat) -> Cost | None:
        changed = config.copy_and_resolve_references()
        with changed.unlocked():
            changed.remat = remat
        try:
            return _announced(changed, devices, n * parts)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return None

    cost, leads = largest(measured, chip.memory)
    if cost is None:
        raise ValueError(
            f"one example a part does not fit into the {readable(chip.memory)} of "
            f"{devices[0].device_kind}; remat is {config.remat!r}, the mesh {dict(config.mesh)}"
        )
    if leads:
        says = "would fit, by the line that memory grew by; it was not compiled"
        return cost, {"batch": leads * parts, "remat": config.remat, "says": says}
    n = 2 * cost.batch // parts
    for remat in REMAT[REMAT.index(config.remat) + 1 :]:
        found = measured(n, remat)
        if found and found.peak <= chip.memory:
            says = f"fits with remat {remat}: {readable(found.peak)} a device"
            return cost, {"batch": n * parts, "remat": remat, "says": says, **found.to_dict(chip)}
    return cost, {"batch": n * parts, "remat": None, "says": "fits with no remat"}


def table(report: dict, chip: Chip | None) -> str:
    """A plan for a terminal: one line a number."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in report["mesh"].items())
    each = report["batch_per_device"]
    peak = readable(report["peak"])
    if chip:
        share = report["peak_share_of_memory"]
        peak += f" of {readable(chip.memory)} ({share:.0%}{', does not fit' if share > 1 else ''})"
    known = "" if chip else " (not a chip that we know: no share of its memory and peak)"
    lines = [
        ("devices", f"{report['devices']} x {report['device']}; {mesh}{known}"),
        ("batch", f"{report['batch']}, {each:g} a device; remat {report['remat']}"),
        ("arguments", f"{readable(report['arguments'])} a device"),
        ("temporaries", f"{readable(report['temporaries'])} a device"),
        ("peak memory", f"{peak} a device"),
        ("FLOPs", f"{report['flops'] / 1e12:.3f} T a device and step"),
        ("moved", f"{report['bytes'] / 1e9:.1f} GB a device and step, by the compiler's count"),
    ]
    if report["seconds"]:
        rate = f"{report['images_per_second']:.1f} images/s"
        share = report["share_of_peak_flops"]
        share = f"; {share:.1%} of the peak" if share else ""
        estimate = f"{report['seconds'] * 1e3:.1f} ms a step, {rate}{share}"
    else:
        estimate = "none: the compiler makes no estimate here that makes sense"
    lines.append(("estimate", estimate))
    if report["hours"]:
        cost = f", {report['cost']:,.0f} in all" if report["cost"] else ""
        whole = f"{report['hours']:.1f} h, {report['device_hours']:,.1f} device hours{cost}"
        lines.append(("a whole run", f"{report['images']:,.0f} images: {whole}"))
    for kind, traffic in report["collectives"].items():
        said = f"{traffic['count']}, {readable(traffic['bytes'])} a device and step"
        if traffic["hidden"]:
            share = traffic["hidden"] / traffic["bytes"]
            said += f", {share:.0%} of it while something is computed"
        if traffic["unknown"]:
            said += f"; {traffic['unknown']} of them in loops of unknown length, counted once"
        lines.append((kind, said))
    lines.append(("compiled in", f"{report['compile_seconds']:.0f} s"))
    return "\n".join(f"{name:20s} {value}" for name, value in lines)


def readable(amount: float) -> str:
    """Bytes for people: "3.3 GiB"."""
    for unit in ("B", "KiB", "MiB"):
        if abs(amount) < 1024:
            return f"{amount:.0f} {unit}"
        amount /= 1024
    return f"{amount:.1f} GiB"
