"""Takes secrets out of text and of log events.

Two nets: what has the form of a secret (an API key, a bearer token, the password of a URL, a value behind a name such
as `password` or `aws_secret_access_key`), and the exact values this process was given, which no form gives away.
Anybody may write what is read here, so repetitions in the patterns are bounded: a line is read in linear time.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

REDACTED = "[redacted]"
SECRET_VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "PGPASSWORD")
SHORTEST_VALUE = 6  # a shorter one would be found inside ordinary words
_NAMES = (  # parts of names
    r"(?:password|passwd|passphrase|secret|token|credential|authorization|cookie|signature"
    r"|api[_-]?key|admin[_-]?key|access[_-]?key|private[_-]?key)"
)
_GIVEN = r"""[\\"']{0,4}\s{0,4}[=:]\s{0,4}[\\"']{0,4}"""
_NAMED = re.compile(_NAMES, re.IGNORECASE)
_NAMED_VALUE = re.compile(
    rf"({_NAMES}[\w-]{{0,40}}{_GIVEN})(?!\[redacted|bearer\b|basic\b)[^\s\\\"',;&)}}\]]+", re.IGNORECASE
)
_API_KEY = re.compile(r"(ww_[0-9a-z]{1,16}_)[0-9A-Za-z_-]+")  # the id is public and says whose key it was
_FORMS = (
    (_API_KEY, rf"\1{REDACTED}"),
    (re.compile(r"(\b(?:bearer|basic)\s+)[\w.~+/=-]{6,}", re.IGNORECASE), rf"\1{REDACTED}"),
    # scheme://user:password@host
    (re.compile(r"(\b[a-z][a-z0-9+.-]{0,30}://[^\s:/@]{0,200}:)[^\s/]+(@)", re.IGNORECASE), rf"\1{REDACTED}\2"),
    # name=value, name: value, 'name': 'value', "name\": \"value"
    (_NAMED_VALUE, rf"\1{REDACTED}"),
)


class Redactor:
    """Takes secrets out. values: exact secrets to look for besides the forms."""

    def __init__(self, values: Iterable[str] = ()) -> None:
        longest_first = sorted({value for value in values if len(value) >= SHORTEST_VALUE}, key=len, reverse=True)
        self._values = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def text(self, text: str) -> str:
        """The text with every secret in it replaced."""
        if self._values is not None:
            text = self._values.sub(REDACTED, text)
        for form, replacement in _FORMS:
            text = form.sub(replacement, text)
        return text

    def value(self, value: Any) -> Any:
        """The value, with whatever lies under a secret's name replaced, however deep; other texts stay."""
        if isinstance(value, Mapping):
            return {name: self._member(str(name), member) for name, member in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(member) for member in value]
        return value

    def _member(self, name: str, value: Any) -> Any:
        is_secret = isinstance(value, str | bytes) and _NAMED.search(name) is not None
        return REDACTED if is_secret else self.value(value)


def redact(text: str) -> str:
    """The text without what has the form of a secret; for texts of other programs that are stored."""
    return _BY_FORM.text(text)


def redact_keys(text: str) -> str:
    """The text without the secrets of API keys; for our own words, where `page_token: ...` is no secret."""
    return _API_KEY.sub(rf"\1{REDACTED}", text)


def secrets_of_environment() -> list[str]:
    """Values of the variables of other programs that hold secrets; ours are settings."""
    return [value for name in SECRET_VARIABLES if (value := os.environ.get(name))]


_BY_FORM = Redactor()
