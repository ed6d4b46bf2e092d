"""Settings every test runs under (no silent broadcasting, no key used twice) and one tiny run."""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # what one test compiled, the next one takes
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="composer-jax-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import numpy as np
import pytest
from flax import nnx

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)


@pytest.fixture(scope="session")
def perturbed():
    """Moves all parameters of a module at random: no zero of the initialisation hides anything."""

    def move(module, seed):
        leaves, tree = jax.tree.flatten(nnx.state(module, nnx.Param))
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        pairs = zip(leaves, keys, strict=True)
        moved = [a + 0.05 * jax.random.normal(k, a.shape) for a, k in pairs]
        nnx.update(module, jax.tree.unflatten(tree, moved))
        return module

    return move


@pytest.fixture(scope="session")
def drawn():
    """A module, built by a function, of random numbers; nothing is initialised or compiled."""

    def draw(build, seed):
        from composer_jax.models.files import fill_module, in_memory, module_tensors

        module, rng = nnx.eval_shape(build), np.random.default_rng(seed)
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
        from composer_jax.models.files import module_tensors, write_json, write_tensors
        from composer_jax.models.peers import to_peer

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
        write_json(scheduler, layouts.process_to_diffusers(eps))
        return folder

    return save


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A composer of all eight conditions, trained for four steps: its workdir."""
    from composer_jax.commands.train import train
    from composer_jax.training.config import load_config

    workdir = tmp_path_factory.mktemp("run")
    train(load_config("scenes64:smoke", ["ema_lengths=0.05,0.1"]), workdir)
    return workdir


@pytest.fixture(scope="session")
def pipe(run):
    """The sampler of that run; tests share its compiled programs."""
    from composer_jax.sampling.pipeline import Pipeline

    return Pipeline.load(run)
