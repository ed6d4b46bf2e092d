"""`composer <command>`: finds the command, turns a user's mistake into one line and exit code 2."""

from __future__ import annotations

import argparse
import difflib
import errno
import gc
import importlib
import logging
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from composer_jax.commands import arguments
from composer_jax.utils.atomic import WriteError
from composer_jax.utils.precision import matmul_precision
from composer_jax.utils.values import expand_user

COMMANDS = {
    "quickstart": "the whole way in minutes, on CPU, ending in a report",
    "decompose": "take images apart into their conditions",
    "prepare": "take a whole source apart once, into a cache that train reads",
    "train": "train a composer, or its codec, CLIP or depth regressor",
    "ema": "average a run's parameters over any length, afterwards",
    "plan": "compile a train step for hardware you do not have, and say what it costs",
    "convert": "bring Stable Diffusion, CLIP and depth weights in, take networks to diffusers",
    "sample": "make images from any subset of conditions",
    "edit": "vary, blend, recolour, restyle, translate and repaint images",
    "evaluate": "measure how far each condition controls samples",
    "sweep": "train and measure many runs of one config, into one table",
    "compile": "trace the sampler once, for starts without tracing",
}

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
FOLDERS = ("--out", "--workdir")  # options of commands that write
HUGE_PAGES = "glibc.malloc.hugetlb=1"
XLA_OPTIONS = "--xla_backend_extra_options=xla_cpu_use_multi_output_fusion"


class Parser(argparse.ArgumentParser):
    """A parser whose errors are ValueErrors of one line, with what was likely meant."""

    def error(self, message: str):
        """Raises ValueError; an unknown choice comes with the closest known one."""
        if wrong := re.search(r"argument (\S+): invalid choice: '([^']*)'", message):
            known = {
                str(choice): str(choice)
                for action in self._actions
                if wrong[1] in (*action.option_strings, action.metavar, action.dest)
                for choice in action.choices
            }
            message = message[: wrong.end()] + _meant(wrong[2], known) + message[wrong.end() :]
        raise ValueError(message)

    def refuse(self, words: list[str], keys: Iterable[str] = ()):
        """Raises ValueError for arguments that nothing takes; an unknown option comes with the
        closest known one, or with the closest of the config's `keys`."""
        keys = sorted(keys)  # a whole key goes before the last part of another
        known = {f"--{key.rpartition('.')[2]}": f"--config.{key}" for key in keys}
        known |= {f"--{word}": f"--config.{key}" for key in keys for word in (
            key, f"config.{key}")}  # fmt: skip
        known |= {word: word for action in self._actions for word in action.option_strings}
        unknown = next((word.partition("=")[0] for word in words if word.startswith("-")), "")
        raise ValueError(f"unrecognized arguments: {' '.join(words)}{_meant(unknown, known)}")


def _meant(word: str, known: Mapping[str, str]) -> str:
    """` (did you mean 'x'?)`, x what is known by the closest word, or nothing if none is close."""
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {known[close[0]]!r}?)" if close else ""


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0, 2 for a user's mistake, 1 where the system refuses
    (a full disk), 130 for Ctrl-C. "~" is expanded as a shell does, where it was quoted, too."""
    if argv is None:
        argv = sys.argv[1:]
        if any(word in COMMANDS for word in argv):
            _take_huge_pages()
        if next((word for word in argv if word in COMMANDS), None) == "train":
            _fuse_outputs()
        # tracing makes many objects and little garbage; looking for it takes a sixth of a start
        gc.set_threshold(100_000)
        _log_plainly()
        sys.unraisablehook = _tell_unraisable
    argv = [expand_user(word) for word in argv]
    # jax reads this when it is imported: what was compiled once is not compiled again
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "composer-jax"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")  # CLIP takes 0.2
    parser = Parser(prog="composer", description="Composable latent diffusion in JAX.")
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((word for word in argv if word in COMMANDS), None)
    try:
        if chosen:
            _check_folders(argv)
        for name, doc in COMMANDS.items():
            sub = commands.add_parser(name, help=doc, description=doc, allow_abbrev=False)
            if name == chosen:  # the others stay unimported, so that help is quick
                command = importlib.import_module(f"composer_jax.commands.{name}")
                sub.set_defaults(parser=sub)
                command.add_arguments(sub)
        if not chosen:
            return _help(parser, argv)
        args, rest = parser.parse_known_args(argv)
        args.typed = importlib.import_module("composer_jax.commands.unused").typed_options(argv)
        keys = ()
        if hasattr(command, "take_rest"):  # a config's keys
            rest = command.take_rest(args, rest)
            keys = importlib.import_module("composer_jax.training.schema").all_keys()
        if rest:
            args.parser.refuse(rest, keys)
        with matmul_precision(getattr(args, "precision", None)):
            return command.run(args) or 0
    except (ValueError, FloatingPointError) as error:
        print(f"composer: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno in UNWRITABLE and error.filename:  # what was not written by utils.atomic
            error = WriteError(Path(error.filename), error)
        print(f"composer: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:  # of numpy, of XLA
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = next(iter(str(error).splitlines()), "")[:300]
        print(f"composer: out of memory: {reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("composer: interrupted", file=sys.stderr)
        return 130


def _check_folders(argv: list[str]) -> None:
    """Refuses a folder that cannot be written into before the command is imported, which takes
    seconds; the command's own parser reads it again."""
    parser = Parser(add_help=False, allow_abbrev=False)
    for option in FOLDERS:
        parser.add_argument(option, type=arguments.folder)
    parser.parse_known_args(argv)


def _take_huge_pages() -> None:
    """Starts this process once more, with huge pages for what malloc maps.

    XLA maps its buffers anew for every step on CPU, and with pages of 4 KiB a quarter of a train
    step goes to page faults (benchmarks/cpu_settings.py). glibc reads the setting only at its
    start; one that the user has made stays.
    """
    if sys.platform == "linux" and sys.executable and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = HUGE_PAGES
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _fuse_outputs() -> None:
    """Lets XLA compute several results in one kernel on CPU: an array's parameters, moments and
    averages. A train step of `scenes64:quick` has 4,072 kernels where it had 5,474 and compiles in
    0.84 of the time; one of `scenes64:cpu` takes 0.91 of it (benchmarks/cpu_settings.py). Sampling
    would take 1.15 of it. XLA reads this once; what the user has set stays.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if XLA_OPTIONS.split("=")[0] not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {XLA_OPTIONS}".strip()


def _log_plainly() -> None:
    """What the library logs goes to stderr as it is, whatever other libraries do to logging."""
    handler, logger = logging.StreamHandler(), logging.getLogger("composer_jax")
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _tell_unraisable(error: sys.UnraisableHookArgs) -> None:
    """All but what tensorstore says in its threads, once for each array that was still being
    written, after a checkpoint has met a full disk: `Checkpoints` says that in one line."""
    if str(error.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(error)


def _help(parser: Parser, argv: list[str]) -> int:
    if not argv:
        parser.print_help()
        return 2
    parser.parse_args(argv)
    return 2


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"composer-jax {version('composer-jax')}"
    except PackageNotFoundError:  # run from a checkout
        return "composer-jax, not installed"
