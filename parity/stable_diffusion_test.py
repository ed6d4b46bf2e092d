"""VAE and UNet against diffusers on random weights that diffusers saved: outputs, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from flax import nnx
from safetensors.numpy import load_file

from composer_jax.cli import main
from composer_jax.models.files import module_tensors, write_tensors
from composer_jax.models.layouts import compvis_unet_rules, compvis_vae_rules
from composer_jax.models.peers import to_peer
from composer_jax.models.pretrained import open_unet, open_vae

SD1 = {"attention_head_dim": 8, "cross_attention_dim": 24}
SD2 = {"attention_head_dim": [1, 2, 4, 4], "use_linear_projection": True, "cross_attention_dim": 32}
SMALL = {"block_out_channels": (64, 128, 256, 256), "sample_size": 16}


def randomised(model, seed=0):
    """Every parameter drawn anew: no zero or one of an initialisation hides anything."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            fan = max(1, p[0].numel()) if p.ndim > 1 else 100
            p.copy_((1.0 if name.endswith("weight") and p.ndim == 1 else 0.0) + noise / fan**0.5)
    return model.eval()


def distance(found, wanted) -> float:
    """Relative L2."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def nhwc(tensor) -> np.ndarray:
    return tensor.detach().numpy().transpose(0, 2, 3, 1)


def nchw(array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.asarray(array).transpose(0, 3, 1, 2)))


@pytest.fixture(scope="module", params=[SD1, SD2], ids=["sd1", "sd2"])
def unet(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unet")
    peer = randomised(UNet2DConditionModel(**SMALL, **request.param))
    peer.save_pretrained(folder)
    return peer, folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    widths = (32, 64, 128, 128)
    peer = randomised(
        AutoencoderKL(
            block_out_channels=widths,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
    )
    peer.save_pretrained(folder)
    return peer, folder


def inputs(config, size=16, batch=2):
    keys = jax.random.split(jax.random.key(1), 2)
    x = jax.random.normal(keys[0], (batch, size, size, config.in_channels))
    context = jax.random.normal(keys[1], (batch, 77, config.cross_attention_dim))
    return x, jnp.asarray([3.0, 811.0])[:batch], context


def test_unet_and_its_gradients(unet):
    peer, folder = unet
    ours = open_unet(folder).load()
    x, t, context = inputs(ours.config)
    args = nchw(x), torch.from_numpy(np.array(t)), torch.from_numpy(np.array(context))
    graph, params = nnx.split(ours)

    def loss(params, x):
        out = nnx.merge(graph, params)(x, t, context)
        return jnp.sum(out**2), out

    (_, out), (found, found_x) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(
        params, x
    )
    args[0].requires_grad_()
    wanted = peer(*args).sample
    (wanted**2).sum().backward()
    assert distance(out, nhwc(wanted)) < 1e-5
    assert distance(found_x, nhwc(args[0].grad)) < 1e-4
    gradients = to_peer({name: t for name, t in module_tensors(nnx.merge(graph, found)).items()})
    wanted = {name: p.grad.numpy() for name, p in peer.named_parameters()}
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        assert distance(gradient.read(), wanted[name]) < 1e-3, name
    every = [np.concatenate([g[name].ravel() for name in wanted]) for g in
             ({name: g.read() for name, g in gradients.items()}, wanted)]  # fmt: skip
    assert distance(*every) < 1e-4


def test_vae_moments_and_images(vae):
    peer, folder = vae
    ours = open_vae(folder).load()
    images = jax.random.uniform(jax.random.key(2), (2, 64, 64, 3), minval=-1.0, maxval=1.0)
    with torch.no_grad():
        wanted = peer.encode(nchw(images)).latent_dist
        moments = ours.encode(images)
        mean = nhwc(wanted.mean)
        assert distance(moments, np.concatenate([mean, nhwc(wanted.logvar)], axis=-1)) < 1e-5
        latents = ours.latents(moments)
        assert distance(latents, 0.18215 * mean) < 1e-5
        assert distance(ours.decode(latents), nhwc(peer.decode(wanted.mean).sample)) < 1e-5


def test_what_we_convert_diffusers_loads(unet, vae, tmp_path):
    for (peer, folder), name in ((unet, "unet"), (vae, "vae")):
        ours, back = tmp_path / f"ours_{name}", tmp_path / f"back_{name}"
        words = ["--prediction", "v"] if name == "unet" else []
        assert main(["convert", str(folder), "--out", str(ours), *words]) == 0
        assert main(["convert", str(ours), "--to", "diffusers", "--out", str(back)]) == 0
        again = type(peer).from_pretrained(back / name)
        for key, tensor in peer.state_dict().items():
            assert torch.equal(again.state_dict()[key], tensor)
        x = torch.ones(1, 4, 16, 16)
        with torch.no_grad():
            if name == "vae":
                outputs = again.decode(x).sample, peer.decode(x).sample
            else:
                args = x, torch.tensor([9.0]), torch.ones(1, 7, peer.config.cross_attention_dim)
                outputs = again(*args).sample, peer(*args).sample
                scheduler = DDIMScheduler.from_pretrained(back / "scheduler")
                assert scheduler.config.prediction_type == "v_prediction"
        assert distance(*outputs) < 1e-5  # PyTorch's own rounding, from where the tensors lie


def test_compvis_names_are_those_that_diffusers_reads(unet, vae, tmp_path):
    networks = [(unet, open_unet, compvis_unet_rules), (vae, open_vae, compvis_vae_rules)]
    for (_, folder), open_it, rules in networks:
        ours = open_it(folder)
        write_tensors(tmp_path / "one.safetensors", to_peer(ours.tensors, rules(ours.config)))
        again = open_it(tmp_path / "one.safetensors")
        assert again.config.block_out_channels == ours.config.block_out_channels
        for name, tensor in ours.tensors.items():
            np.testing.assert_array_equal(again.tensors[name].read(), tensor.read())
        file = {name: torch.from_numpy(a) for name, a in
                load_file(tmp_path / "one.safetensors").items()}  # fmt: skip
        config = {"layers_per_block": 2, "block_out_channels": ours.config.block_out_channels,
                  "class_embed_type": None, "addition_embed_type": None,
                  "down_block_types": ("",) * 4, "up_block_types": ("",) * 4}  # fmt: skip
        convert = (
            convert_ldm_unet_checkpoint if open_it is open_unet else convert_ldm_vae_checkpoint
        )
        theirs = convert(dict(file), config)
        wanted = load_file(folder / "diffusion_pytorch_model.safetensors")
        assert theirs.keys() == wanted.keys()
        for name, array in wanted.items():
            np.testing.assert_array_equal(theirs[name].numpy().reshape(array.shape), array)
