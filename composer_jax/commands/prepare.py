"""`composer prepare SOURCE --out DIR`: takes a source apart once, into shards that train reads."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from tqdm import tqdm

from composer_jax.commands import arguments
from composer_jax.commands.arguments import take_rest  # noqa: F401 (the cli calls it)
from composer_jax.commands.unused import tell, tell_keys
from composer_jax.data import cache
from composer_jax.data.extractors import Extractors, load_extractors
from composer_jax.data.prepare import chunks
from composer_jax.data.shards import read_notes, shard_fault, strange_files, write_shard
from composer_jax.data.sources import Crop, Source, open_source
from composer_jax.data.stream import folders_of
from composer_jax.training.config import load_config
from composer_jax.utils.atomic import check_writable
from composer_jax.utils.owned import check_not_read

# what launchers tell a process: (which, how many, the first's number)
SHARES = (
    ("COMPOSER_PROCESS", "COMPOSER_PROCESSES", ""),
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
    ("SLURM_PROCID", "SLURM_NTASKS", ""),
    ("JOB_COMPLETION_INDEX", "COMPOSER_PROCESSES", ""),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options; `--config.KEY=VALUE` is taken by `take_rest`."""
    parser.add_argument(
        "source",
        type=arguments.source,
        help="scenes[:COUNT], folder:PATH, tar:GLOB, tfds:NAME[:split]",
    )
    parser.add_argument(
        "--out", type=arguments.folder, required=True, help="the cache; goes on where it was"
    )
    parser.add_argument(
        "--config",
        type=arguments.text,
        default="scenes64",
        help="the config that trains (scenes64)",
    )
    parser.add_argument("--crop", choices=("centre", "random"), default="centre")
    parser.add_argument("--flip", action="store_true", help="mirror every other image")
    parser.add_argument(
        "--seed", type=arguments.seed, default=0, help="of scenes, crops and flips (0)"
    )
    parser.add_argument(
        "--shard-size", type=arguments.count, default=1024, help="images a shard (1024)"
    )
    parser.add_argument(
        "--verify", action="store_true", help="compare the content of shards that are there, too"
    )
    parser.epilog = (
        "Several processes share the work where the environment says how many there are: "
        "COMPOSER_PROCESS and COMPOSER_PROCESSES, a SLURM array or step, an indexed Kubernetes job."
    )


