#!/usr/bin/env bash
# Diffusers' DDIM step with "linspace" spacing does not end at the scheduler's next timestep.
#
# Versions: diffusers 0.35.2, torch 2.13.0; CPU.
# First guess: timesteps 999, 666, 333, 0 mean that the step from 999 ends at 666, and so on.
# Seen: whatever the spacing, step() ends 1000 / 4 = 250 below its own timestep: 749, 416 and 83. It
# agrees there with DDIM's closed form to 1e-6. From x = 1 with a predicted noise of 0.5, the first
# step gives 5.055 where the update to 666 gives 8.746.
# The script fails where a step ends at the next timestep, or anywhere but 250 below its own.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  diffusers==0.35.2 torch==2.13.0
cat > "$folder/ddim.py" <<'PY'
import diffusers
import torch

scheduler = diffusers.DDIMScheduler(timestep_spacing="linspace", clip_sample=False)
scheduler.set_timesteps(4)
steps = scheduler.timesteps.tolist()
kept = scheduler.alphas_cumprod.double()
x, noise = torch.tensor(1.0).double(), torch.tensor(0.5).double()


def ddim(start, end):
    clean = (x - (1 - kept[start]).sqrt() * noise) / kept[start].sqrt()
    return (kept[end].sqrt() * clean + (1 - kept[end]).sqrt() * noise).item()


for here, following in zip(steps, steps[1:], strict=False):
    seen = scheduler.step(noise, here, x).prev_sample.item()
    listed, lower = ddim(here, following), ddim(here, here - 250)
    print(f"diffusers {diffusers.__version__}: from {here}: step {seen:.3f};", end=" ")
    print(f"DDIM to {following} {listed:.3f}, to {here - 250} {lower:.3f}")
    assert abs(seen - lower) < 1e-5 < abs(seen - listed), "a step ends elsewhere"
assert steps == [999, 666, 333, 0], "the timesteps are spaced otherwise"
PY
"$folder/venv/bin/python" "$folder/ddim.py"
