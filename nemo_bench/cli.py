"""What every script does around `hydra.main`: errors as one message, exit codes, arguments of the command line."""

from __future__ import annotations

import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

from nemo_bench import interrupt
from nemo_bench.composition import composition_error, prepare_hydra
from nemo_bench.errors import BenchError

T = TypeVar("T")

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
        interrupt.raises()
        try:
            if self.schema is not None:
                prepare_hydra()
            main()
            sys.stdout.flush()
        except BrokenPipeError:
            _end_unread()
        except KeyboardInterrupt:
            _fail("interrupted", 130)
        except Exception as error:
            message = self._message(error)
            if message is None or self.shows_traceback:
                raise
            _fail(message, error.exit_code if isinstance(error, BenchError) else 2)
        sys.exit(self.exit_code)

    def guard(self, task: Callable[[T], object], argument: T) -> None:
        """Run the task of one point. A sweep continues with its other points after an error that the user can fix.

        Hydra would print "Error executing job with overrides" before the error, and end the sweep.
        """
        from omegaconf.errors import OmegaConfBaseException

        try:
            task(argument)
        except (BenchError, OmegaConfBaseException) as error:
            if self.shows_traceback:
                raise
            code = error.exit_code if isinstance(error, BenchError) else 2
            print(self._message(error), file=sys.stderr)
            if code > 128:  # a signal, meant for the whole sweep
                sys.exit(code)
            self.exit_code = self.exit_code or code
        except BrokenPipeError:
            _end_unread()

    def _message(self, error: Exception) -> str | None:
        """Return what to tell the user; None for an error that is not the user's."""
        from hydra.errors import HydraException
        from omegaconf.errors import OmegaConfBaseException

        if isinstance(error, BenchError):
            return str(error)
        if isinstance(error, (HydraException, OmegaConfBaseException)):
            return composition_error(error, self.schema)
        if isinstance(error, OSError):  # of Hydra's own files, such as a sweep's folder
            return f"{error}\nSTAGE_PATH (or stage_path=...) must name a folder that can be written"
        return _hydras_value_error(error)


def _hydras_value_error(error: Exception) -> str | None:
    """Return a message for a ValueError that Hydra itself raised about its arguments."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    if not isinstance(error, ValueError) or not frame.f_globals["__name__"].startswith("hydra."):
        return None
    if "Config group override must be a string" in str(error):
        groups = [argument for argument in sys.argv[1:] if re.fullmatch(r"[\w/]*=(\d+|null|true|false)", argument)]
        return f"{' '.join(groups)}: a group is chosen by the name of one of its options, as in model=70b"
    return str(error)


def _end_unread() -> NoReturn:
    """End as other programs do when the reader of their output (head, less) goes away."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.raise_signal(signal.SIGPIPE)
    sys.exit(141)


def _fail(message: str, exit_code: int) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(exit_code)


def verbs(*names: str) -> None:
    """Let a script be called with a verb: `python setup_stage.py check` means `action=check`.

    Another word is refused here: Hydra's message would be about its grammar.
    """
    for position, argument in enumerate(sys.argv[1:], start=1):
        before = sys.argv[position - 1]
        if not re.fullmatch(r"\w+", argument) or (before.startswith("-") and "=" not in before):
            continue  # an override, or the value of an option
        if argument in names:
            sys.argv[position] = f"action={argument}"
        else:
            _fail(f"{argument}: not a verb of this command; its verbs: {', '.join(names)}; settings are key=value", 2)


def quoted_path(path: str | Path) -> str:
    """Return a path as the value of an override, which Hydra's grammar reads whole whatever it holds."""
    from hydra.core.override_parser.types import Quote, QuotedString

    text = str(path)
    if re.fullmatch(r"/[\w./:+@%-]*", text, re.ASCII):  # reads better without quotes
        return text
    return QuotedString(text, Quote.single).with_quotes()
