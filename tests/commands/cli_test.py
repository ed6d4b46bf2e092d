"""The command line as a person meets it: what works, and what a mistake looks like."""

import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

import composer_jax as cj
from composer_jax import conditions
from composer_jax.cli import COMMANDS, HUGE_PAGES, XLA_OPTIONS, main
from tests.small import small_config


@pytest.fixture
def photo(tmp_path):
    import skimage.data

    path = tmp_path / "photo.jpg"
    Image.fromarray(skimage.data.astronaut()).resize((96, 80)).save(path)
    return path


def png_header(width: int, height: int) -> bytes:
    """A PNG file that stops where its pixels should begin."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))


def fails(capsys, *words) -> str:
    assert main([str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error
    return error


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['composer', '--help']\n"
        "from composer_jax.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {'jax', 'numpy', 'flax'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "decompose" in done.stdout and not done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_is_refused_before_anything_heavy_is_imported(command):
    code = (
        "import sys; from composer_jax.cli import main\n"
        f"code = main(['{command}', '--workdir=x', '--out=/dev/null/x'])\n"
        "assert code == 2 and not {'jax', 'numpy', 'flax'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "--out: /dev/null/x cannot be a folder: /dev/null is a file" in done.stderr


@pytest.mark.parametrize("words", [["--out", "~/new"], ["--out=~/new"]])
def test_the_home_folder_is_meant_where_a_shell_was_kept_from_saying_so(
    words, photo, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["decompose", f"~/{photo.name}", "--only", "intensity", *words]) == 0
    assert (tmp_path / "new" / photo.stem / "intensity.png").is_file()
    for said in ("train --config scenes64 --workdir=~/y --config.codec=~/none",
                 "prepare folder:~/none --out ~/y", "sample --model ~/none --out ~/y",
                 "sample --mask ~/photo.jpg:region=~/none --out ~/y"):  # fmt: skip
        assert f"{tmp_path}/none" in fails(capsys, *said.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", photo.name]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's setting")
@pytest.mark.parametrize("setting", [None, "glibc.malloc.check=0"])
def test_a_command_starts_itself_once_with_huge_pages(setting, tmp_path):
    code = (
        "import os, sys; from composer_jax.cli import main\n"
        "print(os.environ.get('GLIBC_TUNABLES'), flush=True)\n"
        "sys.argv = ['composer', 'sample', '--model', 'nowhere', '--out', 'out']; sys.exit(main())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    environment |= {"GLIBC_TUNABLES": setting} if setting else {}
    options = {"env": environment, "cwd": tmp_path, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", code], **options)
    assert done.returncode == 2 and done.stderr.startswith("composer: nowhere does not exist")
    assert done.stdout.split() == ([setting] if setting else ["None", HUGE_PAGES])


def test_decompose_writes_arrays_pictures_and_a_sheet(photo, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["decompose", str(photo), "--out", str(out)]) == 0
    assert "without depth" in capsys.readouterr().out
    written = {path.name for path in (out / "photo").iterdir()}
    found = ("intensity", "mask", "palette", "semantics", "sketch")
    assert written == {f"{name}.{kind}" for name in found for kind in ("npy", "png")}
    palette = np.load(out / "photo" / "palette.npy", allow_pickle=False)
    np.testing.assert_array_equal(palette, cj.decompose(photo, only=["palette"])["palette"])
    assert np.load(out / "photo" / "mask.npy", allow_pickle=False)["keep"].shape == (80, 96)
    assert (out / "contact_sheet.png").is_file()


def test_caption_comes_from_the_text_beside(photo, tmp_path):
    photo.with_suffix(".txt").write_text("an astronaut")
    out = tmp_path / "out"
    assert main(["decompose", str(photo), "--out", str(out), "--only", "caption"]) == 0
    assert np.load(out / "photo" / "caption.npy", allow_pickle=False)["text"] == "an astronaut"


def test_sample_from_an_image_and_from_words(run, photo, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["sample", "--model", run, "--from", photo, "--use", "sketch,palette", "--out", out,
             "--caption", "a red cone", "--sketch.strength", 0.5, "--sketch.window", "0:0.6",
             "--palette.negative", "#ffffff", "--count", 2, "--steps", 2]  # fmt: skip
    assert main([str(word) for word in words]) == 0
    assert Image.open(out / "0001.png").size == (64, 64) and (out / "grid.png").is_file()
    assert "given caption, palette, sketch" in capsys.readouterr().out


def test_a_codec_trains_on_a_folder_of_few_photos(photo, tmp_path, capsys):
    (photo.parent / "broken.png").write_text("text")
    words = ["train", "--config", "scenes64_codec:smoke", "--workdir", tmp_path / "run",
             f"--config.source=folder:{photo.parent}", "--config.image_size=32",
             "--config.sample_every=4"]  # fmt: skip
    assert main([str(word) for word in words]) == 0
    assert "trained 4 steps" in capsys.readouterr().out
    assert (tmp_path / "run" / "model" / "vae" / "config.json").is_file()
    assert Image.open(tmp_path / "run" / "samples" / "00000004.png").size == (34, 68)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["smaple"], "'smaple' (did you mean 'sample'?) (choose from"),
        (["edit", "translate", "PHOTO"], "'translate' (did you mean 'translation'?) (choose from"),
        (["edit", "variation", "PHOTO", "--out", "OUT", "--cuont", "3"], "did you mean '--count'"),
        (["sample", "--out", "OUT", "further"], "unrecognized arguments: further\n"),
        (["sample", "--out", "OUT", "--spacing", "unipc"], "'unipc' (choose from"),
        (["train", "--config", "scenes64", "--workdir", "OUT", "--stpes", "3"],
         "did you mean '--config.steps'"),
        (["sweep", "--config", "scenes64", "--out", "OUT", "--learning-rate=3"],
         "did you mean '--config.optimizer.learning_rate'"),
        (["plan", "--config", "scenes64", "--topology", "here", "--bacth", "3"],
         "did you mean '--batch'"),
        (["sample"], "required: --out"),
        (["sample", "--out", "OUT", "--skech", "x"], "did you mean '--sketch'"),
        (["sample", "--out", "OUT", "--model", "nowhere"], "nowhere does not exist"),
        (["sample", "--out", "OUT", "--model", "RUN", "--palette", "#zzz"], "#zzz"),
        (["sample", "--out", "OUT", "--model", "RUN", "--sketch", "no.png"], "no.png"),
        (["sample", "--out", "OUT", "--model", "RUN", "--count", "0"],
         "--count: the value is 0; a whole number from 1"),
        (["sample", "--out", "OUT", "--model", "RUN", "--steps", "0"],
         "--steps: the value is 0; a whole number from 1"),
        (["sample", "--out", "OUT", "--sketch.window", "late"], "START:END"),
        (["sample", "--out", "OUT", "--model", "RUN", "--sketch", "PHOTO", "--sketch.strength",
          "2"], "strength"),
        (["sample", "--out", "OUT", "--from", "PHOTO"], "go together"),
        (["sample", "--out", "OUT", "--model", "nowhere", "--from", "TEXT", "--use", "palette"],
         "text.png is not an image"),
        (["decompose", "no.png", "--out", "OUT"], "no.png"),
        (["decompose", "TEXT", "--out", "OUT"], "text.png"),
        (["decompose", "CUT", "--out", "OUT"], "cut.jpg"),
        (["decompose", "HUGE", "--out", "OUT"], "huge.png"),
        (["decompose", "PHOTO", "--out", "OUT", "--only", "pallete"], "did you mean 'palette'"),
        (["decompose", "PHOTO", "--out", "OUT", "--only", "depth"], "depth"),
        (["train", "--config", "scenes46", "--workdir", "OUT"], "did you mean 'scenes64'"),
        (["train", "--config", "scenes64", "--workdir", "OUT", "--config.stepz=1"], "'steps'"),
        (["train", "--config", "scenes64", "--workdir", "OUT", "--config.steps=x"], "steps is 'x'"),
        (["train", "--config", "scenes64:smoke", "--workdir", "OUT",
          "--config.source=folder:EMPTY"], "holds no image"),
        (["train", "--config", "scenes64:smoke", "--workdir", "OUT", "--config.pools=PHOTO"],
         "is a file; a folder is wanted"),
        (["train", "--config", "scenes64:smoke", "--workdir", "OUT",
          "--config.source=folder:EMPTY", "--config.pools=EMPTY"], "is what is read"),
        (["decompose", "PHOTO", "--out", "OUT", "--only", "palette", "--segmenter", "no.onnx"],
         "composer: segmenter no.onnx does not exist"),
        (["train", "--config", "scenes64:smoke", "--workdir", "OUT", "--config.task=x"],
         "task is 'x'; one of composer, codec, clip, depth, objects is wanted"),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_line_and_write_nothing(words, message, run, photo, tmp_path, capsys):
    (tmp_path / "text.png").write_text("text")
    (tmp_path / "cut.jpg").write_bytes(photo.read_bytes()[:900])
    (tmp_path / "empty").mkdir()
    (tmp_path / "huge.png").write_bytes(png_header(40_000, 40_000))
    names = {"OUT": tmp_path / "out", "RUN": run, "PHOTO": photo, "TEXT": tmp_path / "text.png",
             "CUT": tmp_path / "cut.jpg", "EMPTY": tmp_path / "empty",
             "HUGE": tmp_path / "huge.png"}  # fmt: skip
    for name, path in names.items():
        words = [word.replace(name, str(path)) for word in words]
    assert message in fails(capsys, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "own", "fused"),
    [
        ("train", "--xla_cpu_enable_fast_math=false", True),
        ("train", f"{XLA_OPTIONS.split('=')[0]}=a", False),
        ("sample", "--xla_cpu_enable_fast_math=false", False),
    ],
)
def test_training_fuses_outputs_unless_the_user_chose_options_of_the_kind(command, own, fused):
    code = (
        "import os, sys; from composer_jax.cli import main\n"
        f"sys.argv = ['composer', '{command}', '--nothing']; main()\n"
        "print(os.environ['XLA_FLAGS'])"
    )
    environment = {**os.environ, "GLIBC_TUNABLES": "", "XLA_FLAGS": own}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == [own, *([XLA_OPTIONS] if fused else [])]


NINTH = """
import numpy as np
from composer_jax.conditions import Condition, Feature, Part, register

