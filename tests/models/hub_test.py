"""The hub: its cache asks nobody, and what the network does to us is one line."""

from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.numpy import save_file

from composer_jax.models.hub import find_folder


def choose(files):
    return sorted(files & {"config.json", "model.safetensors"})


def missing(folder):
    wanted = ("config.json", "model.safetensors")
    return ", ".join(name for name in wanted if not (folder / name).is_file())


def find(name):
    return find_folder(name, "CLIP", choose, missing)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty cache, and a network in which `hub.info` answers and `hub.fetched` remembers."""
    network = SimpleNamespace(info=None, fetched=None, cache=tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    real = huggingface_hub.snapshot_download

    def info(self, name, timeout, files_metadata):
        if isinstance(network.info, Exception):
            raise network.info
        return SimpleNamespace(
            siblings=[SimpleNamespace(rfilename=f, size=None) for f in network.info]
        )

    def fetch(name, local_files_only=False, allow_patterns=None):
        if local_files_only:
            return real(name, local_files_only=True, allow_patterns=allow_patterns)
        network.fetched = allow_patterns
        return cached(network.cache, name, allow_patterns)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    return network


def cached(cache, name, files):
    """What a download leaves: links to blobs, and what `main` means."""
    home = cache / f"models--{name.replace('/', '--')}"
    snapshot = home / "snapshots" / ("0" * 40)
    for folder in (snapshot, home / "blobs", home / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    (home / "refs" / "main").write_text("0" * 40)
    for file in files:
        save_file({"a": np.zeros(1)}, home / "blobs" / file)
        if file.endswith(".json"):
            (home / "blobs" / file).write_text("{}")
        (snapshot / file).symlink_to(home / "blobs" / file)
    return snapshot


def test_a_directory_is_itself_or_says_what_it_lacks(hub, tmp_path):
    with pytest.raises(ValueError, match=r"lacks config\.json, model\.safetensors"):
        find(tmp_path)
    (tmp_path / "config.json").touch()
    (tmp_path / "model.safetensors").touch()
    assert find(tmp_path) == tmp_path


def test_what_is_whole_in_the_cache_asks_nobody(hub):
    hub.info = OSError("no network")
    whole = cached(hub.cache, "owner/clip", ["config.json", "model.safetensors"])
    assert find("owner/clip").resolve() == whole.resolve()
    assert hub.fetched is None


def test_what_is_missing_is_fetched_and_no_more(hub):
    hub.info = ["config.json", "model.safetensors", "model.bin", "README.md"]
    assert missing(find("owner/clip")) == ""
    assert hub.fetched == ["config.json", "model.safetensors"]


class ConnectError(Exception):
    """The hub's client has errors that are no OSError."""


@pytest.mark.parametrize("failure", [OSError("no route"), ConnectError("a\nb"), RuntimeError("?")])
def test_without_a_network_there_is_one_line(hub, failure):
    hub.info = failure
    cached(hub.cache, "owner/half", ["config.json"])
    for name, there in (
        ("owner/clip", "no such directory"),
        ("owner/half", r"its copy in the hub's cache, .*, lacks model\.safetensors"),
    ):
        reason = type(failure).__name__
        message = rf"CLIP {name}: {there}, and the hub cannot be reached \({reason}\); try again"
        with pytest.raises(ValueError, match=message) as error:
            find(name)
        assert "\n" not in str(error.value)


def test_names_that_the_hub_does_not_have(hub):
    hub.info = ["README.md"]
    with pytest.raises(ValueError, match="the hub's model has no CLIP in a known layout"):
        find("owner/clip")
    hub.info = RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None))
    with pytest.raises(ValueError, match="no such directory, and no such model on the hub"):
        find("owner/clip")
    for name in ("nowhere", "a/b/c", "../up"):
        with pytest.raises(ValueError, match="no hub name"):
            find(name)
