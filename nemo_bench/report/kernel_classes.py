"""What a GPU kernel is for, judged by its name, by the tables of `kernel_classes.yaml`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

_TABLES = yaml.safe_load(Path(__file__).with_name("kernel_classes.yaml").read_text())
CLASSES: tuple[str, ...] = tuple(_TABLES["classes"])
GEMM, ATTENTION, NORMALISATION, CAST, ACTIVATION, ELEMENTWISE, OPTIMIZER, OTHER, COMMUNICATION, MEMORY = CLASSES


def term_of(kind: str, name: str, about: Mapping[str, Any], in_head: bool) -> str:
    """Return the term of an estimate that a kernel belongs to, by its class, its name and the trace's facts of it."""
    if kind != COMMUNICATION:
        return "embedding, output layer, loss" if in_head else _TABLES["terms"].get(kind, "other kernels")
    text = f"{about.get('Process Group Description')} {about.get('Collective name')} {name}"
    terms = _TABLES["communication_terms"].items()
    return next((term for pattern, term in terms if re.search(pattern, text, re.IGNORECASE)), "other communication")


@cache
def kernel_class(name: str) -> str:
    """Return the class of a GPU kernel, or of a copy, with this (demangled) name."""
    patterns = ((kind, "|".join(parts)) for kind, parts in _TABLES["patterns"].items())
    return next((kind for kind, pattern in patterns if re.search(pattern, name, re.IGNORECASE)), OTHER)


def short_name(name: str, width: int = 80) -> str:
    """Return a kernel's name without return type, namespaces and arguments, cut at `width`."""
    text = re.sub(r"^void ", "", name)
    text = re.sub(r"\(anonymous namespace\)::|(at::native|at|transformer_engine|cutlass|cuda|std)::", "", text)
    # The arguments are in the last parentheses; others, as in `(int)4`, belong to a template.
    text = re.sub(r"(?<=[\w>])\([^()]*\)$", "", text)
    return text if len(text) <= width else f"{text[: width - 3]}..."
