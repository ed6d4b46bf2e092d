"""How far each condition alone controls scenes: `python benchmarks/control.py --model DIR`.

Every condition whose measure has its tools, over `--count` scenes and `--seeds` sampling seeds.
"""

import argparse

from tqdm import tqdm

from composer_jax.data.sources import open_source
from composer_jax.evaluation.control import (
    HEAD,
    extract_all,
    measure_control,
    reconstruct,
    sample_each,
    scenes_tools,
)
from composer_jax.sampling.pipeline import Pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=2.0)
    args = parser.parse_args()
    pipe = Pipeline.load(args.model)
    tools = scenes_tools(pipe)
    batch = open_source(f"scenes:{args.count}", size=pipe.size, split="test").batch(
        range(args.count)
    )
    images, names = batch["image"], []
    stored = extract_all(images, batch["given"], pipe.names, tools)
    for name in pipe.names:
        try:
            measure_control(name, stored[:1], [images[:1]], [images[:1]], images[:1], tools)
            names.append(name)
        except ValueError as reason:
            print(f"{name} is not measured: {reason}")
    through, samples = reconstruct(pipe, images), {}
    settings = {"steps": args.steps, "guidance": args.guidance}
    with tqdm(total=(len(names) + 1) * args.seeds * args.count, unit="image") as bar:
        for kind in [(), *[(name,) for name in names]]:
            samples[kind] = [
                sample_each(pipe, stored, kind, seed=seed, progress=bar.update, **settings)
                for seed in range(args.seeds)
            ]
    print(f"{args.count} held-out scenes, seeds 0 to {args.seeds - 1}, {settings}")
    print(f"{'given alone':12}" + "".join(f"{word:>14}" for word in HEAD))
    for name in names:
        row = measure_control(name, stored, samples[(name,)], samples[()], through, tools).row()
        print(f"{name:12}" + "".join(f"{cell:>14}" for cell in row))


if __name__ == "__main__":
    main()
