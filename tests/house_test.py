"""The structure: who may import whom, and what stays unimported until it is needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import composer_jax

pytestmark = pytest.mark.fast

HOUSE = Path(composer_jax.__file__).parent
ROOMS = {
    "diffusion": set(),
    "conditions": set(),
    "models": {"conditions", "diffusion"},
    "storage": {"models"},
    "data": {"conditions", "models", "storage"},
    "training": {"conditions", "models", "storage", "data", "diffusion", "configs"},
    "sampling": {"conditions", "models", "storage", "data", "diffusion"},
}
ROOMS["evaluation"] = ROOMS["sampling"] | {"sampling"}
ROOMS = {room: others | {"utils"} for room, others in ROOMS.items()} | {"utils": set()}
LAZY = {
    "transformers": {"models/clip.py"},
    "cv2": {"conditions", "data"},
    "tensorflow": {"data"},
    "tensorflow_datasets": {"data"},
    "array_record": {"data"},
    "pyarrow": {"data"},
    "h5py": {"models/hed.py"},
    "huggingface_hub": {"models/hub.py"},
    "safetensors": {"models/files.py"},
    "torch": {"evaluation/quality.py"},
    "diffusers": set(),
}


def imports(path: Path):
    """(module, at the top of the file) for every import of a file."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, id(node) in top
            yield from ((f"{node.module}.{a.name}", id(node) in top) for a in node.names)


def test_rooms_import_only_what_they_may():
    for room, allowed in ROOMS.items():
        for path in (HOUSE / room).glob("*.py"):
            for module, _ in imports(path):
                if module.startswith("composer_jax."):
                    other = module.split(".")[1]
                    assert other in allowed | {room}, f"{path} imports {module}"


def test_heavy_libraries_are_imported_lazily_and_in_their_rooms_alone():
    for path in HOUSE.rglob("*.py"):
        where = path.relative_to(HOUSE).as_posix()
        for module, top in imports(path):
            name = module.split(".")[0]
            if name in LAZY:
                assert not top, f"{path} imports {name} at its top"
                assert any(where.startswith(room) for room in LAZY[name]), f"{path}: {name}"


def test_package_import_is_light():
    code = (
        "import sys, composer_jax; "
        "heavy = {'jax', 'flax', 'tensorflow', 'transformers', 'cv2'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_resolve():
    for name in composer_jax.__all__:
        assert getattr(composer_jax, name) is not None
