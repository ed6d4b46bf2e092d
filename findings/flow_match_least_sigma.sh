#!/usr/bin/env bash
# Diffusers' flow matching Euler scheduler shifts its least sigma twice.
#
# Versions: diffusers 0.35.2, torch 2.13.0; CPU.
# First guess: with shift 3, the sigmas run evenly from 1 to 1/1000 and are then shifted once, by
# s -> 3 s / (1 + 2 s): 1, 0.8573, 0.6007, 0.00299 for 4 steps, and 0 after them.
# Seen: the ends of the range are kept after the first shift, and set_timesteps spaces its sigmas
# between them and shifts again: 1, 0.8577, 0.6022, 0.00893. The constructor's own end in 0.00299.
# The script fails where the least sigma is shifted once, or any sigma is otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  diffusers==0.35.2 torch==2.13.0
cat > "$folder/sigmas.py" <<'PY'
import diffusers
import numpy as np


def shifted(sigma):
    return 3 * sigma / (1 + 2 * sigma)


scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
before = scheduler.sigmas[-1].item()
scheduler.set_timesteps(4)
seen = scheduler.sigmas.numpy()[:4]
once = shifted(np.linspace(1, 0.001, 4))
twice = shifted(np.linspace(1, shifted(0.001), 4))
print(f"diffusers {diffusers.__version__}: {seen.round(5)}; shifted once {once.round(5)}")
assert abs(before - shifted(0.001)) < 1e-6, "the constructor's least sigma is another"
assert np.allclose(seen, twice, rtol=1e-4), "the sigmas are not those of a second shift"
assert not np.allclose(seen, once, rtol=1e-4)
PY
"$folder/venv/bin/python" "$folder/sigmas.py"
