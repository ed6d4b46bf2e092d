"""A model's directory: a local one, or a name on the hub whose needed files are fetched.

The hub's cache may hold any part of a repository: other libraries leave the JSON alone, or one
network of several, and a download may have been interrupted. What is whole for its purpose is taken
without asking; else the hub's client fetches what lacks, and goes on where it was interrupted.
"""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from composer_jax.models.files import PICKLES
from composer_jax.models.weight_files import is_cut
from composer_jax.utils.atomic import WriteError

Choose = Callable[[set[str]], Sequence[str]]
Lacking = Callable[[Path], str]
FULL = (errno.ENOSPC, errno.EDQUOT)  # errors of writing that name no file


def is_hub_name(source: str | Path) -> bool:
    """Whether `source` is no path that exists, but could be a name on the hub (owner/model)."""
    return not Path(source).exists() and bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)))


def find_folder(
    source, what: str, choose: Choose, missing: Lacking, incomplete: Lacking | None = None
) -> Path:
    """The directory `source`, or the hub's (or its cache's) copy of the model of that name.

    `what` names the kind of model in messages; `choose(files)` picks what to fetch of all the
    hub's files; `missing(folder)` says what a directory lacks, "" where it has all it must have.
    `incomplete`: a stricter one, by which a copy in the cache is taken without asking the hub.
    Raises ValueError, one line, where there is neither, or a file is missing; WriteError where
    the cache cannot be written.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = _from_hub(str(source), what, choose, incomplete or missing)
    if lacks := missing(folder):
        raise ValueError(f"{what} {source}: {folder} lacks {lacks}")
    return folder


def _from_hub(name: str, what: str, choose: Choose, incomplete: Lacking) -> Path:
    if not is_hub_name(name):
        raise ValueError(f"{what} {name}: no such directory, and no hub name (owner/model)")
    from huggingface_hub import snapshot_download

    cached = None
    with contextlib.suppress(Exception):  # there is none
        cached = Path(snapshot_download(name, local_files_only=True, allow_patterns=[]))
    there = f"{what} {name}: no such directory"
    if cached is not None:
        lacks = ", ".join(_cut(cached, choose)) or incomplete(cached)
        if not lacks:
            return cached
        there = f"{what} {name}: its copy in the hub's cache, {cached}, lacks {lacks}"
    return _fetch(name, what, choose, there)


def _fetch(name: str, what: str, choose: Choose, there: str) -> Path:
    """Asks the hub; `there` says in messages what is here."""
    from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        info = HfApi().model_info(name, timeout=10, files_metadata=True)
        sizes = {file.rfilename: file.size for file in info.siblings or ()}
        wanted = list(choose(set(sizes)))
        if wanted:
            folder = Path(snapshot_download(name, allow_patterns=wanted))
            for file in wanted:
                if is_cut(folder / file) or sizes[file] not in (None, _size(folder / file)):
                    hf_hub_download(name, file, revision=folder.name, force_download=True)
            return folder
    except GatedRepoError as error:
        raise ValueError(
            f"{what} {name}: the hub gives it only to those who agreed to its terms there and"
            " logged in here (hf auth login)"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"{there}, and no such model on the hub") from error
    except Exception as error:  # each release of the hub's client has errors of its own
        if isinstance(error, OSError) and (error.errno in FULL or error.filename):
            raise WriteError(Path(error.filename or constants.HF_HUB_CACHE), error) from error
        reason = type(error).__name__
        if constants.HF_HUB_OFFLINE:
            reason = "HF_HUB_OFFLINE is set"
        elif status := getattr(getattr(error, "response", None), "status_code", None):
            reason = f"it answers {status}"
        raise ValueError(
            f"{there}, and the hub cannot be reached ({reason}); try again, or give a directory"
            " with the model's files"
        ) from error
    raise ValueError(f"{what} {name}: the hub's model has no {what} in a known layout{_why(sizes)}")


def _cut(folder: Path, choose: Choose) -> list[str]:
    """Files of a snapshot that are there and not whole."""
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    return [f"all of {name}" for name in choose(files) if is_cut(folder / name)]


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _why(files) -> str:
    """What there is instead, for a message."""
    single = [f for f in sorted(files) if f.endswith(".safetensors") and "/" not in f]
    pickles = [f for f in sorted(files) if f.endswith(PICKLES)]
    if single:
        return f"; it has {', '.join(single[:3])}: download one and give the file itself"
    if pickles:
        return f"; it has pickles ({pickles[0]}), which can run code when they are read"
    return ""
