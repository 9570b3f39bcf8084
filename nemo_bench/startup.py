"""Imported first by every script: Ctrl-C during the other imports, or their absence, ends it without a traceback."""

import importlib.util
import signal
import sys

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

if importlib.util.find_spec("hydra") is None:
    print(
        f"{sys.executable} does not have this project's packages.\n"
        "  `source .venv/bin/activate` first (`make train` makes it), or pip install -c constraints.txt -e .",
        file=sys.stderr,
    )
    sys.exit(2)
