"""The guidance plan: every formula it states, by what the mixed rows come to."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_jax.diffusion import (
    Plan,
    Process,
    Use,
    as_uses,
    build_plan,
    check_spans,
    evaluation_times,
    mix,
    rescale,
    sample,
    trimmed,
    two_sets,
    use,
)
from composer_jax.diffusion.guidance import BUCKETS, bucket

pytestmark = pytest.mark.fast

NAMES = ("caption", "depth", "palette", "sketch")
TIMES = np.linspace(1, 0, 11, dtype=np.float32)[:-1]
LEFT = np.repeat([[1.0, 0.0]], 2, axis=0)


def plan(uses, **options):
    return build_plan(uses, NAMES, TIMES, **options)


def network(assignment):
    """Some output for what each condition is given, as ((source, strength), ...); not additive."""
    return hash(tuple((j, round(float(s), 4)) for j, s in assignment)) % 1000 / 100.0


def mixed(made, s=0, output=network):
    """What a plan's rows come to at evaluation s, [h, w] in float64; padded rows left out."""
    total = 0.0
    for k in range(made.source.shape[0]):
        row = zip(made.source[k], made.strength[s, k], strict=True)
        total = total + made.weight[s, k].astype(np.float64) * output(tuple(row))
    return total


def out(**given):
    """The network's output for conditions given by name as source, or (source, strength)."""
    pairs = [given.get(name, 0) for name in NAMES]
    return network(tuple(p if isinstance(p, tuple) else (p, float(p > 0)) for p in pairs))


def test_classifier_free_is_two_rows():
    made = plan({"caption": "a cat", "sketch": use(1, strength=0.7)}, guidance=3.0)
    np.testing.assert_array_equal(made.source, [[1, 0, 0, 1], [0, 0, 0, 0]])
    np.testing.assert_allclose(made.strength[:, 0], [[1, 0, 0, 0.7]] * 10, rtol=1e-6)
    np.testing.assert_array_equal(made.strength[:, 1], 0)
    np.testing.assert_array_equal(made.weight[:, :, 0, 0], [[3, -2]] * 10)
    assert made.source.dtype == np.int32
    assert made.strength.dtype == made.weight.dtype == np.float32
    assert made.weight.shape == (10, 2, 1, 1)


def test_without_guidance_the_second_row_has_no_weight():
    made = plan({"caption": 0}, guidance=1.0)
    np.testing.assert_array_equal(made.weight[:, :, 0, 0], [[1, 0]] * 10)
    made = plan({"caption": 0}, guidance=4.0, interval=(0.2, 0.5))
    np.testing.assert_array_equal(made.weight[:, 1, 0, 0], [0, 0, -3, -3, -3, 0, 0, 0, 0, 0])


def test_nothing_given_is_one_row():
    made = plan({})
    np.testing.assert_array_equal(made.source, [[0, 0, 0, 0]])
    np.testing.assert_array_equal(made.weight, np.ones((10, 1, 1, 1)))
    assert build_plan({}, (), TIMES).source.shape == (1, 0)


def test_windows_are_in_process_time():
    made = plan({"sketch": use(0, window=(0.0, 0.6)), "depth": use(0, window=(0.3, 1.0))})
    np.testing.assert_array_equal(made.strength[:, 0, 3], [1] * 6 + [0] * 4)
    np.testing.assert_array_equal(made.strength[:, 0, 1], [0] * 3 + [1] * 7)
    # Heun looks twice at most times; the window does not care.
    times = evaluation_times(Process().times(5), "heun")
    made = build_plan({"sketch": use(0, window=(0.0, 0.5))}, ("sketch",), times)
    np.testing.assert_array_equal(made.strength[:, 0, 0], (times > 0.5).astype(float))
    # An inversion starts at t = 0, the end of sampling.
    made = build_plan({"sketch": 0}, ("sketch",), TIMES[::-1] - 0.1)
    np.testing.assert_array_equal(made.strength[:, 0, 0], 1)


