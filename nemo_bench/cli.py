"""What every script of the project does around `hydra.main`: errors as one message, with exit code 2."""

from __future__ import annotations

import difflib
import functools
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

FULL_ERROR = "HYDRA_FULL_ERROR"
_WANTS_TRACEBACK = os.environ.get(FULL_ERROR) == "1"


# Exit codes of the points that could not be run; a sweep goes on with its other points.
_failures: list[int] = []
# The script's configuration, where it is not TrainConfig.
_schema: list[type] = []


def run(main: Callable[[], object], schema: type | None = None) -> None:
    """Runs a `@hydra.main` function and exits: 0 done, 1 a run failed, 2 the user can mend it, 130 interrupted.

    Hydra prints errors itself, with a part of the traceback, and ends with 1. With HYDRA_FULL_ERROR=1 it hands the
    exception on instead; so that is asked for here, and the user's own HYDRA_FULL_ERROR=1 still shows the traceback.

    Args:
        schema: the configuration's dataclass, whose keys are proposed for a mistyped one; TrainConfig by default.
    """
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from nemo_bench.errors import BenchError

    if schema is not None:
        _schema.append(schema)
    _resolve_shown_configuration(sys.argv)
    _use_our_launchers()
    OmegaConf.register_new_resolver("temporary_folder", temporary_folder)
    if _WANTS_TRACEBACK:
        main()
    else:
        os.environ[FULL_ERROR] = "1"
        try:
            main()
        except BenchError as error:  # of a launcher; the points' own are caught in guard()
            _fail(str(error), error.exit_code)
        except (HydraException, OmegaConfBaseException) as error:
            _fail(_configuration_error(error), 2)
        except KeyboardInterrupt:
            _fail("interrupted", 130)
        except BrokenPipeError:
            _leave_unread()
        except OSError as error:  # of Hydra's own files, such as a sweep's folder
            _fail(f"{error}\nSTAGE_PATH (or stage_path=...) must name a folder that can be written", 2)
    end()


def verbs(*names: str) -> None:
    """Lets a script be called with a verb: `python setup_stage.py check` means `action=check`.

    A word that is none is refused here: Hydra would speak of its grammar.
    """
    arguments = sys.argv[1:]
    for position, argument in enumerate(arguments):
        follows_option = position > 0 and arguments[position - 1].startswith("-") and "=" not in arguments[position - 1]
        if argument in names and not follows_option:
            sys.argv[position + 1] = f"action={argument}"
        elif re.fullmatch(r"\w+", argument) and not follows_option:
            _fail(f"{argument}: not a verb of this command; its verbs: {', '.join(names)}; settings are key=value", 2)


def end() -> None:
    """Exits with the code of the first failure, if there was one."""
    if _failures:
        sys.exit(_failures[0])


def guard(task: Callable[[T], object], argument: T) -> None:
    """Runs the body of a script's main function; an error meant for the user is printed here, in its own words.

    Not left to Hydra, which would put "Error executing job with overrides" before it and end a sweep at once.
    """
    from omegaconf.errors import OmegaConfBaseException

    from nemo_bench.errors import BenchError

    try:
        task(argument)
    except (BenchError, OmegaConfBaseException) as error:
        if _WANTS_TRACEBACK:
            raise
        code = error.exit_code if isinstance(error, BenchError) else 2
        print(str(error) if isinstance(error, BenchError) else _configuration_error(error), file=sys.stderr)
        if code > 128:  # a signal: it was meant for the whole sweep
            sys.exit(code)
        _failures.append(code)
    except BrokenPipeError:
        _leave_unread()


def _leave_unread() -> None:
    """The reader of our output (head, less) went away: nothing to say, and nobody to say it to."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(141)


def _use_our_launchers() -> None:
    """Takes hydra-submitit-launcher's schemas out, where it is installed.

    It registers launchers of the same names, and Hydra would hold conf/hydra/launcher/ against their schemas.
    """
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins

    Plugins.instance()  # finds and registers all plugins, once
    registered = ConfigStore.instance().repo.get("hydra", {}).get("launcher", {})
    for name in ("submitit_slurm.yaml", "submitit_local.yaml"):
        registered.pop(name, None)


def _fail(message: str, exit_code: int) -> None:
    print(message, file=sys.stderr)
    sys.exit(exit_code)


def _resolve_shown_configuration(argv: list[str]) -> None:
    """`--cfg job` shows numbers (global batch size 256), not the interpolations they are computed from."""
    shows_job = any(a == "--cfg=job" or (a in ("--cfg", "-c") and b == "job") for a, b in zip(argv, [*argv[1:], ""]))
    if shows_job and "--resolve" not in argv:
        argv.append("--resolve")


def quoted_path(path: str | Path) -> str:
    """Return a path as the value of an override, which Hydra's grammar reads whole whatever it holds."""
    from hydra.core.override_parser.types import Quote, QuotedString

    text = str(path)
    if re.fullmatch(r"/[\w./:+@%-]*", text, re.ASCII):  # reads better without quotes
        return text
    return QuotedString(text, Quote.single).with_quotes()


