"""Settings every test runs under (no silent broadcasting, no key used twice), and tiny models.

Most of what a test costs is compilation (docs/testing.md). So programs are not optimised, but in
files and tests marked `optimised`, which compare bits or compute much; and there is one device,
but for tests marked `mesh`, which are run apart (`COMPOSER_TEST_DEVICES=8 pytest`).
"""

import atexit
import ctypes
import gc
import os
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

os.environ.setdefault(
    "XLA_FLAGS",
    f"--xla_force_host_platform_device_count={os.environ.get('COMPOSER_TEST_DEVICES', '1')}",
)
if "COMPOSER_TEST_DEVICES" not in os.environ:  # processes that tests start inherit it
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # what one test compiled, the next one takes
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="composer-jax-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
if "COMPOSER_TEST_POOLS" not in os.environ:  # and what one prepared
    os.environ["COMPOSER_TEST_POOLS"] = tempfile.mkdtemp(prefix="composer-pools-")
    atexit.register(shutil.rmtree, os.environ["COMPOSER_TEST_POOLS"], ignore_errors=True)

import jax
import numpy as np
import pytest
from flax import nnx
from jax._src.interpreters import pxla  # no public way to the options of every program

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

NO_EMITTERS = "xla_cpu_use_fusion_emitters"  # through MLIR: half of the time of a program that is
compile_options = pxla.compiler.get_compile_options  # not optimised


def quick_options(*args, **options):
    made = compile_options(*args, **options)
    if jax.config.read("jax_disable_most_optimizations"):
        made.env_option_overrides = [*made.env_option_overrides, (NO_EMITTERS, False)]
    return made


pxla.compiler.get_compile_options = quick_options
ALONE = jax.device_count() == 1  # which has read XLA's flags; what follows is for processes that
if ALONE:  # tests start
    os.environ["XLA_FLAGS"] += f" --{NO_EMITTERS}=false"


# files that take half a minute and more: they come before the others, so that both workers end
# together
LONG = ("training/composer_test", "training/kill_test", "evaluation/bundled_test")
LONG += ("sampling/pipeline_test", "commands/sweep_test", "commands/cli_test")
LONG += ("evaluation/control_test", "commands/prepare_test", "commands/evaluate_test")
LONG += ("models/clip_test", "training/warm_start_test", "training/ema_test")


def pytest_ignore_collect(collection_path):
    """Files without a test of meshes are not imported for the run that is of these alone."""
    if not ALONE and collection_path.name.endswith("_test.py"):
        return "pytest.mark.mesh" not in collection_path.read_text() or None


def pytest_collection_modifyitems(config, items):
    """Leaves out what is for the other run; the rest begins with what is quickest."""
    wanted = {item: (item.get_closest_marker("mesh") is None) == ALONE for item in items}
    config.hook.pytest_deselected(items=[item for item in items if not wanted[item]])
    items[:] = [item for item in items if wanted[item]]

    def turn(item):
        if item.get_closest_marker("fast"):
            return -1
        file = item.path.relative_to(Path(__file__).parent).with_suffix("").as_posix()
        return LONG.index(file) if file in LONG else len(LONG)

    items.sort(key=turn)


