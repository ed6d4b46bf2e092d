#!/usr/bin/env bash
# XLA's CPU backend compiles an optimizer's step kernel by kernel, and makes many of them.
#
# Versions: jax 0.10.2, jaxlib 0.10.2, optax 0.2.8; CPU.
# First guess: AdamW's update of one array (two moments, the update, the new parameter) is one loop
# over that array, so XLA fuses it into one kernel, and many small arrays compile about as fast as
# one large array of the same size.
# Seen: there is no multi-output fusion on CPU, so each array gets a kernel for each result, which
# computes again what the others computed: 7 kernels an array where the gradient is clipped by its
# global norm. 100 arrays of 64 x 64 take 702 kernels, and more than 20 times as long to compile
# as one array of 640 x 640. An average of the parameters adds a kernel an array. Of a diffusion
# UNet's train step with 338 arrays, three fifths of 5,474 kernels are the optimizer's.
# The script fails if a step takes fewer than 5 kernels an array, or if compiling the arrays apart
# takes less than 10 times as long.
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
print(f"jax {jax.__version__}: 100 arrays {apart} kernels, {seconds:.2f} s; one {whole}, {once:.2f} s")
assert apart >= 500 and whole <= 20, "XLA now fuses an optimizer's step"
assert seconds > 10 * once, "many arrays now compile about as fast as one"
PY
"$folder/venv/bin/python" "$folder/step.py"
