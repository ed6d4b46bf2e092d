#!/usr/bin/env bash
# The described topology v4:2x2x1 has eight devices, twice what jax shows on four such chips.
#
# Versions: jax 0.10.2, jaxlib 0.10.2, libtpu 0.0.52; CPU, nothing of a TPU.
# First guess: a shape counts chips, and both cores of a v4 chip are one device of jax (megacore),
# as on v5p, so v4:2x2x1 and v5p:2x2x1 have four devices each.
# Seen: v4 has 8 devices, v5p 4. With chip_config_name="megacore" v4 has 4, too. On tpu7x, whose
# chips do have two devices, there are 8. Programs planned for v4 without that name are sharded over
# twice the devices, with half of a chip's memory each.
# The script fails where a count changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 libtpu==0.0.52
cat > "$folder/devices.py" <<'PY'
import jax
from jax.experimental import topologies


def count(name, **options):
    return len(topologies.get_topology_desc(name, platform="tpu", **options).devices)


seen = {name: count(name) for name in ("v4:2x2x1", "v5p:2x2x1", "tpu7x:2x2x1")}
seen["v4:2x2x1, megacore"] = count("v4:2x2x1", chip_config_name="megacore")
print(f"jax {jax.__version__}: {seen}")
assert list(seen.values()) == [8, 4, 8, 4], "a topology has other devices"
PY
JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 TPU_ACCELERATOR_TYPE=v4-8 TPU_WORKER_HOSTNAMES=localhost \
  "$folder/venv/bin/python" "$folder/devices.py"
