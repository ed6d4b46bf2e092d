"""What the detectors of the built-in world see in held-out scenes.

    python benchmarks/detectors.py                         the bundled ones
    python benchmarks/detectors.py --objects runs/objects

Depth by Spearman's correlation less the mean map, instances by mean IoU, facts by the share of what
captions state that is found.
"""

import argparse
from collections import Counter

import numpy as np
from tqdm import tqdm

from composer_jax import conditions
from composer_jax.conditions.caption import FACTS
from composer_jax.conditions.instances import mean_iou
from composer_jax.data.sources import open_source
from composer_jax.data.tools import load_depth_tool
from composer_jax.evaluation.facts import check, stated
from composer_jax.storage.models import find_part, load_objects

CHUNK = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", default="bundled", help="a run, a folder, or bundled")
    parser.add_argument("--objects", default="bundled", help="likewise")
    parser.add_argument("--count", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=7, help="of the held-out scenes")
    args = parser.parse_args()
    source = open_source(f"scenes:{args.count}", size=64, seed=args.seed, split="test")
    batch = source.batch(range(args.count))
    images, given = batch["image"], batch["given"]
    depth, tool = conditions.get("depth"), load_depth_tool(args.depth)
    wanted = depth.extract(images, given)
    judge = depth.judge(wanted)
    scores = [judge(w, image, tool) for w, image in zip(wanted, tqdm(images), strict=True)]
    print(f"depth, Spearman less the mean map: {np.mean(scores):.3f}")
    look = load_objects(find_part(args.objects, "objects")).look()
    seen = [one for start in range(0, args.count, CHUNK) for one in look(images[start:][:CHUNK])]
    iou = [mean_iou(ids, found) for ids, (found, _) in zip(given["instances"], seen, strict=True)]
    print(f"instances, mean IoU: {np.mean(iou):.3f}")
    tally = Counter()
    for text, (_, things) in zip(given["caption"], seen, strict=True):
        tally.update(check(stated(text), things))
    shares = [f"{fact} {tally[fact, 'found'] / tally[fact, 'stated']:.3f}" for fact in FACTS]
    print(f"facts: {', '.join(shares)}")


if __name__ == "__main__":
    main()