@pytest.mark.parametrize("solver", ["euler", "heun", "ddim"])
@pytest.mark.parametrize("start", [1.0, 0.8, 0.5, 0.07])
def test_windows_are_shares_of_the_run_wherever_it_begins(solver, start):
    """On an even grid the plan of a run from an image is that of a whole one, bit for bit."""
    uses = {
        "caption": [use(0, window=(0.0, 0.5)), use(1, window=(0.5, 1.0))],
        "sketch": use(0, 0.7, window=(0.2, 0.7)),
        "depth": use(0, scale=4.0),
    }
    options = dict(guidance=3.0, interval=(0.3, 0.8), spatial=("sketch", "depth"))
    whole, part = (
        build_plan(
            uses,
            NAMES,
            evaluation_times(Process().times(10, start=at), solver),
            start=at,
            **options,
        )
        for at in (1.0, start)
    )
    jax.tree.map(np.testing.assert_array_equal, whole, part)


def test_windows_are_in_process_time_on_uneven_grids():
    times = Process().times(10, "karras", start=0.5)
    made = build_plan({"sketch": use(0, window=(0.0, 0.5))}, ("sketch",), times[:-1], start=0.5)
    np.testing.assert_array_equal(made.strength[:, 0, 0], times[:-1] > 0.25)
    assert 0 < made.strength[:, 0, 0].sum() < 5


@pytest.mark.parametrize(
    ("uses", "interval", "message"),
    [
        (
            {"sketch": use(0, window=(0.01, 0.09))},
            (0, 1),
            r"sketch: window \(0.01, 0.09\) meets no",
        ),
        ({"sketch": [use(0), use(1, window=(0.91, 1))]}, (0, 1), r"window \(0.91, 1\) meets no"),
        (
            {},
            (0.41, 0.49),
            r"interval \(0.41, 0.49\) meets no evaluation; .* 0, 0.1, 0.2, ..., 0.9",
        ),
    ],
)
def test_what_meets_no_evaluation_is_refused(uses, interval, message):
    uses = {name: as_uses(value) for name, value in uses.items()}
    for start in (1.0, 0.3):
        with pytest.raises(ValueError, match=message):
            check_spans(uses, interval, start * TIMES, start)
        check_spans(uses, (0.4, 0.41), start * np.linspace(1, 0, 101), start)


def test_a_negative_use_stands_in_the_second_row():
    made = plan({"caption": ["good", use("bad", negative=True)], "depth": 0}, guidance=5.0)
    np.testing.assert_array_equal(made.source, [[1, 1, 0, 0], [2, 0, 0, 0]])
    np.testing.assert_allclose(
        mixed(made), 5 * out(caption=1, depth=1) - 4 * out(caption=2), rtol=1e-6
    )
    made = plan({"palette": use("grey", negative=True)}, guidance=5.0)
    np.testing.assert_allclose(mixed(made), 5 * out() - 4 * out(palette=1), rtol=1e-6)


def test_composers_two_sets():
    first = {"caption": "old", "depth": 0}
    second = {"caption": "new", "sketch": 0, "depth": 0}
    uses = two_sets(first, second)
    assert [one.value for one in uses["caption"]] == ["new", "old"]
    made = plan(uses, guidance=3.0)
    np.testing.assert_array_equal(made.source, [[1, 1, 0, 1], [2, 2, 0, 0]])
    np.testing.assert_array_equal(made.weight[:, :, 0, 0], [[3, -2]] * 10)


def test_a_scale_is_a_guidance_of_its_own():
    """With one scale: InstructPix2Pix's eq. 3, whose image is what has no scale here."""
    made = plan({"caption": use(0, scale=7.0), "sketch": 0}, guidance=1.5)
    u, c_sketch, c = out(), out(sketch=1), out(sketch=1, caption=1)
    np.testing.assert_allclose(mixed(made), u + 1.5 * (c_sketch - u) + 7 * (c - c_sketch))
    assert made.source.shape == (4, 4)
    np.testing.assert_array_equal(made.source[:3], [[1, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 1]])


