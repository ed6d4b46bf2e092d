#!/usr/bin/env bash
# How strong diffusers' Euler sampler wants its first noise depends on how its steps are spaced.
#
# Versions: diffusers 0.35.2, torch 2.13.0; CPU.
# First guess: the first noise depends on the betas alone. It has the deviation of their largest
# sigma, 14.61, as x = x0 + sigma noise; or, counting x0's, sqrt(14.61^2 + 1) = 14.65.
# Seen: "linspace" and "trailing" take 14.61. With "leading", Stable Diffusion's own spacing, it is
# sqrt(sigma^2 + 1) of the first step's sigma, which is lower: with 4 steps 4.236 for 4.117. The
# classes of Heun's and of the ancestral Euler's method do the same.
# The script fails where a spacing's first noise is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  diffusers==0.35.2 torch==2.13.0
cat > "$folder/euler.py" <<'PY'
import diffusers

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
for name in ("EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete"):
    for spacing in ("linspace", "trailing", "leading"):
        kind = getattr(diffusers, f"{name}Scheduler")
        scheduler = kind(**BETAS, timestep_spacing=spacing, steps_offset=1)
        scheduler.set_timesteps(4)
        largest, noise = float(scheduler.sigmas.max()), float(scheduler.init_noise_sigma)
        print(f"diffusers {diffusers.__version__}, {name}, {spacing}: {largest:.3f}, {noise:.3f}")
        wanted = (largest**2 + 1) ** 0.5 if spacing == "leading" else largest
        assert abs(noise - wanted) < 1e-3, "the first noise is another"
PY
"$folder/venv/bin/python" "$folder/euler.py"