def run(args: argparse.Namespace) -> int:
    """Makes those of this process's shards that are not whole; the last process makes all of them
    one dataset."""
    config = load_config(args.config, args.overrides)
    if "codec" not in config:
        raise ValueError(f"config {args.config} trains no composer; one that does is wanted")
    tell_keys(config, args.overrides, "prepare")
    drawn = args.source.startswith("scenes") or args.crop == "random" or args.flip
    if "--seed" in args.typed and not drawn:
        tell("--seed", "crops are of the centre, and nothing is mirrored")
    if not (args.out / "composer.json").exists():
        check_writable(args.out)
    check_not_read(args.out, folders_of(args.source))
    index, count = share(os.environ)
    crop = Crop(args.crop == "random", args.flip, args.seed)
    source = open_source(args.source, size=config.image_size, seed=args.seed, crop=crop)
    extractors = load_extractors(config)
    names = extractors.conditions(config.conditions, source)
    codec = extractors.vae.config
    sizes = {**extractors.clip.sizes, "factor": codec.factor,
             "latent_channels": codec.latent_channels}  # fmt: skip
    specs = cache.feature_specs(names, sizes, source.size)
    shards = -(-len(source) // args.shard_size)
    call = _claim(args, source, names, sizes, shards, extractors)
    mine = range(index, shards, count)
    missing = _not_whole(args.out, mine, shards, call, args.verify)
    _write(args.out, missing, shards, args.shard_size, source, names, specs, extractors, call)
    extractors.clip.report_cut()
    return _finish(args.out, shards, call, specs, source.name)


def _not_whole(out: Path, mine: Sequence[int], shards: int, call: str, verify: bool) -> list[int]:
    """Which of a process's shards have to be made; those that are damaged are named."""
    check = partial(shard_fault, out, shards=shards, call=call, verify=verify)
    with ThreadPoolExecutor() as workers:
        bar = tqdm(workers.map(check, mine), "verify", len(mine), unit="shard", disable=not verify)
        faults = dict(zip(mine, bar, strict=True))
    for fault in filter(None, faults.values()):
        print(f"{fault}; the shard is made anew")
    if verify and not any(faults.values()):
        print(f"{out}: no shard is damaged")
    return [shard for shard, fault in faults.items() if fault is not None]


def _finish(out: Path, shards: int, call: str, specs, name: str) -> int:
    """Makes the shards one dataset, if all are whole, and says what is in it."""
    left = sum(shard_fault(out, shard, shards, call) is not None for shard in range(shards))
    if left:
        print(f"{out}: {left} of {shards} shards are still missing; they belong to other "
              "processes, or run the same command alone to make them here")  # fmt: skip
        return 0
    notes = [read_notes(out, shard) for shard in range(shards)]
    total, skipped = sum(n["count"] for n in notes), sum(len(n["skipped"]) for n in notes)
    if not total:
        cache.discard(out, shards)
        raise ValueError(f"{name}: no usable image; skipped {skipped}")
    for path in cache.finish(out, notes, specs):
        print(f"{path} did not fit the shards and is written anew")
    if strange := strange_files(out, shards):
        more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
        print(f"{out}: {', '.join(strange[:3])}{more} belong to no shard of it and are not read")
    told = f"; skipped {skipped}, named in {out / 'skipped.jsonl'}" if skipped else ""
    print(f"{out}: {total} examples in {shards} shard{'s' * (shards != 1)}{told}")
    return 0


def share(environment: Mapping[str, str]) -> tuple[int, int]:
    """(which, how many) of this process among those that share the work; (0, 1) alone.

    Raises ValueError where the environment says half of it, or an index out of range.
    """
    for which, many, first in SHARES:
        if which not in environment or (many not in environment and many != "COMPOSER_PROCESSES"):
            continue
        texts = environment[which], environment.get(many, ""), environment.get(first, "0")
        if not all(text.isdigit() for text in texts):
            raise ValueError(f"{which} is {texts[0]!r}, {many} is {texts[1]!r}; numbers are wanted")
        index, count = int(texts[0]) - int(texts[2]), int(texts[1])
        if not 0 <= index < count:
            raise ValueError(f"{which} is {texts[0]} of {many}={count}; 0 to {count - 1} is wanted")
        return index, count
    return 0, 1


def _claim(
    args, source: Source, names, sizes: Mapping[str, int], shards: int, extractors: Extractors
) -> str:
    """Writes composer.json; one that is there must say the same. Returns the call's hash."""
    made = {
        "format": cache.FORMAT,
        "source": source.name,
        **({"fields": dict(source.fields)} if source.fields else {}),
        "count": len(source),
        "seed": args.seed,
        "crop": args.crop,
        "flip": args.flip,
        "shard_size": args.shard_size,
        "shards": shards,
        "image_size": source.size,
        "conditions": list(names),
        "sizes": dict(sizes),
        "made_by": dict(extractors.made_by),
    }
    call, again = cache.claim(args.out, made)
    if again:
        print(f"{args.out / 'composer.json'} was damaged and is written anew")
    return call


def _write(
    out: Path, mine, shards, shard_size, source: Source, names, specs, extractors, call: str
) -> None:
    if not mine:
        return
    check_writable(out)
    features, seconds = cache.tfds_features(specs), {}
    start = time.perf_counter()
    ranges = {s: range(s * shard_size, min((s + 1) * shard_size, len(source))) for s in mine}
    total = sum(map(len, ranges.values()))
    with (
        tqdm(total=total, unit="image", desc="prepare") as bar,
        ThreadPoolExecutor() as workers,
    ):
        for shard, indices in ranges.items():
            examples: list[bytes] = []
            for asked, tree in chunks(
                source, indices, names, extractors.tools, extractors.encoders, seconds
            ):
                began = time.perf_counter()
                rows = range(len(tree["image"])) if tree else ()
                examples += workers.map(partial(cache.serialise, features, specs, tree), rows)
                seconds["write"] = seconds.get("write", 0.0) + time.perf_counter() - began
                bar.update(asked)
            broken = getattr(source, "skipped", {})
            labels = [source.label(index) for index in indices] if broken else ()
            skipped = [{"name": n, "reason": broken[n]} for n in labels if n in broken]
            write_shard(out, shard, shards, examples, skipped, call)
    source.tell()
    rates = [f"{stage} {total / spent:.0f}" for stage, spent in seconds.items() if spent]
    whole = total / (time.perf_counter() - start)
    print(f"images/s, stage by stage: {', '.join(rates)}; all {whole:.0f}")