def test_two_scales_are_added_one_after_another():
    uses = {"palette": 0, "depth": use(0, scale=4.0), "sketch": use(0, scale=0.5)}
    u, c0 = out(), out(palette=1)
    c1, c2 = out(palette=1, depth=1), out(palette=1, depth=1, sketch=1)
    want = u + 2 * (c0 - u) + 4 * (c1 - c0) + 0.5 * (c2 - c1)
    np.testing.assert_allclose(mixed(plan(uses, guidance=2.0)), want, rtol=1e-5)
    # Outside the interval guidance is off, but a condition at half scale stays at half.
    made = plan(uses, guidance=2.0, interval=(0.0, 0.3))
    np.testing.assert_allclose(mixed(made, 0), want, rtol=1e-5)
    np.testing.assert_allclose(mixed(made, 5), c1 + 0.5 * (c2 - c1), rtol=1e-5)


def test_the_ends_of_a_scale():
    others = {"palette": 0, "depth": 0}
    plain = plan(others | {"sketch": 0}, guidance=2.5)
    same = plan(others | {"sketch": use(0, scale=2.5)}, guidance=2.5)
    np.testing.assert_allclose(mixed(same), mixed(plain), rtol=1e-6)
    without = plan(others | {"sketch": use(0, scale=0.0)}, guidance=2.5)
    np.testing.assert_allclose(mixed(without), mixed(plan(others, guidance=2.5)), rtol=1e-6)
    alone = plan({"sketch": use(0, scale=6.0)}, guidance=2.5)  # then it is the guidance
    np.testing.assert_allclose(mixed(alone), out() + 6 * (out(sketch=1) - out()), rtol=1e-6)


def test_two_palettes_share_a_picture():
    uses = {"palette": [use(0, region=LEFT), use(1, region=1 - LEFT)], "depth": 0}
    made = plan(uses, guidance=3.0, size=(2, 2))
    assert made.source.shape == (4, 4) and made.weight.shape == (10, 4, 2, 2)
    left = 3 * out(depth=1, palette=1) - 2 * out()
    right = 3 * out(depth=1, palette=2) - 2 * out()
    np.testing.assert_allclose(mixed(made), [[left, right]] * 2, rtol=1e-5)


def test_a_region_ends_at_the_other_uses_or_at_nothing():
    made = plan({"sketch": use(0, region=LEFT)}, guidance=2.0, size=(2, 2))
    np.testing.assert_allclose(mixed(made), [[2 * out(sketch=1) - out(), out()]] * 2, rtol=1e-5)
    uses = {"caption": ["everywhere else", use("left", region=LEFT)]}
    made = plan(uses, guidance=1.0, size=(2, 2))
    np.testing.assert_allclose(mixed(made), [[out(caption=2), out(caption=1)]] * 2, rtol=1e-5)


def test_regions_that_overlap_share_and_soft_ones_blend():
    ones = np.ones((2, 2))
    uses = {"caption": [use("a", region=ones), use("b", region=ones)]}
    made = plan(uses, guidance=1.0, size=(2, 2))
    np.testing.assert_allclose(mixed(made), 0.5 * (out(caption=1) + out(caption=2)) * ones)
    made = plan({"caption": use("a", region=0.25 * ones)}, guidance=1.0, size=(2, 2))
    np.testing.assert_allclose(mixed(made), (0.25 * out(caption=1) + 0.75 * out()) * ones)


def test_uses_take_turns_by_their_windows():
    uses = {"caption": [use("a", window=(0, 0.4)), use("b", window=(0.4, 1))]}
    made = plan(uses, guidance=1.0)
    got = [float(np.squeeze(mixed(made, s))) for s in range(10)]
    np.testing.assert_allclose(got, [out(caption=1)] * 4 + [out(caption=2)] * 6, rtol=1e-6)
    both = plan({"caption": [use("a"), use("b")]}, guidance=1.0)
    np.testing.assert_allclose(mixed(both), 0.5 * (out(caption=1) + out(caption=2)), rtol=1e-6)


