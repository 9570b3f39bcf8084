"""Known incompatibilities of versions, a module each: `needed()` probes what is installed, `install()` repairs it."""

from importlib import import_module


def install(*names: str) -> None:
    """Repair those of the modules `names` that the installed versions need, before what trains is imported."""
    for name in names:
        module = import_module(f"{__name__}.{name}")
        if module.needed():
            module.install()
