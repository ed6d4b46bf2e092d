"""A disk that is full, for tests: a limit on how large a file may grow."""

import resource
from contextlib import contextmanager


@contextmanager
def file_limit(size: int):
    """No file of this process grows beyond `size` bytes; the system refuses the rest."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
