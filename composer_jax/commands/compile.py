"""`composer compile --model DIR`: the sampler as StableHLO, so that a start traces no Python."""

from __future__ import annotations

import argparse

from composer_jax.commands import arguments
from composer_jax.commands.sample import (
    add_program_arguments,
    open_pipeline,
    sampling_options,
)
from composer_jax.diffusion.guidance import BUCKETS
from composer_jax.utils.atomic import check_writable
from composer_jax.utils.owned import record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "--out", type=arguments.folder, help="folder to write (default: MODEL/programs)"
    )
    parser.add_argument(
        "--rows",
        type=int,
        choices=BUCKETS,
        default=2,
        help="evaluations that guidance mixes: 2, or more for several values, regions, scales",
    )
    parser.add_argument(
        "--values", type=int, choices=BUCKETS, default=1, help="values that one condition may have"
    )
    add_program_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Writes one program; `sample` finds it in the model's folder."""
    options = sampling_options(args)
    if args.out is not None:
        check_writable(args.out)
    pipe = open_pipeline(args)
    path = pipe.compile(args.out, rows=args.rows, values=args.values, **options)
    record(path.parent, [path])
    print(f"{path}, {path.stat().st_size >> 10} KiB")
