#!/usr/bin/env bash
# XLA's CPU backend makes several kernels of an optimizer's step for each array, not one.
#
# Versions: jax 0.10.2, jaxlib 0.10.2, optax 0.2.8; CPU.
# First guess: AdamW's update of one array (two moments and the new parameter) is one loop over that
# array, so XLA fuses it into one kernel, with one more for the norm that clips the gradient.
# Seen: each result gets a kernel of its own, as nothing fuses kernels with several results on CPU.
# With a gradient clipped by its global norm, 100 arrays of 64 x 64 take 504 kernels, 5 for each,
# and one array of 640 x 640 takes 9. Compiling took 1.36 and 0.34 CPU seconds here, so a network of
# many small arrays waits longer for its optimizer's program than its size says.
# The script fails where the 100 arrays take other than 5 kernels each, give or take a few in all.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 optax==0.2.8
cat > "$folder/step.py" <<'PY'
import time

import jax
import jax.numpy as jnp
import optax

jax.config.update("jax_platforms", "cpu")
optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def step(params, state, gradient):
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state


def compiled(params):
    state = optimizer.init(params)
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params)
    start = time.process_time()
    text = lowered.compile().as_text()
    return text[text.index("ENTRY") :].count(" fusion("), time.process_time() - start


compiled({"warm": jnp.ones(8)})
apart, seconds = compiled({str(i): jnp.ones((64, 64)) for i in range(100)})
whole, once = compiled({"all": jnp.ones((640, 640))})
print(f"jax {jax.__version__}: 100 arrays {apart} kernels, {seconds:.2f} s;", end=" ")
print(f"one {whole}, {once:.2f} s")
assert 495 <= apart <= 520 and whole <= 20, "XLA now fuses an optimizer's step otherwise"
PY
"$folder/venv/bin/python" "$folder/step.py"