def test_regions_are_resized_by_area():
    region = np.zeros((8, 6))
    region[:, :3] = 1
    made = plan({"sketch": use(0, region=region)}, guidance=1.0, size=(2, 4))
    np.testing.assert_allclose(made.weight[0, 0], [[1, 1, 0, 0]] * 2, atol=1e-6)
    made = plan({"sketch": use(0, region=region)}, guidance=1.0, size=(2, 3))
    np.testing.assert_allclose(made.weight[0, 0], [[1, 0.5, 0]] * 2, atol=1e-6)
    made = plan({"sketch": use(0, region=LEFT[:1].astype(bool))}, guidance=1.0, size=(3, 4))
    np.testing.assert_allclose(made.weight[0, 0], [[1, 1, 0, 0]] * 3, atol=1e-6)


spans = st.tuples(st.integers(0, 9), st.integers(1, 10)).map(
    lambda s: (min(s) / 10, max(s) / 10) if s[0] != s[1] else (0.0, 1.0)
)
regions = st.none() | st.integers(1, 2**9 - 1).map(
    lambda bits: np.array([bits >> i & 1 for i in range(9)], np.float32).reshape(3, 3)
)


@st.composite
def some_uses(draw):
    def one():
        negative = draw(st.booleans())
        scale = None if negative else draw(st.none() | st.floats(0, 9))
        return use(
            0, draw(st.floats(0, 1)), draw(spans), scale, draw(regions), negative
        )  # fmt: skip

    chosen = draw(st.lists(st.sampled_from(NAMES), max_size=2, unique=True))
    return {name: [one() for _ in range(draw(st.integers(1, 2)))] for name in chosen}


@settings(max_examples=80, deadline=None)
@given(uses=some_uses(), guidance=st.floats(-2, 20), interval=spans)
def test_weights_sum_to_one_everywhere(uses, guidance, interval):
    try:
        made = plan(uses, guidance=guidance, interval=interval, size=(3, 3))
    except ValueError as error:
        assert "rows are needed" in str(error)
        return
    count = made.source.shape[0]
    assert count in BUCKETS and made.weight.shape == (10, count, 3, 3)
    np.testing.assert_allclose(made.weight.sum(1, dtype=np.float64), 1, atol=1e-5)
    assert made.strength.min() >= 0 and made.strength.max() <= 1
    assert (made.strength[:, made.source == 0] == 0).all()
    for i, name in enumerate(NAMES):
        assert made.source[:, i].max() <= len(uses.get(name, ()))
    used = made.source[made.weight.any((0, 2, 3))]
    assert len(np.unique(used, axis=0)) == len(used)


def test_rows_are_padded_with_nothing():
    uses = {name: use(0, scale=2.0 + i) for i, name in enumerate(NAMES)}
    made = plan(uses)  # 4 levels and the row without anything
    assert made.source.shape == (8, 4)
    assert not made.source[5:].any() and not made.strength[:, 5:].any()
    assert not made.weight[:, 5:].any()
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 9, 16)] == [1, 2, 4, 4, 8, 16, 16]


def test_mix():
    outputs = np.random.default_rng(0).normal(size=(2, 3, 4, 5, 6)).astype(np.float32)
    got = mix(jnp.asarray(outputs), jnp.array([3.0, -2.0])[:, None, None])
    np.testing.assert_allclose(got, 3 * outputs[0] - 2 * outputs[1], rtol=1e-5, atol=1e-6)
    weight = np.random.default_rng(1).random((2, 4, 5)).astype(np.float32)
    np.testing.assert_allclose(
        mix(jnp.asarray(outputs), jnp.asarray(weight)),
        np.einsum("kbhwc,khw->bhwc", outputs, weight),
        rtol=1e-5,
        atol=1e-6,
    )


