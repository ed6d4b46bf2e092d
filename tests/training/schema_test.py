"""Every key of every config is in the schema, and each refuses what it cannot be in one line."""

import re

import pytest

from composer_jax.training.config import flat, load_config
from composer_jax.training.schema import allowed_keys, check_together, check_values

pytestmark = pytest.mark.fast

VARIANTS = (  # of configs
    "scenes64",
    *(f"scenes64:{v}" for v in ("cpu", "anneal", "captions", "quick", "ablation", "smoke")),
    *(f"{name}{v}" for name in ("sd15_composer", "sd21_composer", "scenes64_clip",
      "scenes64_codec", "scenes64_depth", "scenes64_objects") for v in ("", ":smoke")),
)  # fmt: skip
NAN, INF = float("nan"), float("inf")
JUNK = (NAN, INF, -INF, 10**30, -1e30, object, {"a": 1}, b"x", [[1]])
NUMBER = (*JUNK, True, "", "x", "1", [], [0.5], (0.5,))
WHOLE = (*NUMBER, -2, 1.5, 0.5, None)
TEXT = (*JUNK, None, 0, 1.5, True, ["a"], ("a",), "a\0b", "a\nb")
CHOICE = (*TEXT, "", "nosuch")
LIST = (None, 1, 1.5, True, NAN, "abc", {"a": 1})
WRONG = {  # regular expression on keys -> what none of them may be
    r"seed|optimizer\.warmup|sample_every|clip_text\.skip|altered": WHOLE,
    r"steps|batch|accumulate|image_size|(log|save|snapshot|held_out)_every|sampler\.steps|"
    r"model\.(unet\.)?(\w+_channels|patch|norm_num_groups|layers_per_block|cross_attention_dim)|"
    r"model\.(local_channels|stem_width|tokens_per_vector|context_length)|mesh\.\w+": (*WHOLE, 0),
    r"optimizer\.(learning_rate|clip)": (*NUMBER, 0, -1e-3, None),
    r"optimizer\.(weight_decay|decay)|ema|drop_all|keep_all|kl_weight|edge_weight": (
        *NUMBER, -0.1, 1e7, None),
    r"keep|keep_maps|keep_each\.\w+": (*NUMBER, -0.1, 1.1),
    r"sampler\.guidance|process\.location": (*NUMBER, 1e9, None),
    r"process\.min_snr": (*NUMBER, 0, -1),
    r"task|dtype|precision|remat|norm|\w+\.(name|schedule|mu_dtype|stems|vectors|prediction|density|solver)":
        CHOICE,
    r"source|codec|clip": (*TEXT, "", " "),
    r"held_out|pools|init_from|clip_text\.pad|tools\.\w+": TEXT,
    r"trainable": (*JUNK, None, 3, "([", "*"),
    r".*(zero_terminal_snr|init_any_process|use_linear_projection|mid_attention|linear_skip)": (
        0, 1, None, "true", "", [], NAN),
    r"optimizer\.betas": (*LIST, (), (0.9,), (0.9, 0.99, 1), (0.9, 1), (-0.1, 0.9), (0.9, NAN),
                          ("a", "b")),
    r"optimizer\.groups": (*LIST, ("a",), (("a",),), (("a", -1),), (("([", 1),), (("a", INF),)),
    r"sharding": (*LIST, ("kernel",), (("kernel", "fdsp"),), (("([", "fsdp"),),
                  (("a", "fsdp", 1),)),
    r"ema_lengths": (*LIST, (0,), (-0.1,), (0.5,), (NAN,), (0.1, 0.1), ("abc",)),
    r"profile_steps": (*LIST, (1, 2, 3), (0, 2), (1.5, 2), (3,), (3, 2)),
    r"conditions": (*LIST, ("depth", "depth"), ("depht",), ("",), (1,)),
    r"model\.(unet\.)?(block_out_channels|heads|widths)": (
        *LIST, (), (0,), (-1,), (1.5,), ("a",), (10**9,)),
    r"model\.unet\.attention": (*LIST, (), (1,), ("True",)),
    r"model\.latent_(mean|std)": (*LIST, (), (NAN,), ("a",)),
    r"model\.(shapes|colours|sizes)": (*LIST, (), (1,), ("a", "a"), ("",)),
}  # fmt: skip


