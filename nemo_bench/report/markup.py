"""HTML and SVG as trees: what comes out is well-formed and escaped, whatever the data holds."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from typing import TypeAlias

Child: TypeAlias = "ET.Element | str | Iterable[Child] | None"

# Neither HTML nor XML can hold these: control characters of a log, halves of surrogate pairs of a file's name.
_UNSPEAKABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
# A line of the source each, for whoever looks at it or compares two of them.
_BLOCKS = {"tr", "section", "p", "li", "figure", "details", "dt", "svg", "path", "tbody", "div", "h2", "h3", "style"}


def el(tag: str, *children: Child, **attributes: object) -> ET.Element:
    """An element with its children: elements, text, None (nothing), or any nesting of these.

    Attributes that are None or False are left out. `_` in their names stands for `-`, and one at the end is dropped:
    `class_="wide"`, `text_anchor="end"`.
    """
    made = ET.Element(tag)
    for key, value in attributes.items():
        if value is not None and value is not False:
            name = key.rstrip("_").replace("_", "-")
            made.set(name, clean(name if value is True else str(value)))
    _append(made, children)
    if tag in _BLOCKS:
        made.tail = "\n"
    return made


def _append(parent: ET.Element, children: Iterable[Child]) -> None:
    for child in children:
        if isinstance(child, ET.Element):
            parent.append(child)
        elif isinstance(child, str):
            text = clean(child)
            if len(parent):
                parent[-1].tail = (parent[-1].tail or "") + text
            else:
                parent.text = (parent.text or "") + text
        elif child is not None:
            _append(parent, child)


def clean(text: str) -> str:
    """The text with a replacement character for what no document can hold."""
    return _UNSPEAKABLE.sub("\ufffd", text)


def document(root: ET.Element) -> str:
    """The text of the whole HTML page."""
    return "<!DOCTYPE html>\n" + ET.tostring(root, encoding="unicode", method="html") + "\n"
