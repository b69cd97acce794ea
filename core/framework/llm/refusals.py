"""Which option of a request an endpoint says it does not know. Pure.

What is found is left out of every later request, so a mere complaint about an option's value does not count: a schema
that is invalid, or a limit that is too large, is the error of whoever asked for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_CODES = {"unsupported_parameter", "unknown_parameter", "unrecognized_parameter", "extra_forbidden"}
# About a value, not about the option.
_VALUE = re.compile(
    r"invalid (?:json[ _])?schema|too (?:large|long|big|high|small|low)|at (?:most|least)|maximum|minimum|exceed"
    r"|(?:larger|longer|greater|less|more|higher|lower) than|up to"
)
_UNKNOWN = r"(?:unsupported|unknown|unrecogni[sz]ed|unexpected)\s+(?:\w+\s+){0,3}?\w*\s*[:=]?\s*[\[('\"`]*"
_NOT_TAKEN = (
    r"(?:(?:is|are)?\s*(?:not|n't)\s+(?:yet\s+)?(?:be\s+)?(?:supported|allowed|permitted|recogni[sz]ed|available|known)"
    r"|(?:is|are)\s+(?:unsupported|unknown|unrecogni[sz]ed|unavailable)|type is unavailable"
    r"|extra (?:inputs|fields) (?:are )?not permitted|forces tool use)"
)
_LACKS = r"(?:not|n't)\s+support"
# Between an option's name and what is said of it; words of a schema's inside mean that the schema is what is wrong.
_BETWEEN = r"(?:(?!\bschema\b|propert|keyword|in context|\$ref|\.\s)[^\n]){0,80}?"


def refused_option(text: str, body: Any, request: Mapping[str, Any], names: Mapping[str, Sequence[str]]) -> str | None:
    """The option of ``request`` that an error names as unsupported or unknown; None when it names none.

    ``text`` is what the endpoint says, ``body`` the error's JSON if there is any, and ``names`` has the words by which
    each option that can be left out is called.
    """
    parts = [body, body.get("error")] if isinstance(body, Mapping) else []
    said = [part for part in parts if isinstance(part, Mapping)]
    parameter = next((part["param"] for part in said if isinstance(part.get("param"), str) and part["param"]), None)
    known_code = any(part.get("code") in _CODES for part in said)
    lower = text.lower()
    for option, words in names.items():
        if option not in request:
            continue
        if parameter is not None and parameter.partition(".")[0] not in words:
            continue
        if known_code and parameter in words:
            return option
        if not _VALUE.search(lower) and _named_as_unknown(lower, words):
            return option
    return None


def _named_as_unknown(text: str, words: Sequence[str]) -> bool:
    name = rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})s?(?!\w)(?![\w.\[\]]*\bschema\b)"
    patterns = (
        rf"{_UNKNOWN}{name}",
        rf"{name}{_BETWEEN}{_NOT_TAKEN}",
        rf"{_LACKS}\w*\s{_BETWEEN}{name}",
        rf"{name}[.\w]*\.type['\"`]* must be",  # knows other kinds of it only
    )
    return any(re.search(pattern, text) for pattern in patterns)
