"""A model's directory: a local one, or a name on the hub whose needed files are fetched."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path


def find_folder(
    source, what: str, choose: Callable[[set[str]], Sequence[str]], missing: Callable[[Path], str]
) -> Path:
    """The directory `source`, or the hub's (or its cache's) copy of the model of that name.

    `what` names the kind of model in messages; `choose(files)` picks what to fetch of all the
    hub's files; `missing(folder)` says what a directory lacks, "" where it is whole. Raises
    ValueError, one line, where there is neither, or a file is missing.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = _from_hub(str(source), what, choose, missing)
    if lacks := missing(folder):
        raise ValueError(f"{what} {source}: {folder} lacks {lacks}")
    return folder


def _from_hub(name: str, what: str, choose, missing) -> Path:
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise ValueError(f"{what} {name}: no such directory, and no hub name (owner/model)")
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    with contextlib.suppress(Exception):  # what is whole in the cache asks nobody
        cached = Path(snapshot_download(name, local_files_only=True, allow_patterns=[]))
        if not missing(cached):
            return cached
    try:
        info = HfApi().model_info(name, timeout=10)
        wanted = choose({file.rfilename for file in info.siblings or ()})
        if wanted:
            return Path(snapshot_download(name, allow_patterns=list(wanted)))
    except GatedRepoError as error:
        raise ValueError(
            f"{what} {name}: the hub gives it only to those who agreed to its terms there and"
            " logged in here (hf auth login)"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{what} {name}: no such directory, and no such model on the hub"
        ) from error
    except Exception as error:  # each release of the hub's client has errors of its own
        raise ValueError(
            f"{what} {name}: no such directory, and the hub cannot be reached"
            f" ({type(error).__name__}); give a directory with the model's files"
        ) from error
    raise ValueError(f"{what} {name}: the hub's model has no {what} in a known layout")
