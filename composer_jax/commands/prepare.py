"""`composer prepare SOURCE --out DIR`: takes a source apart once, into shards that train reads."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from composer_jax.commands import arguments
from composer_jax.commands.arguments import take_rest  # noqa: F401 (the cli calls it)
from composer_jax.commands.unused import tell, tell_keys
from composer_jax.data import cache
from composer_jax.data.extractors import Extractors, load_extractors
from composer_jax.data.prepare import chunks
from composer_jax.data.sources import Crop, Source, open_source
from composer_jax.training.config import load_config

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
    parser.epilog = (
        "Several processes share the work where the environment says how many there are: "
        "COMPOSER_PROCESS and COMPOSER_PROCESSES, a SLURM array or step, an indexed Kubernetes job."
    )


def run(args: argparse.Namespace) -> int:
    """Writes this process's shards that are missing; the last process makes them one dataset."""
    config = load_config(args.config, args.overrides)
    if "codec" not in config:
        raise ValueError(f"config {args.config} trains no composer; one that does is wanted")
    tell_keys(config, args.overrides, "prepare")
    drawn = args.source.startswith("scenes") or args.crop == "random" or args.flip
    if "--seed" in args.typed and not drawn:
        tell("--seed", "crops are of the centre, and nothing is mirrored")
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
    _claim(args, source, names, sizes, shards, extractors)
    missing = [s for s in range(shards) if not cache.notes_path(args.out, s).is_file()]
    mine = [shard for shard in missing if shard % count == index]
    _write(args.out, mine, shards, args.shard_size, source, names, specs, extractors)
    extractors.clip.report_cut()
    notes = cache.finish(args.out, shards, specs)
    if notes is None:
        left = sum(not cache.notes_path(args.out, s).is_file() for s in range(shards))
        print(f"{args.out}: {left} of {shards} shards are still missing; they belong to other "
              "processes, or run the same command alone to make them here")  # fmt: skip
        return 0
    total, skipped = sum(n["count"] for n in notes), sum(len(n["skipped"]) for n in notes)
    told = f"; skipped {skipped}, named in {args.out / 'skipped.jsonl'}" if skipped else ""
    print(f"{args.out}: {total} examples in {shards} shard{'s' * (shards != 1)}{told}")
    if not total:
        raise ValueError(f"{source.name}: no usable image")
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
) -> None:
    """Writes composer.json; one that is there must say the same."""
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
    path = args.out / "composer.json"
    if not path.is_file():
        args.out.mkdir(parents=True, exist_ok=True)
        known = ("shards", "composer.json")  # of another process that has just begun
        strange = [p.name for p in args.out.iterdir() if not p.name.startswith(known)]
        if strange and not path.is_file():
            raise ValueError(f"{args.out} exists and is no cache; give an empty or new folder")
        cache.write_whole(path, made)
    old, new = json.loads(path.read_text()), json.loads(json.dumps(made))
    for key in new:
        other = old.get(key) != new[key]
        if key == "made_by" and isinstance(old.get(key), dict):
            other = cache.other_maker(old[key], new[key])
        if other:
            raise ValueError(
                f"{args.out} was made with {key} = {old.get(key)!r}, now it is {new[key]!r}; "
                "give another --out, or what it was made with"
            )


def _write(out: Path, mine, shards, shard_size, source: Source, names, specs, extractors) -> None:
    features, seconds, done = cache.tfds_features(specs), {}, 0
    start = time.perf_counter()

    def serialise(tree, row: int) -> bytes:
        flat = {}
        for path, spec in specs.items():
            node = tree
            for key in path.split("/"):
                node = node[key]
            flat[path] = cache.encode(spec, node[row])
        return features.serialize_example(cache.nested(flat))

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
                examples += workers.map(lambda row, tree=tree: serialise(tree, row), rows)
                seconds["write"] = seconds.get("write", 0.0) + time.perf_counter() - began
                bar.update(asked)
            broken = getattr(source, "skipped", {})
            labels = [source.label(index) for index in indices] if broken else ()
            skipped = [{"name": n, "reason": broken[n]} for n in labels if n in broken]
            cache.write_shard(out, shard, shards, examples, {"skipped": skipped})
            done += len(indices)
    source.tell()
    if done:
        rates = [f"{stage} {done / spent:.0f}" for stage, spent in seconds.items() if spent]
        whole = done / (time.perf_counter() - start)
        print(f"images/s, stage by stage: {', '.join(rates)}; all {whole:.0f}")