def pytest_collection_finish():
    """Tracing makes many objects and little garbage: what was imported is not looked through."""
    gc.set_threshold(100_000)
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Programs are shared within a file; all of them would fill the memory of a laptop."""
    yield
    jax.clear_caches()
    gc.collect()
    if sys.platform == "linux":  # glibc keeps what is freed
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@pytest.hookimpl(tryfirst=True)  # before the fixtures of a file compile anything
def pytest_runtest_setup(item):
    """Programs are optimised where that is asked for."""
    marked = {mark.name for mark in item.iter_markers()}
    jax.config.update("jax_disable_most_optimizations", "optimised" not in marked)


@pytest.fixture(scope="session")
def perturbed():
    """Moves all parameters of a module at random: no zero of the initialisation hides anything."""

    def move(module, seed):
        rng = np.random.default_rng(seed)

        def moved(array):
            return jax.device_put(array + 0.05 * rng.standard_normal(array.shape, np.float32))

        nnx.update(module, jax.tree.map(moved, jax.device_get(nnx.state(module, nnx.Param))))
        return module

    return move


@pytest.fixture(scope="session")
def drawn():
    """A network of random numbers, none of them 0."""

    def draw(network, *args, seed, **options):
        from composer_jax.models.files import fill_module, in_memory, module_tensors
        from composer_jax.models.initializers import abstract

        module, rng = abstract(network, *args, **options), np.random.default_rng(seed)
        random = {
            name: in_memory(0.3 * rng.standard_normal(tensor.shape, np.float32))
            for name, tensor in module_tensors(module).items()
        }
        fill_module(module, random, "")
        return module

    return draw


@pytest.fixture(scope="session")
def save_sd():
    """Writes a UNet (that predicts eps), and a codec if given, as diffusers lays them out."""

    def save(folder, unet, vae=None):
        from composer_jax.models import layouts
        from composer_jax.models.files import module_tensors, write_tensors
        from composer_jax.models.peers import to_peer
        from composer_jax.models.schedulers import scheduler_to_diffusers
        from composer_jax.utils.atomic import write_json

        eps = {"prediction": "eps", "schedule": "sd", "zero_terminal_snr": False}
        configs = {"unet": layouts.unet_to_diffusers(unet.config)}
        configs |= {"vae": layouts.vae_to_diffusers(vae.config)} if vae else {}
        for name, config in configs.items():
            (folder / name).mkdir()
            write_json(folder / name / "config.json", config)
            tensors = to_peer(module_tensors(unet if name == "unet" else vae))
            write_tensors(folder / name / "diffusion_pytorch_model.safetensors", tensors)
        (folder / "scheduler").mkdir()
        scheduler = folder / "scheduler" / "scheduler_config.json"
        write_json(scheduler, scheduler_to_diffusers(eps))
        return folder

    return save


@pytest.fixture(scope="session")
def run(tmp_path_factory, perturbed):
    """A workdir as training leaves one, of a composer of all eight conditions, random weights, and
    a codec that is little more than the best linear one."""
    import skimage.data

    from composer_jax.data.extractors import absent_values
    from composer_jax.models.clip import Clip
    from composer_jax.models.composer import Composer
    from composer_jax.models.initializers import described, initialised
    from composer_jax.models.vae import PRESETS, VAE, pca_skip
    from composer_jax.storage.models import BUNDLED, save_model, save_part
    from composer_jax.training.plan import composer_config
    from tests.small import small_config

    config = small_config()
    shape, _ = composer_config(config)
    clip = Clip.load(BUNDLED / "clip", skip=config.clip_text.skip)
    absent = absent_values(shape.conditions, {"clip": clip})
    workdir, parts = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("parts")
    vae = described(VAE, replace(PRESETS["scenes64"], block_out_channels=(16,)))
    photo = skimage.data.astronaut().reshape(8, 64, 8, 64, 3).swapaxes(1, 2)
    pca_skip(vae, photo.reshape(-1, 64, 64, 3).astype(np.float32) / 127.5 - 1.0)
    save_part(parts / "vae", initialised(vae, 0))
    shutil.copytree(BUNDLED / "clip", parts / "clip")
    info = {
        "process": config.process.to_dict(),
        "image_size": config.image_size,
        "sampler": config.sampler.to_dict(),
        "source": config.source,
        "clip_text": {"skip": config.clip_text.skip, "pad": None},
        "step": 0,
    }
    composer = initialised(described(Composer, shape, absent), 0)
    save_model(workdir / "model", perturbed(composer, 1), parts, info)
    return workdir


@pytest.fixture(scope="module")
def pipe(run):
    """The sampler of that composer; the tests of a file share its compiled programs."""
    from composer_jax.sampling.pipeline import Pipeline

    return Pipeline.load(run)
