"""Stable Diffusion's schedules against diffusers' schedulers."""

import numpy as np
import pytest
from diffusers import DDPMScheduler, EulerDiscreteScheduler

from composer_jax.diffusion.process import Process

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
TIMES = (np.arange(1000) + 1) / 1000


@pytest.mark.parametrize("zero", [False, True])
def test_alphas_and_sigmas(zero):
    process = Process(prediction="v", schedule="sd", zero_terminal_snr=zero)
    cumprod = DDPMScheduler(rescale_betas_zero_snr=zero, **SD).alphas_cumprod.double().numpy()
    alpha, sigma = process.alpha_sigma(TIMES)
    np.testing.assert_allclose(alpha, np.sqrt(cumprod), atol=1e-6)
    np.testing.assert_allclose(sigma, np.sqrt(1.0 - cumprod), atol=1e-6)
    assert not zero or alpha[-1] == 0.0
    np.testing.assert_allclose(process.timestep(TIMES), np.arange(1000), rtol=1e-6)


def test_noise_over_signal_of_a_sampler():
    process = Process(prediction="eps", schedule="sd")
    scheduler = EulerDiscreteScheduler(timestep_spacing="trailing", **SD)
    scheduler.set_timesteps(20)
    alpha, sigma = process.alpha_sigma((scheduler.timesteps.numpy() + 1) / 1000)
    np.testing.assert_allclose(sigma / alpha, scheduler.sigmas.numpy()[:-1], rtol=1e-6, atol=1e-6)


def test_added_noise_and_velocity():
    import torch

    process = Process(prediction="v", schedule="sd")
    scheduler = DDPMScheduler(prediction_type="v_prediction", **SD)
    x0, eps = (np.random.default_rng(i).standard_normal((3, 4, 4, 4), np.float32) for i in (0, 1))
    steps = torch.tensor([0, 500, 999])
    t = (steps.numpy()[:, None, None, None] + 1) / 1000
    tensors = torch.from_numpy(x0), torch.from_numpy(eps), steps
    for found, wanted in (
        (process.diffuse(x0, eps, t), scheduler.add_noise(*tensors)),
        (process.target(x0, eps, t), scheduler.get_velocity(*tensors)),
    ):
        difference = np.linalg.norm(np.asarray(found) - wanted.numpy())
        assert difference < 1e-6 * np.linalg.norm(wanted)
