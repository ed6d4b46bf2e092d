"""Plans: the same program that trains, its numbers, and what a user may get wrong."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from composer_jax.cli import main
from composer_jax.commands.plan import _run
from composer_jax.models.initializers import described, initialised
from composer_jax.models.unet import PRESETS, REMAT, UNet
from composer_jax.training.collectives import Traffic, collectives
from composer_jax.training.config import load_config
from composer_jax.training.hardware import CHIPS, chip_of, devices_of, step_flops
from composer_jax.training.plan import Cost, _composer, clip_sizes, codec_config, largest
from composer_jax.training.state import abstract_state
from tests.small import OVERRIDES

HLO = """HloModule jit_step

%body (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %gathered = f32[32]{0} all-gather(%x), replica_groups={{0,1,2,3}}, dimensions={0}
}

%cond (arg: (s32[], f32[8])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%other (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %sent = bf16[16]{0} collective-permute(%x), source_target_pairs={{0,1}}
}

%below_eight (arg: (s32[], f32[8])) -> pred[] {
  %eight = s32[] constant(8)
  %counter = s32[] get-tuple-element(%arg), index=0
  ROOT %test = pred[] compare(%counter, %eight), direction=LT
}

%by_twos (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %two = s32[] constant(2)
  %counted = s32[] get-tuple-element(%arg), index=0
  %passed = bf16[16]{0} collective-permute(%x), source_target_pairs={{0,1}}
  %next = s32[] add(%counted, %two)
  ROOT %both = (s32[], f32[8]) tuple(%next, %x)
}

%all-reduce-scatter.1 (input: bf16[16]) -> bf16[4] {
  %reduced = bf16[16]{0} all-reduce(%input), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %slice = bf16[4]{0} dynamic-slice(%reduced, %offset), dynamic_slice_sizes={4}
}

%async_collective_fusion.1 (x: bf16[8]) -> bf16[32] {
  %begun = bf16[32]{0} all-gather(%x), channel_id=7, dimensions={0}, \
backend_config={"async_collective_fusion_config":{"flag_end":"-1"}}
}

%async_collective_fusion.2 (x: bf16[8]) -> bf16[32] {
  %continued = bf16[32]{0} all-gather(%x), channel_id=7, dimensions={0}, \
backend_config={"async_collective_fusion_config":{"flag_end":"8"}}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %within = bf16[32]{0} fusion(%half), kind=kOutput, calls=%async_collective_fusion.1
  %after = bf16[32]{0} fusion(%half), kind=kOutput, calls=%async_collective_fusion.2
  %ahead = (f32[8]{0}, f32[32]{0}) all-gather-start(%p), dimensions={0}
  %work = f32[8]{0} fusion(%p), kind=kLoop, calls=%add
  %here = f32[32]{0} all-gather-done(%ahead)
  %fused = bf16[4]{0} fusion(%half), kind=kCustom, calls=%all-reduce-scatter.1
  %all = (f32[8]{0}, bf16[4,2]{1,0}) all-reduce(%a, %b), to_apply=%add
  %start = (f32[8]{0}, f32[32]{0}) all-gather-start(%p), dimensions={0}
  %done = f32[32]{0} all-gather-done(%start)
  %piece = f32[2]{0} reduce-scatter(f32[8]{0} %p), replica_groups={{0,1,2,3}}, to_apply=%add
  %split = f32[2]{0} reduce-scatter(%p), replica_groups=[1,4]<=[4], to_apply=%add
  %loop = (s32[], f32[8]{0}) while(%t), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  %zero = s32[] constant(0)
  %begin = s32[] copy(%zero)
  %pair = (s32[], f32[8]) tuple(%begin, %p)
  %four = (s32[], f32[8]{0}) while(%pair), condition=%below_eight, body=%by_twos
  ROOT %endless = (s32[], f32[8]{0}) while(%t), condition=%cond, body=%other
}
"""


def test_collectives_count_once_or_as_often_as_loops_go_round_and_hide_behind_work():
    assert collectives(HLO) == {
        "all-gather": Traffic(1 + 1 + 1 + 3, 64 + 128 + 128 + 3 * 128, hidden=64 + 128),
        "all-reduce": Traffic(1, 32 + 16),
        "collective-permute": Traffic(4 + 1, 4 * 32 + 32, unknown=1),
        "reduce-scatter": Traffic(3, 64 + 32),
    }


def test_collectives_of_sparse_cores_begin_where_they_get_their_operand():
    text = """HloModule jit_step

%sum.1 (p: bf16[8,4]) -> bf16[8,4] {
  ROOT %all-reduce.1 = bf16[8,4]{1,0} all-reduce(%p), channel_id=1, to_apply=%add
}, execution_thread="sparsecore"

%async_computation (p: bf16[8,4]) -> bf16[8,4] {
  ROOT %custom-call = bf16[8,4]{1,0} custom-call(%p), called_computations={%sum.1}
}, execution_thread="sparsecore"

ENTRY %main (p: bf16[8,4]) -> bf16[8,4] {
  %begun = ((), (), (s32[8]{0})) async-start(), calls=%async_computation
  %before = bf16[8,4]{1,0} fusion(%p), kind=kLoop, calls=%add
  %given = ((bf16[8,4]{1,0}), bf16[8,4]{1,0}) async-update(%begun, %before), output={}
  ROOT %done = bf16[8,4]{1,0} async-done(%given)
}
"""
    assert collectives(text) == {"all-reduce": Traffic(1, 64)}
    work = "  %beside = bf16[8,4]{1,0} fusion(%p), kind=kLoop, calls=%add\n  ROOT %done"
    beside = text.replace("  ROOT %done", work)
    assert collectives(beside) == {"all-reduce": Traffic(1, 64, hidden=64)}


@pytest.mark.mesh
def test_collectives_of_a_program_that_xla_split():
    mesh = jax.make_mesh((8,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    x = jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=sharding)
    text = jax.jit(lambda x: x.sum(0)).lower(x).compile().as_text()
    assert collectives(text) == {"all-reduce": Traffic(1, 64)}


def test_chips_are_known_by_their_kind():
    kinds = {
        "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p",
        "TPU v6 lite": "v6e", "TPU v6e": "v6e", "TPU7x": "tpu7x", "NVIDIA H200": "h200",
        "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H100 PCIe": "h100-pcie", "NVIDIA L4": "l4",
        "NVIDIA A100-SXM4-40GB": "a100-40gb", "NVIDIA A100-PCIE-40GB": "a100-40gb",
        "NVIDIA A100-SXM4-80GB": "a100-80gb", "NVIDIA A100 80GB PCIe": "a100-80gb-pcie",
        "NVIDIA L40S": "l40s", "NVIDIA GH200 480GB": "gh200", "NVIDIA B200": "b200",
    }  # fmt: skip
    for kind, name in kinds.items():
        assert chip_of(kind) is CHIPS[name], kind
    assert chip_of("NVIDIA A100-SXM4-40GB").memory == 40 * 2**30
    every = [kind for chip in CHIPS.values() for kind in chip.kinds]
    assert len(every) == len(set(every))


@pytest.mark.parametrize(
    "kind", ["cpu", "TPU v5 litepod", "TPU v4 lite", "TPU v3", "NVIDIA A100", "NVIDIA L40",
             "NVIDIA H100", "NVIDIA A100-SXM4-80GB MIG 1g.10gb", "NVIDIA A10G", "Tesla T4", ""],
)  # fmt: skip
def test_a_kind_that_is_not_known_is_not_guessed(kind):
    assert chip_of(kind) is None


def test_flops_are_not_counted_where_the_compiler_hides_them():
    compiled = jax.jit(lambda x: x @ x).lower(jnp.ones((64, 64))).compile()
    assert step_flops(compiled, jax.devices()[0]) == pytest.approx(2 * 64**3, rel=0.1)
    assert step_flops(compiled, SimpleNamespace(platform="gpu")) == 0.0


@pytest.mark.mesh
def test_the_plan_of_what_is_here(capsys, tmp_path):
    path = tmp_path / "plan.json"
    words = ["plan", "--config", "scenes64:smoke", "--topology", "here", "--json", str(path)]
    words += [f"--config.{override}" for override in OVERRIDES]
    assert main([*words, "--config.conditions=palette,sketch", "--batch", "16"]) == 0
    out, report = capsys.readouterr().out, json.loads(path.read_text())
    assert report["batch"] == 16 and report["mesh"] == {"data": 8, "fsdp": 1, "tensor": 1}
    assert report["flops"] > 0 and report["peak"] >= report["arguments"] + report["temporaries"]
    assert report["collectives"]["all-reduce"]["bytes"] > 0 and report["memory"] is None
    assert "16, 2 a device" in out and "all-reduce" in out and "data 8" in out


def test_a_batch_in_which_nothing_is_stored_is_traced():
    config = load_config("scenes64:smoke", ["conditions=intensity,mask"])
    params, loss, shapes = _composer(config, 8)
    assert shapes["stored"] == {} and shapes["image"].shape == (8, 64, 64, 3)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 8))
    value, _ = jax.eval_shape(loss, abstract_state(params, optax.identity()).params, shapes, keys)
    assert value.shape == (8,)


@pytest.mark.parametrize("more", [["model.unet.patch=3"], ["image_size=72"]])
def test_an_image_that_the_levels_cannot_halve_is_refused(more):
    config = load_config("scenes64:smoke", more)
    message = r"config key image_size is \d+; a multiple of \d+ is wanted: of the codec's 4 x model"
    with pytest.raises(ValueError, match=message):
        _composer(config, 8)


@pytest.mark.mesh
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--topology", "v5x:2x2"], "did you mean 'v5"),
        (["--topology", "v4:4x4"], "v4 comes in 3 dimensions, for example v4:2x2x1"),
        (["--topology", "tpu7x:4x4"], "tpu7x comes in 3 dimensions"),
        (["--topology", "v5e:0x1"], "for example v5e:4x4; each is a whole number from 1"),
        (["--topology", "v7x:2x2x1"], "there are v4, v5e, v5p, v6e, tpu7x, or 'here'"),
        (["--topology", "v5p:4x4"], "v5p comes in 3 dimensions, for example v5p:2x2x1"),
        (["--topology", "here", "--batch", "many"], "from 1 to 1048576, or auto, is wanted"),
        (["--topology", "here", "--batch", "9"], "no multiple of the 8 parts"),
        (["--topology", "here", "--batch", "auto"], "the memory of 'cpu' is not known"),
        (["--topology", "here", "--config.remat=block"], "did you mean 'blocks'"),
        (["--topology", "here", "--config.clip=openai/clip-vit-large"], "sizes are known for"),
    ],
)
def test_mistakes_end_in_one_line(words, message, capsys):
    assert main(["plan", "--config", "scenes64:smoke", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_run_costs_its_device_hours():
    known = {"images_per_second": 100.0, "devices": 4}
    run = _run(known, 3.6e6, 2.5)
    assert (run["hours"], run["device_hours"], run["cost"]) == (10.0, 40.0, 100.0)
    assert _run({"images_per_second": None, "devices": 4}, 3.6e6, 2.5)["cost"] is None


def test_without_libtpu_a_tpu_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(ValueError, match=r"pip install 'composer-jax\[tpu\]'"):
        devices_of("v5p:2x2x1")


def test_sizes_by_name_and_from_a_folder():
    assert clip_sizes("openai/clip-vit-large-patch14")["text_width"] == 768
    assert clip_sizes("bundled") == {"text_length": 48, "text_width": 128, "embed_width": 128}
    assert codec_config("a/name").factor == 8 and codec_config("bundled").factor == 4
    with pytest.raises(ValueError, match="codec 'sd15' is no folder"):
        codec_config("sd15")


@pytest.mark.parametrize(("memory", "wanted"), [(99, None), (119, 1), (135, 2), (400, 16)])
def test_the_largest_batch_is_compiled_and_stepped_down(memory, wanted):
    def measured(n):
        peak = 80 + 20 * n + (5 if n > 16 else 0)  # not quite a line
        return Cost(n, 1, 0, 0, peak, 0.0, 0.0, None, {}, 0.0)

    found, leads = largest(measured, memory)
    assert (found and found.batch) == wanted and leads is None


@pytest.mark.parametrize("refused", [True, False])
def test_the_largest_batch_where_memory_grows_late(refused):
    sizes = []

    def measured(n):
        sizes.append(n)
        peak = max(400, 10 * n)
        fits = peak <= 1000 or not refused  # a compiler may refuse, or say how much it would take
        return Cost(n, 1, 0, 0, peak, 0.0, 0.0, None, {}, 0.0) if fits else None

    found, leads = largest(measured, 1000, most=1000)
    assert leads is None and 94 <= found.batch <= 100 and len(sizes) == len(set(sizes)) <= 10


@pytest.mark.parametrize("most", [1, 2, 16])
def test_more_than_most_is_told_by_the_line_and_not_compiled(most):
    sizes = []

    def measured(n):
        sizes.append(n)
        return Cost(n, 1, 0, 0, 80 + 20 * n, 0.0, 0.0, None, {}, 0.0)

    found, leads = largest(measured, 20080, most)
    assert found.batch == most == max(sizes)
    assert leads == (None if most == 1 else 1000)


@pytest.fixture(scope="module")
def gradients():
    """By remat: gradients of a small UNet, and the bytes kept from its forward pass for them."""
    x = jax.random.normal(jax.random.key(1), (1, 32, 32, 38))
    context = jax.random.normal(jax.random.key(2), (1, 24, 128))
    found = {}
    for remat in REMAT:
        config = replace(PRESETS["tiny"], block_out_channels=(16,), attention=(True,), heads=(2,))
        unet = initialised(described(UNet, config, remat=remat), 0)
        graph, params = nnx.split(unet)
        params = jax.tree.map(
            lambda p: p + 0.05 * np.random.default_rng(0).standard_normal(p.shape, np.float32),
            params,
        )

        def loss(params, graph=graph):
            return jnp.mean(nnx.merge(graph, params)(x, jnp.array([500.0]), context) ** 2)

        # XLA for CPUs merges what is computed twice, so the program's own memory says nothing
        _, backward = jax.eval_shape(lambda p, loss=loss: jax.vjp(loss, p), params)
        kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))
        found[remat] = jax.jit(jax.grad(loss))(params), kept
    return found


@pytest.mark.parametrize("remat", REMAT[1:])
def test_what_is_computed_again_has_the_same_gradient_in_less_memory(gradients, remat):
    (wanted, memory), (found, less) = gradients["none"], gradients[remat]
    for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a) + 1e-12
    assert less < 0.9 * memory


def test_remat_may_change_when_a_run_goes_on(tmp_path):
    from composer_jax.training.config import keep_config

    keep_config(load_config("scenes64:smoke"), tmp_path)
    keep_config(load_config("scenes64:smoke", ["remat=blocks"]), tmp_path)
