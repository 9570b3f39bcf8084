"""Removes secrets from what is shown or shared.

Two nets: names (a key or variable called `..._TOKEN`, `..._PASSWORD`, ...), and the forms of well-known tokens and of
private keys, wherever they appear. A secret that has neither cannot be told from other text.
"""

from __future__ import annotations

import re
from typing import Any

REMOVED = "<removed>"

_NAME = (
    r"(?<![\w.\-])[\w.\-]*"
    r"(?:TOKEN(?!IZER)|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE|AUTH(?!OR(?!I[SZ]ATION))|COOKIE)[\w.\-]*"
)
# total_tokens, tokens_per_s, eos_token and the like are numbers and terms of the field.
_HARMLESS = re.compile(
    r"(?:^|[._-])(?:(?:total|num|max|min|train|special)_)?tokens(?:_per_\w+)?$"
    r"|(?:^|[._-])(?:eos|bos|pad|unk|cls|sep|mask)_token(?:_id)?$"
)
_SECRET_NAME = re.compile(_NAME, re.IGNORECASE)
# NAME=value, NAME: value, "NAME": "value", --name value; the value up to a space, or the closing quote.
_ASSIGNED = re.compile(
    rf"(?P<name>{_NAME})(?P<between>[\"']?[^\S\n]*[=:][^\S\n]*)(?P<value>\"[^\"\n]*\"|'[^'\n]*'|[^\s,;\"'}}\])]+)",
    re.IGNORECASE,
)
_FORMS = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|\bnvapi-[\w\-]{16,}"  # NVIDIA
    r"|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}"  # GitHub
    r"|\bglpat-[\w\-]{16,}"  # GitLab
    r"|\bsk-[\w\-]{20,}"  # OpenAI and others
    r"|\bxox[abprs]-[\w\-]{10,}"  # Slack
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"  # AWS
    r"|\bAIza[\w\-]{35}"  # Google
    r"|\beyJ[\w\-]{8,}\.[\w\-]{8,}\.[\w\-]*"  # JSON web tokens
    # A private key: up to its end, over any number of lines, or to the end of the text if it is cut off.
    r"|-----BEGIN [A-Z ]*PRIVATE KEY(?s:.*?)(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
)
_BEARER = re.compile(r"\b((?:Bearer|Basic)[^\S\n]+)[\w\-.~+/]{8,}=*", re.IGNORECASE)
_URL = re.compile(r"(\b[a-z][a-z0-9+.\-]*://[^/\s:@]*:)[^/\s@]+@", re.IGNORECASE)


def is_secret(name: str) -> bool:
    """Return whether a key or variable of that name holds a secret."""
    return bool(_SECRET_NAME.search(name)) and not _HARMLESS.search(name)


def redact(text: str) -> str:
    """Return the text, of one line or many, without secrets."""
    text = _FORMS.sub(REMOVED, text)
    text = _BEARER.sub(rf"\1{REMOVED}", text)
    text = _ASSIGNED.sub(lambda m: m[0] if _HARMLESS.search(m["name"]) else m["name"] + m["between"] + REMOVED, text)
    return _URL.sub(rf"\1{REMOVED}@", text)


def redact_values(value: Any) -> Any:
    """Return nested dicts and lists without secrets, whether their keys or their forms give them away."""
    if isinstance(value, dict):
        return {
            key: REMOVED
            if item is not None and not isinstance(item, (dict, list)) and is_secret(str(key))
            else redact_values(item)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [redact_values(item) for item in value]
    return redact(value) if isinstance(value, str) else value