@functools.cache
def temporary_folder() -> str:
    """Return a folder that is removed when this process ends, for what Hydra's sweeper writes about a sweep."""
    import atexit
    import shutil
    import tempfile

    folder = tempfile.mkdtemp(prefix="nemo-bench-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


# Lines of Hydra's and OmegaConf's messages that speak of their own objects, or propose `+key=value`: the schema is
# closed, so that would only move the error.
_NOISE = (
    "To append to your config",
    "reference_type=",
    "object_type=",
    "full_key:",
    "Config search path",
    "provider=",
)
# Groups that are no keys of the composed configuration.
_GROUPS_ONLY = ("scale", "experiment")


def _configuration_error(error: Exception) -> str:
    """Hydra's or OmegaConf's error in one message, with the names that come close to a mistyped one."""
    whole = f"{error}\n{error.__cause__ or ''}"
    missing = re.search(r"Could not find '([^']+)/([^'/]+)'", whole)
    if missing:
        group, option = missing.groups()
        if (group, option) == ("hydra/launcher", "submitit_local"):
            return (
                "hydra/launcher=submitit_local no longer exists: leave it out; -m runs the points of a sweep in turn, "
                "in the foreground\n  hydra/launcher=submitit_slurm submits them to Slurm"
            )
        options = re.findall(r"^\t(?!provider=)(\S+)$", whole, re.MULTILINE)
        options.sort(key=lambda name: [int(part) if part.isdigit() else 0 for part in re.split(r"(\d+)", name)])
        return f"{group}={option}: there is no such {group}\n  valid: {', '.join(options)}"
    if "is not in struct" in whole or re.search(r"Key '\S+' not in '", whole):
        unknown = re.search(r"Could not override '([^']+)'", whole) or re.search(r"full_key: (\S+)", whole)
        if unknown:
            return f"unknown key: {unknown[1]}\n  {_nearest_keys(unknown[1])}"
    override = getattr(error, "override", None)  # Hydra's OverrideParseException
    if override is not None:
        whole = f"cannot read the override {override}\n{whole}"
    lines = dict.fromkeys(line.strip() for line in whole.splitlines())  # the cause often repeats the error
    return "\n  ".join(line for line in lines if line and not line.startswith(_NOISE))


def _nearest_keys(key: str) -> str:
    from nemo_bench.config import TrainConfig

    valid = _schema_keys(_schema[0]()) if _schema else [*_schema_keys(TrainConfig()), *_GROUPS_ONLY]
    name = key.rpartition(".")[2]
    # A long path in common says little about the last word, which is the one that was mistyped.
    close = [
        v
        for v in difflib.get_close_matches(key, valid, n=3, cutoff=0.6)
        if difflib.SequenceMatcher(None, name, v.rpartition(".")[2]).ratio() >= 0.6
    ]
    close += [v for v in valid if name in v.rpartition(".")[2] and v not in close][:3]
    if close:
        return f"did you mean: {', '.join(close)}"
    parent = key.rpartition(".")[0]
    siblings = [v for v in valid if v.rpartition(".")[0] == parent] or [v for v in valid if "." not in v]
    return f"valid here: {', '.join(siblings)}"


def _schema_keys(schema: object, prefix: str = "") -> list[str]:
    """Every key of the configuration, with its path; sections too, since they are groups to choose from."""
    import dataclasses

    keys = []
    for field in dataclasses.fields(schema):  # type: ignore[arg-type]
        value = getattr(schema, field.name)
        keys.append(prefix + field.name)
        if dataclasses.is_dataclass(value):
            keys += _schema_keys(value, f"{prefix}{field.name}.")
    return keys
