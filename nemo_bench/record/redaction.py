"""Removes secrets from what is shown or shared: by names (`..._TOKEN`, `..._PASSWORD`), and by the forms of tokens."""

from __future__ import annotations

import re
from typing import Any

REMOVED = "<removed>"

_NAME = (
    r"(?<![\w.\-])[\w.\-]*"
    r"(?:TOKEN(?!IZER)|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE|AUTH(?!OR(?!I[SZ]ATION))|COOKIE)[\w.\-]*"
)
# Numbers and terms of the field: total_tokens, tokens_per_s, eos_token.
_HARMLESS = re.compile(
    r"(?:^|[._-])(?:(?:(?:total|num|max|min|train|special)_)?tokens(?:_per_\w+)?"
    r"|(?:eos|bos|pad|unk|cls|sep|mask)_token(?:_id)?)$"
)
# NAME=value, NAME: value, "NAME": "value", --name value; the value up to a space, or between its quotes, which stay.
_ASSIGNED = re.compile(
    rf"(?P<name>{_NAME})(?P<between>[\"']?[^\S\n]*[=:][^\S\n]*[\"']?)"
    r"(?:(?<=\")[^\"\n]*(?=\")|(?<=')[^'\n]*(?=')|[^\s,;\"'}\])]+)",
    re.IGNORECASE,
)
# Tokens of Hugging Face, NVIDIA, GitHub, GitLab, OpenAI and others, Slack, AWS, Google; JSON web tokens; private keys,
# up to their end or, where that is cut off, to the end of the text.
_FORMS = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bnvapi-[\w\-]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w\-]{16,}"
    r"|\bsk-[\w\-]{20,}|\bxox[abprs]-[\w\-]{10,}|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bAIza[\w\-]{35}"
    r"|\beyJ[\w\-]{8,}\.[\w\-]{8,}\.[\w\-]*"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY(?s:.*?)(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
)
_BEARER = re.compile(r"\b((?:Bearer|Basic)[^\S\n]+)[\w\-.~+/]{8,}=*", re.IGNORECASE)
_URL = re.compile(r"(\b[a-z][a-z0-9+.\-]*://[^/\s:@]*:)[^/\s@]+@", re.IGNORECASE)


def is_secret(name: str) -> bool:
    """Return whether a key or variable of that name holds a secret."""
    return bool(re.search(_NAME, name, re.IGNORECASE)) and not _HARMLESS.search(name)


def redact(text: str) -> str:
    """Return the text, of one line or many, without secrets."""
    text = _FORMS.sub(REMOVED, text)
    text = _BEARER.sub(rf"\1{REMOVED}", text)
    text = _ASSIGNED.sub(lambda m: m[0] if _HARMLESS.search(m["name"]) else m["name"] + m["between"] + REMOVED, text)
    return _URL.sub(rf"\1{REMOVED}@", text)


def redact_values(value: Any, name: str = "") -> Any:
    """Return nested dicts and lists without secrets, whether their keys or their forms give them away."""
    if isinstance(value, dict):
        return {key: redact_values(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact_values(item) for item in value]
    if value is not None and is_secret(name):
        return REMOVED
    return redact(value) if isinstance(value, str) else value