def test_plans_of_one_bucket_never_recompile():
    process, network_calls = Process(), []
    times = process.times(4)

    @jax.jit
    def run(x, made):
        def evaluate(x, t, index):
            network_calls.append(1)
            added = jnp.sum(made.strength[index] * made.source, axis=1)
            rows = x[None] * (1.0 + added[:, None, None, None, None])
            return mix(rows, made.weight[index])

        return sample(evaluate, x, times, process, "euler")

    x = np.ones((1, 2, 2, 1), np.float32)
    at = evaluation_times(times, "euler")
    uses = [use(0), use(0, 0.3), use(0, window=(0.2, 0.9)), use(0, region=LEFT)]
    results = set()
    for one, guidance in itertools.product(uses, (1.0, 2.0)):
        made = build_plan({"sketch": one}, NAMES, at, guidance=guidance, size=(2, 2))
        assert isinstance(made, Plan)
        results.add(np.asarray(run(x, made)).tobytes())
    assert run._cache_size() == 1 and len(network_calls) == 1
    assert len(results) == 8


def test_what_counts_as_a_use():
    one = use("x", strength=0.5)
    assert as_uses(one) == (one,)
    assert as_uses(["#d62828", "#003049"])[0].value == ["#d62828", "#003049"]
    pair = as_uses([one, "y"])
    assert pair[0] is one and pair[1].value == "y" and isinstance(pair[1], Use)


@pytest.mark.parametrize(
    "values, says",
    [
        ({"strength": 1.5}, "strength is 1.5; a number from 0 to 1"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"strength": "0.5"}, "strength is '0.5'"),
        ({"window": (0.6, 0.2)}, r"window is \(0.6, 0.2\); 0 <= start < end <= 1"),
        ({"window": 0.5}, r"window is 0.5; \(start, end\)"),
        ({"scale": -1}, "scale is -1"),
        ({"scale": 2, "negative": True}, "takes no scale"),
        ({"negative": "no"}, "negative is 'no'"),
        ({"region": np.zeros((4, 4))}, "empty"),
        ({"region": np.full((4, 4), 255)}, "from 255 to 255; 0 to 1"),
        ({"region": np.ones(4)}, r"shape \(4,\)"),
        ({"region": "left.png"}, "str; an array"),
    ],
)
def test_wrong_uses(values, says):
    with pytest.raises(ValueError, match=says) as error:
        use("a cat", **values)
    assert "\n" not in str(error.value)


