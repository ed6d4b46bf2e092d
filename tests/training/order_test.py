"""A run keeps the order of its examples: the version is in its checkpoints."""

import json

import numpy as np
import pytest

from composer_jax.data import cache
from composer_jax.data.shards import read_notes, write_shard
from composer_jax.data.stream import Caches
from composer_jax.storage.checkpoints import newest_notes
from composer_jax.training.config import load_config
from composer_jax.training.tasks import make_task
from tests.training import toy

SIZES = {"factor": 4, "latent_channels": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A cache of 24 images, image i all of grey i."""
    folder = tmp_path_factory.mktemp("cache")
    made = {key: kind() for key, kind in cache.MADE.items()}
    made |= {"format": cache.FORMAT, "shards": 1, "image_size": 64, "sizes": SIZES}
    specs = cache.feature_specs((), SIZES, 64)
    features = cache.tfds_features(specs)
    image = np.full((24, 64, 64, 3), np.arange(24)[:, None, None, None], np.uint8)
    tree = {"image": image, "moments": np.zeros((24, 16, 16, 12), np.float16)}
    call, _ = cache.claim(folder, made)
    examples = [cache.serialise(features, specs, tree, row) for row in range(24)]
    write_shard(folder, 0, 1, examples, [], call)
    cache.finish(folder, [read_notes(folder, 0)], specs)
    return folder


def first_rows(folder, workdir):
    """Which examples the first batch of a run in `workdir` holds."""
    text = f"source=cache:{folder}"
    config = load_config("scenes64_codec:smoke", [text, "batch=24", "mesh.data=1"])
    data = make_task(config, Caches(config.source), workdir).data
    return data.batch(0)["image"][:, 0, 0, 0].tolist()


def forget_order(workdir):
    """Makes the checkpoints those of the version that knew one order alone."""
    for path in workdir.glob("checkpoints/*/notes/metadata"):
        notes = json.loads(path.read_text())
        del notes["order"]
        path.write_text(json.dumps(notes))


def test_an_old_run_goes_on_with_its_order_and_a_new_one_has_the_new(folder, tmp_path):
    old = Caches(f"cache:{folder}").batches(24, 0, order=1)(0)["image"][:, 0, 0, 0].tolist()
    new = Caches(f"cache:{folder}").batches(24, 0)(0)["image"][:, 0, 0, 0].tolist()
    assert old[:5] == [0, 1, 2, 11, 4] and sum(i == row for i, row in enumerate(new)) < 6
    assert newest_notes(tmp_path / "checkpoints") is None
    assert first_rows(folder, tmp_path) == new
    one = {"mesh": {"data": 1, "fsdp": 1, "tensor": 1}}
    toy.fit(tmp_path, toy.settings(8, **one))
    assert newest_notes(tmp_path / "checkpoints")["order"] == 2
    assert first_rows(folder, tmp_path) == new
    forget_order(tmp_path)
    assert first_rows(folder, tmp_path) == old
    toy.fit(tmp_path, toy.settings(12, **one))
    assert newest_notes(tmp_path / "checkpoints")["order"] == 1
    newest = tmp_path / "checkpoints" / "12" / "notes" / "metadata"
    newest.write_text(newest.read_text()[:20])  # then `restore` goes by step 8, as the order does
    assert first_rows(folder, tmp_path) == old
