"""What every script does around `hydra.main`: errors as one message, exit codes, arguments of the command line."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from nemo_bench.composition import composition_error, prepare_hydra
from nemo_bench.errors import BenchError

FULL_ERROR = "HYDRA_FULL_ERROR"


class Application:
    """A script: the schema of its configuration, and the exit code of the first point that could not be run."""

    def __init__(self, schema: type | None = None) -> None:
        self.schema = schema
        self.exit_code = 0
        self.shows_traceback = os.environ.get(FULL_ERROR) == "1"

    def run(self, main: Callable[[], object]) -> NoReturn:
        """Run a script's main function and exit: 0 done, 1 a run failed, 2 the user can fix it, 130 interrupted."""
        os.environ[FULL_ERROR] = "1"  # else Hydra prints errors itself, with a part of the traceback, and ends with 1
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # set by startup.py, for the imports
            signal.signal(signal.SIGINT, signal.default_int_handler)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # a terminal may not know every character of a name
        with self._messages():
            if self.schema is not None:
                prepare_hydra()
            main()
            sys.stdout.flush()
        sys.exit(self.exit_code)

    def guard(self, module: str, task: str, argument: Any) -> None:
        """Run the task of one point. A sweep continues with its other points after an error that the user can fix.

        Its module is imported here: composing and printing a configuration needs none of it.
        """
        with self._messages():
            getattr(import_module(module), task)(argument)

    @contextmanager
    def _messages(self) -> Iterator[None]:
        """Print an error that the user can fix as its message, and keep its exit code."""
        try:
            yield
        except BrokenPipeError:  # end as other programs do when the reader of their output (head, less) goes away
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            signal.raise_signal(signal.SIGPIPE)
        except KeyboardInterrupt:
            _fail("interrupted", 130)
        except Exception as error:
            message = self._message(error)
            if message is None or self.shows_traceback:
                raise
            code = error.exit_code if isinstance(error, BenchError) else 2
            if code > 128:  # a signal, meant for the whole sweep
                _fail(message, code)
            print(message, file=sys.stderr)
            self.exit_code = self.exit_code or code

    def _message(self, error: Exception) -> str | None:
        """Return what to tell the user; None for an error that is not the user's."""
        if isinstance(error, BenchError):
            return str(error)
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        raised_in = frame.f_globals["__name__"].partition(".")[0]
        if isinstance(error, (HydraException, OmegaConfBaseException)) or raised_in in ("hydra", "omegaconf"):
            return composition_error(error, self.schema)
        if isinstance(error, OSError):  # of Hydra's own files, such as a sweep's folder
            return f"{error}\nSTAGE_PATH (or stage_path=...) must name a folder that can be written"
        return None


def _fail(message: str, exit_code: int = 2) -> NoReturn:
    """Print a message and end the process."""
    print(message, file=sys.stderr)
    sys.exit(exit_code)


def verbs(*names: str) -> None:
    """Let a script be called with a verb, `check` for `action=check`; other words would get a message about grammar."""
    for position, argument in enumerate(sys.argv[1:], start=1):
        before = sys.argv[position - 1]
        if not re.fullmatch(r"\w+", argument) or (before.startswith("-") and "=" not in before):
            continue  # an override, or the value of an option
        if argument not in names:
            _fail(f"{argument}: not a verb of this command; its verbs: {', '.join(names)}; settings are key=value")
        sys.argv[position] = f"action={argument}"


def quoted_path(path: str | Path) -> str:
    """Return a path as the value of an override, which Hydra's grammar reads whole whatever it holds."""
    text = str(path)
    if re.fullmatch(r"/[\w./:+@%-]*", text, re.ASCII):  # reads better without quotes
        return text
    return QuotedString(text, Quote.single).with_quotes()
