"""Which files are a network's weights: one variant, whole or all of its shards."""

import json

import pytest

from composer_jax.models.weight_files import choose_weights, find_weights, is_cut, lacking_weights

pytestmark = pytest.mark.fast

PARTS = ("00001-of-00002", "00002-of-00002")


def names(pattern, index):
    return [index, *(pattern.format(part) for part in PARTS)]


FP16 = names("x.fp16-{}.safetensors", "x.safetensors.index.fp16.json")
OLD = names("x-{}.fp16.safetensors", "x.safetensors.fp16.index.json")
PLAIN = names("x-{}.safetensors", "x.safetensors.index.json")


@pytest.mark.parametrize(
    ("there", "chosen"),
    [
        (["x.safetensors", "x.fp16.safetensors", *PLAIN], ["x.safetensors"]),
        ([*FP16, *PLAIN], PLAIN),
        ([*FP16, "x.bf16.safetensors"], FP16),
        (OLD, OLD),
        (["x.fp16.safetensors", "x.fp32.safetensors"], ["x.fp32.safetensors"]),
        (["x.non_ema.safetensors", "x.bf16.safetensors"], ["x.bf16.safetensors"]),
        (["x.non_ema.safetensors"], ["x.non_ema.safetensors"]),
        (["y.safetensors", "x.bin", "xx.safetensors", "x.json", PLAIN[1]], []),
    ],
)
def test_one_variant_is_chosen(tmp_path, there, chosen):
    assert choose_weights(there, "x") == chosen
    for name in there:
        (tmp_path / name).write_text("{}")
    if chosen:
        assert find_weights(tmp_path, "x") == tmp_path / chosen[0]


@pytest.mark.parametrize("files", [FP16, OLD, PLAIN])
def test_shards_that_are_not_there_lack(tmp_path, files):
    (tmp_path / "unet").mkdir()
    index, *shards = files
    (tmp_path / "unet" / index).write_text(
        json.dumps({"weight_map": dict(zip("ab", shards, strict=True))})
    )
    (tmp_path / "unet" / shards[0]).touch()
    assert lacking_weights(tmp_path, "unet/x") == f"unet/{shards[1]}"
    (tmp_path / "unet" / shards[1]).touch()
    assert lacking_weights(tmp_path, "unet/x") == ""
    assert lacking_weights(tmp_path, "vae/x") == "vae/x.safetensors"
    assert is_cut(tmp_path / "unet" / shards[0]) and not is_cut(tmp_path / "unet" / index)