def wrong_of(key):
    return next((values for pattern, values in WRONG.items() if re.fullmatch(pattern, key)), None)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_key_refuses_every_wrong_value_by_name(name):
    config = load_config(name)
    known, allowed = flat(config), allowed_keys(config.task)
    assert set(known) <= set(allowed)
    for key in known:
        assert wrong_of(key), f"no wrong values are listed for {key}"
        for value in wrong_of(key):
            if key == "sample_every" and value == 0:
                continue
            with pytest.raises(ValueError, match=r"is|has|no ") as refused:
                check_values({**known, key: value})
                with config.unlocked(), config.ignore_type():
                    changed = config.copy_and_resolve_references()
                with changed.unlocked(), changed.ignore_type():
                    changed.update_from_flattened_dict({key: value})
                check_together(changed)
            line = str(refused.value)
            assert "\n" not in line and len(line) < 700
            assert key.split(".")[-1] in line or "condition" in line, (key, value, line)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optimizer.betas=0.9,0.99,1", r"betas is \(0.9, 0.99, 1\); a list of 2 values"),
        ("optimizer.betas=3", r"betas is \(3,\)"),
        ("optimizer.learning_rate=1e999", "learning_rate is inf; a number above 0"),
        ("ema=2", "ema is 2.0"),
        ("dtype=fp32", "did you mean 'float32'"),
        ("dtype=bf16", "did you mean 'bfloat16'"),
        ("sharding=kernel", "regular expression, tactic"),
        ("trainable=([", "a regular expression is wanted"),
        ("steps=0x" + "f" * 5000, "steps is a number of thousands of digits"),
        ("steps=" + "(" * 500, "steps is "),
        ("sampler.solver=nosuch", "one of ddim"),
        ("conditions=depht", "did you mean 'depth'"),
        ("accumulate=3", "must divide the batch of 256"),
        ("mesh.fsdp=-1", "at most one size may be -1"),
        ("keep_all=0.99", "together at most 1"),
        ("source=scenes:99999999999999999999", "COUNT of scenes:COUNT is 99999999999999999999"),
        ("held_out=foldr:x", "did you mean 'folder'"),
        ("model.unet.heads=1", r"model\.unet\.heads"),
        ("process.prediction=eps", r"process\.prediction"),
    ],
)
def test_overrides_are_refused_before_anything_is_opened(override, says):
    with pytest.raises(ValueError, match=says):
        load_config("scenes64", [override])


def test_sizes_that_do_not_fit_together_are_refused():
    for name, override, says in (
        ("scenes64", "model.unet.in_channels=14", "model.local_channels, 38, is wanted"),
        ("scenes64_depth", "image_size=65", "a multiple of 8 is wanted"),
        ("scenes64_codec", "image_size=65", "a multiple of 4 is wanted"),
    ):
        with pytest.raises(ValueError, match=says):
            load_config(name, [override])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def get_config(:\n", r"bad\.py, line 1: SyntaxError"),
        ("x = 1\nraise KeyError('a')\n", r"bad\.py, line 2: KeyError"),
        ("x = 1\n", r"bad\.py has no get_config\(\)"),
        ("get_config = 3\n", r"bad\.py has no get_config\(\)"),
        ("def get_config():\n    return {}\n", "returns a dict; an ml_collections ConfigDict"),
        ("def get_config(v):\n    return 1 / 0\n", r"bad\.py, line 2: ZeroDivisionError"),
        ("import nosuch_module\n", r"bad\.py, line 1: ModuleNotFoundError"),
        ("import sys\nsys.exit(3)\n", r"bad\.py, line 2: SystemExit"),
        ("from ml_collections import ConfigDict\nget_config = lambda v: ConfigDict()\n",
         "lacks the key 'task'"),
        ("from composer_jax.configs import scenes64\ndef get_config(v):\n"
         "    c = scenes64.get_config('smoke'); c.stpes = 3; return c\n",
         "no key 'stpes' .*did you mean 'steps'"),
        ("from composer_jax.configs import scenes64\ndef get_config(v):\n"
         "    c = scenes64.get_config('smoke'); del c.batch; return c\n", "lacks the key 'batch'"),
        ("from composer_jax.configs import scenes64\ndef get_config(v):\n"
         "    c = scenes64.get_config('smoke'); c.steps = 'a'; return c\n",
         r"bad\.py, line 3: TypeError"),
    ],
)  # fmt: skip
def test_a_config_file_that_makes_no_config_is_named_with_its_line(text, says, tmp_path):
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(ValueError, match=says) as refused:
        load_config(str(tmp_path / "bad.py"))
    assert "\n" not in str(refused.value)


def test_a_config_file_may_use_numpys_numbers_and_take_no_variant(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import numpy as np\nfrom composer_jax.configs import scenes64\ndef get_config():\n"
        "    c = scenes64.get_config('smoke')\n    c.update({'seed': 2**40})\n    return c\n"
    )
    assert load_config(str(tmp_path / "mine.py")).seed == 2**40
    with pytest.raises(ValueError, match="has no variants, and 'x' is asked for"):
        load_config(f"{tmp_path / 'mine.py'}:x")