MANY = [use(0, region=np.eye(5)[i : i + 1]) for i in range(5)]


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: plan({"palete": 0}), "did you mean 'palette'"),
        (lambda: plan({"depth": 0}, guidance="3"), "guidance is '3'"),
        (lambda: plan({"depth": 0}, interval=(0.5, 0.5)), "interval"),
        (lambda: plan({"depth": use(0, region=LEFT)}), "latents' size"),
        (lambda: plan({n: [use(0), use(1)] for n in NAMES} | {"depth": MANY}, size=(4, 5)),
         "16 is the most"),
        (lambda: two_sets({"depth": use(0, negative=True)}, {}), "depth"),
        (lambda: two_sets({"depth": use(0, scale=2.0)}, {}), "scale"),
    ],
)  # fmt: skip
def test_wrong_plans(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_spatial_uses_share_a_row_by_area():
    """Two sketches in regions and two in windows: masks, where captions would need rows."""
    uses = [
        use(0, region=LEFT, strength=0.5),
        use(1, window=(0.0, 0.5)),
        use(2, window=(0.3, 1.0)),
        use(3, negative=True),
    ]
    made = plan(
        {"sketch": uses, "depth": use(0, region=LEFT)}, size=(2, 2), spatial=("sketch", "depth")
    )
    assert made.source.tolist() == [[0, 1, 0, 1], [0, 0, 0, 2]]
    np.testing.assert_array_equal(made.strength, np.broadcast_to(made.source > 0, (10, 2, 4)))
    assert made.area.shape == (10, 2, 2, 4, 2, 2)
    depth, sketch = made.area[:, 0], made.area[:, 1]  # in the order of names
    np.testing.assert_allclose(sketch[:, 0, 0], np.broadcast_to(0.5 * LEFT, (10, 2, 2)))
    right = 1 - LEFT  # where there is no region, the uses in their windows share
    np.testing.assert_allclose(sketch[0, 0, 1:3], [right, 0 * right])
    np.testing.assert_allclose(sketch[4, 0, 1:3], [0.5 * right, 0.5 * right])
    np.testing.assert_allclose(sketch[9, 0, 1:3], [0 * right, right])
    np.testing.assert_array_equal(sketch[:, 1, 3], 1.0)
    assert not sketch[:, 0, 3].any() and not sketch[:, 1, :3].any()
    np.testing.assert_array_equal(depth[:, 0, 0], np.broadcast_to(LEFT, (10, 2, 2)))


def test_autoguidance_pushes_away_from_the_guides_given_row():
    made = plan({"caption": "a"}, guidance=3.0, autoguidance=1.5, interval=(0.0, 0.5))
    np.testing.assert_allclose(made.weight[0, :, 0, 0], [3.5, -2.0])
    np.testing.assert_allclose(made.guide[0, :, 0, 0], [-0.5, 0.0])
    np.testing.assert_allclose(made.weight[9, :, 0, 0], [1.0, 0.0])
    assert not made.guide[9].any()
    np.testing.assert_allclose((made.weight + made.guide).sum(1), 1.0)
    np.testing.assert_allclose(made.given[:, :, 0, 0], [[1.0, 0.0]] * 10)


def test_given_is_what_guidance_is_compared_with():
    """The mean of c's rows by pixel, whatever guidance, scales and negatives make of them."""
    uses = {"palette": [use(0, region=LEFT), use(1, region=1 - LEFT)], "caption": use(0, scale=4.0)}
    made = plan(uses, guidance=2.0, size=(2, 2))
    np.testing.assert_allclose(made.given.sum(1), 1.0)
    for k, source in enumerate(made.source.tolist()):
        wanted = {(1, 0, 1, 0): LEFT, (1, 0, 2, 0): 1 - LEFT}.get(tuple(source), 0 * LEFT)
        np.testing.assert_allclose(made.given[:, k], np.broadcast_to(wanted, (10, 2, 2)))


def test_rescale_gives_the_given_rows_contrast_back():
    rng = np.random.default_rng(0)
    given, mixed = (
        rng.normal(size=(2, 3, 4, 4, 2)) * np.array([1.0, 5.0])[:, None, None, None, None]
    )
    given, mixed = given.astype(np.float32), mixed.astype(np.float32)
    np.testing.assert_array_equal(rescale(mixed, given, 0.0), mixed)
    whole = rescale(mixed, given, 1.0)
    np.testing.assert_allclose(np.std(whole, (1, 2, 3)), np.std(given, (1, 2, 3)), rtol=1e-5)
    # arXiv 2305.08891, eqs. 15 and 16
    factor = given.std((1, 2, 3), keepdims=True) / mixed.std((1, 2, 3), keepdims=True)
    np.testing.assert_allclose(
        rescale(mixed, given, 0.7), 0.7 * mixed * factor + 0.3 * mixed, rtol=1e-5, atol=1e-6
    )


def test_probed_conditions_get_rows_without_weight():
    made = plan(
        {"caption": "a", "sketch": use(0, strength=0.5)}, guidance=3.0, probe=("caption", "sketch")
    )
    assert made.source[made.probe].tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]]
    np.testing.assert_array_equal(made.strength[:, made.probe[2]], [[0, 0, 0, 0.5]] * 10)
    np.testing.assert_array_equal(made.weight[:, :, 0, 0], [[3, -2, 0, 0]] * 10)


def test_trimmed_keeps_what_acts():
    full = plan({"caption": "a"}, guidance=1.0, probe=("caption",))
    made = trimmed(full)
    assert made.source[made.probe].tolist() == full.source[full.probe].tolist()
    bare = trimmed(plan({"caption": "a"}, guidance=1.0))
    assert bare.source.tolist() == [[1, 0, 0, 0]]
    wide = trimmed(plan({"caption": "a"}, guidance=2.0), 3)
    assert wide.source.shape == (4, 4) and wide.weight[0, :, 0, 0].tolist() == [2, -1, 0, 0]
