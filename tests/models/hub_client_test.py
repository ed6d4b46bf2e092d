"""The hub's own client against a local server that speaks its API: what lacks is fetched."""

import hashlib
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants, file_download

from composer_jax.cli import main
from composer_jax.models.files import open_tensors, write_tensors
from composer_jax.models.hub import find_folder
from composer_jax.models.pretrained import open_unet, open_vae
from composer_jax.models.unet import UNet, UNetConfig
from composer_jax.models.vae import VAE, VAEConfig

NAME, COMMIT = "owner/sd", "a" * 40
WEIGHTS = "diffusion_pytorch_model"
INDEX = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"],
         "vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", "DDIMScheduler"],
         "safety_checker": [None], "text_encoder": ["transformers", "CLIPTextModel"]}  # fmt: skip


class Hub(ThreadingHTTPServer):
    """A server of one folder for a repository. `asked`: (method, path, range) of each request;
    `breaks`: files whose first download ends early; `status`: of every answer, if it is set."""

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.asked, self.breaks, self.status, self.code = root, [], set(), None, ""
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def fetched(self) -> set[str]:
        return {path.split(COMMIT + "/")[1] for method, path, _ in self.asked if method == "GET"
                and f"{COMMIT}/" in path}  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    """The paths of the hub's API that its client asks for."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, content: bytes, status: int = 200, cut: bool = False, **headers) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.close_connection = True

    def do_GET(self):
        hub = self.server
        hub.asked.append((self.command, self.path, self.headers.get("Range")))
        if hub.status:
            return self.answer(b"{}", hub.status, X_Error_Code=hub.code)
        if found := re.match(r"/api/models/([^/]+/[^/?]+)", self.path):
            folder = hub.root / found[1]
            if not folder.is_dir():
                return self.answer(b"{}", 404, X_Error_Code="RepoNotFound")
            files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
            siblings = [{"rfilename": p.relative_to(folder).as_posix(), "size": p.stat().st_size}
                        for p in files]  # fmt: skip
            if "/tree/" in self.path:  # newer clients list a repository by it
                tree = [{"type": "file", "path": one["rfilename"], "size": one["size"],
                         "oid": "0" * 40} for one in siblings]  # fmt: skip
                return self.answer(json.dumps(tree).encode(), Content_Type="application/json")
            about = {"id": found[1], "modelId": found[1], "sha": COMMIT, "siblings": siblings}
            return self.answer(json.dumps(about).encode(), Content_Type="application/json")
        name, _, file = self.path.lstrip("/").split("?")[0].partition("/resolve/")
        file = file.partition("/")[2]
        content = (hub.root / name / file).read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X_Repo_Commit": COMMIT,
                   "X_Linked_Size": len(content)}  # fmt: skip
        status, begin = 200, re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if begin and self.command == "GET":
            start = int(begin[1])
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            status, content = 206, content[start:]
        cut = self.command == "GET" and file in hub.breaks
        hub.breaks -= {file} if cut else set()
        self.answer(content, status, cut, **headers)

    do_HEAD = do_GET


@pytest.fixture(scope="module")
def published(drawn, save_sd, tmp_path_factory):
    """A small Stable Diffusion as diffusers publishes one."""
    folder = tmp_path_factory.mktemp("published")
    config = UNetConfig(block_out_channels=(32, 64), attention=(True, False), heads=(8, 8),
                        layers_per_block=1, cross_attention_dim=12)  # fmt: skip
    codec = VAEConfig(block_out_channels=(32, 64), layers_per_block=1)
    save_sd(folder, drawn(UNet, config, seed=1), drawn(VAE, codec, seed=2))
    (folder / "model_index.json").write_text(json.dumps(INDEX))
    (folder / "v1-5-pruned.safetensors").write_bytes(b"gigabytes that nobody asked for")
    (folder / "unet" / f"{WEIGHTS}.bin").write_bytes(b"a pickle")
    return folder


@pytest.fixture
def hub(tmp_path, published, monkeypatch):
    server = Hub(tmp_path / "served")
    shutil.copytree(published, server.root / NAME)
    url = f"http://127.0.0.1:{server.server_port}"
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (constants, file_download):
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    server.cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(server.cache))
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # of the client, before it tries again
    yield server
    server.shutdown()
    server.server_close()


def leave(hub, *files):
    """What another library leaves in the cache, fetched by the client itself."""
    huggingface_hub.snapshot_download(NAME, allow_patterns=list(files))
    hub.asked.clear()


def snapshot(hub) -> Path:
    return hub.cache / f"models--{NAME.replace('/', '--')}" / "snapshots" / COMMIT


def same(found, folder) -> None:
    wanted = {n: t.read() for n, t in open_tensors(folder / f"{WEIGHTS}.safetensors").items()}
    assert len(found.tensors) == len(wanted)
    for name, tensor in found.tensors.items():
        other = wanted[name.replace("kernel", "weight").replace("scale", "weight")]
        assert np.sort(tensor.read().ravel())[0] == np.sort(other.ravel())[0]


@pytest.mark.parametrize(
    "left",
    [["*.json"], ["model_index.json"], ["unet/*.json", "scheduler/*"], ["vae/*"],
     ["unet/*.safetensors"], ["unet/config.json", "unet/*.safetensors"]],
    ids=str,
)  # fmt: skip
def test_what_another_library_left_is_completed(hub, published, left):
    leave(hub, *left)
    found = open_unet(NAME)
    same(found, published / "unet")
    assert found.process["prediction"] == "eps"
    assert not any(file.endswith((".bin", "pruned.safetensors")) for file in hub.fetched)
    hub.asked.clear()
    same(open_unet(NAME), published / "unet")
    assert not hub.asked  # whole now: nobody is asked


def test_a_codec_alone_is_not_taken_for_the_model(hub, tmp_path, capfd):
    leave(hub, "vae/*")
    assert main(["convert", NAME, "--out", str(tmp_path / "out"), "--only", "vae"]) == 0
    assert not hub.asked
    assert main(["convert", NAME, "--out", str(tmp_path / "all")]) == 0
    out = capfd.readouterr().out
    assert "wrote unet, vae in" in out and "left out: the text encoder" in out
    assert (tmp_path / "all" / "unet" / "model.safetensors").is_file()
    hub.asked.clear()
    assert main(["convert", NAME, "--out", str(tmp_path / "again")]) == 0
    assert not hub.asked


def test_an_interrupted_download_goes_on(hub, published):
    file = f"unet/{WEIGHTS}.safetensors"
    hub.breaks.add(file)
    part = None
    try:
        found = open_unet(NAME)  # newer clients go on at once
    except ValueError as error:
        assert "no such directory, and the hub cannot be reached" in str(error)
        assert not (snapshot(hub) / file).exists()
        content = (published / file).read_bytes()
        part = next((hub.cache).rglob("*.incomplete"))  # which keeps whole chunks of 10 MB alone
        part.write_bytes(content[:999])
        found = open_unet(NAME)
    same(found, published / "unet")
    assert not part or ("GET", "bytes=999-") in {(method, begun) for method, _, begun in hub.asked}


@pytest.mark.parametrize("file", [f"unet/{WEIGHTS}.safetensors", "unet/config.json"])
def test_a_file_of_the_cache_that_is_not_whole_is_fetched_anew(hub, published, file):
    leave(hub, "*.json", "unet/*")
    blob = (snapshot(hub) / file).resolve()
    blob.write_bytes(blob.read_bytes()[:-9])
    same(open_unet(NAME), published / "unet")
    assert hub.fetched >= {file}


def test_without_the_hub_one_line_says_what_lacks(hub, published, monkeypatch):
    leave(hub, "*.json", "vae/*")
    hub.status = 503
    same(open_vae(NAME), published / "vae")  # which is whole
    message = rf"owner/sd: its copy in the hub's cache, .* lacks unet/{WEIGHTS}\.safetensors"
    with pytest.raises(ValueError, match=message + ", and the hub cannot be reached .it answers"):
        open_unet(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=message + r".*\(HF_HUB_OFFLINE is set\); try again, or"):
        open_unet(NAME)


def test_a_cache_that_cannot_be_written_is_named(hub):
    hub.cache.write_text("a file")
    with pytest.raises(OSError, match=r"cache.* cannot be written"):
        open_unet(NAME)


def rename(folder: Path, old: str, new: str) -> None:
    for path in folder.rglob(f"{old}*"):
        path.rename(path.with_name(path.name.replace(old, new)))


def shards(path: Path, pattern: str, index: str) -> None:
    """Splits a file in two."""
    tensors, places = open_tensors(path), {}
    for i, names in enumerate((list(tensors)[::2], list(tensors)[1::2]), 1):
        name = pattern.format(f"{i:05d}-of-00002")
        write_tensors(path.with_name(name), {key: tensors[key] for key in names})
        places |= dict.fromkeys(names, name)
    path.with_name(index).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    path.unlink()


@pytest.mark.parametrize(
    ("pattern", "index"),
    [
        (None, f"{WEIGHTS}.fp16.safetensors"),
        (None, f"{WEIGHTS}.bf16.safetensors"),
        (None, f"{WEIGHTS}.non_ema.safetensors"),
        (WEIGHTS + "-{}.safetensors", f"{WEIGHTS}.safetensors.index.json"),
        (WEIGHTS + ".fp16-{}.safetensors", f"{WEIGHTS}.safetensors.index.fp16.json"),
        (WEIGHTS + "-{}.fp16.safetensors", f"{WEIGHTS}.safetensors.fp16.index.json"),
    ],
)
def test_repositories_of_variants_and_shards_load(hub, published, pattern, index):
    path = hub.root / NAME / "unet" / f"{WEIGHTS}.safetensors"
    shards(path, pattern, index) if pattern else path.rename(path.with_name(index))
    same(open_unet(NAME), published / "unet")
    hub.asked.clear()
    if pattern:  # a shard that did not come is asked for
        next(snapshot(hub).glob("unet/*00002-of-00002*")).unlink()
        same(open_unet(NAME), published / "unet")
        assert len({f for f in hub.fetched if f.endswith(".safetensors")}) == 0  # its blob is there
    same(open_unet(NAME), published / "unet")
    same(open_unet(hub.root / NAME), published / "unet")  # and as a folder


def test_one_variant_is_fetched_of_several(hub):
    folder = hub.root / NAME / "unet"
    shutil.copy(folder / f"{WEIGHTS}.safetensors", folder / f"{WEIGHTS}.fp16.safetensors")
    open_unet(NAME)
    assert {f for f in hub.fetched if f.endswith(".safetensors")} == {f"unet/{WEIGHTS}.safetensors"}


def test_repositories_without_what_is_read_are_named(hub, tmp_path):
    for name, files, message in [
        ("owner/pickles", ["unet/diffusion_pytorch_model.bin"], "it has pickles .unet/diffusion"),
        ("owner/single", ["v2.safetensors"], r"it has v2\.safetensors: download one and give the"),
        ("owner/empty", ["README.md"], "no model in a known layout$"),
    ]:
        for file in files:
            (hub.root / name / file).parent.mkdir(parents=True, exist_ok=True)
            (hub.root / name / file).write_bytes(b"?")
        with pytest.raises(ValueError, match=message):
            find_folder(name, "model", lambda files: [], lambda folder: "")
    with pytest.raises(ValueError, match="no such directory, and no such model on the hub"):
        open_unet("owner/nothing")
    hub.status, hub.code = 403, "GatedRepo"
    with pytest.raises(ValueError, match="only to those who agreed to its terms"):
        open_unet("owner/gated")