class Brightness(Condition):
    name = "brightness"
    doc = "mean grey of the image, 0 to 1"
    parts = {"vector": Part("vector", (1,))}
    feature = Feature((1,), "float32", "raw")

    def extract(self, images, given=None, tool=None):
        return (images.mean((1, 2, 3)) / 255.0).astype(np.float32)[:, None]

    def value(self, stored):
        return {"vector": stored}

    def parse(self, text, tool=None):
        return np.array([float(text)], np.float32)

    def render(self, stored):
        return np.full((8, 8, 3), int(255 * stored[0]), np.uint8)

    def measure(self, wanted, image, tool=None):
        return 1.0 - abs(float(wanted[0]) - image.mean() / 255.0)

register(Brightness())
"""


def test_a_ninth_condition_is_one_file(tmp_path, photo, monkeypatch, capsys):
    from composer_jax.commands.train import train
    from composer_jax.evaluation.control import extract_all, measure_control, sample_each

    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "brightness.py").write_text(NINTH)
    monkeypatch.setattr(conditions, "__path__", [*conditions.__path__, str(tmp_path / "more")])
    out = tmp_path / "out"
    assert main(["decompose", str(photo), "--out", str(out)]) == 0
    assert (out / "photo" / "brightness.npy").is_file()
    workdir = tmp_path / "run"
    train(small_config(["conditions=brightness,sketch", "steps=1"]), workdir)
    words = ["sample", "--model", workdir, "--brightness", 0.8, "--steps", 1, "--out", out]
    assert main([str(word) for word in words]) == 0
    assert "given brightness" in capsys.readouterr().out
    pipe = cj.Pipeline.load(workdir)
    images = cj.open_source("scenes:4", size=64).batch(range(4))["image"]
    stored = extract_all(images, {}, pipe.names, {"clip": pipe.clip})
    samples = [sample_each(pipe, stored, {"brightness": cj.use(None)}, steps=1)]
    rows = {"sample": samples, "floor": samples, "oracle": [images]}
    found = measure_control("brightness", stored, rows, {})
    assert found.rows["oracle"].score > 0.999 and found.left_out == 0
