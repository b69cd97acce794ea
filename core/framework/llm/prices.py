"""What a model's tokens cost, so that a run can say what it spent. A convenience, never a bill.

The built-in table was noted down by hand from the vendors' public price lists in November 2025 and is not updated by
itself: prices change, and long contexts, batches and service tiers cost other amounts. What you register, and what the
JSON file named by the environment variable SUREFOOT_PRICES says, goes before it. A model that is in neither has no
price: its replies have the cost None, never a guess.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from framework.errors import SurefootError

logger = logging.getLogger(__name__)

VARIABLE = "SUREFOOT_PRICES"
"""Environment variable with the path of a JSON file such as ``{"some-model": {"input": 0.15, "output": 0.6}}``, perhaps
with ``cached_input`` and ``cache_write``, in US dollars per million tokens; names as in `register_price`."""


class InvalidPrices(SurefootError, ValueError):
    """The file named by SUREFOOT_PRICES cannot be read, or does not say prices."""


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars per million tokens. None: the same as other input."""

    input: float
    output: float
    cached_input: float | None = None
    """Input read from the provider's cache."""
    cache_write: float | None = None
    """Input that is written to the provider's cache."""

    def cost(self, input_tokens: int, output_tokens: int, cached: int = 0, written: int = 0) -> float:
        """US dollars. ``cached`` and ``written`` are parts of ``input_tokens``."""
        plain = max(0, input_tokens - cached - written)
        dollars = plain * self.input + output_tokens * self.output
        dollars += cached * (self.input if self.cached_input is None else self.cached_input)
        dollars += written * (self.input if self.cache_write is None else self.cache_write)
        return dollars / 1e6


_BUILT_IN = {
    "gpt-4o": Price(2.5, 10.0, 1.25),
    "gpt-4o-mini": Price(0.15, 0.6, 0.075),
    "gpt-4.1": Price(2.0, 8.0, 0.5),
    "gpt-4.1-mini": Price(0.4, 1.6, 0.1),
    "gpt-4.1-nano": Price(0.1, 0.4, 0.025),
    "gpt-5": Price(1.25, 10.0, 0.125),
    "gpt-5-mini": Price(0.25, 2.0, 0.025),
    "gpt-5-nano": Price(0.05, 0.4, 0.005),
    "o3": Price(2.0, 8.0, 0.5),
    "o4-mini": Price(1.1, 4.4, 0.275),
    "claude-opus-4-1": Price(15.0, 75.0, 1.5, 18.75),
    "claude-opus-4-5": Price(5.0, 25.0, 0.5, 6.25),
    "claude-sonnet-4": Price(3.0, 15.0, 0.3, 3.75),
    "claude-sonnet-4-5": Price(3.0, 15.0, 0.3, 3.75),
    "claude-haiku-4-5": Price(1.0, 5.0, 0.1, 1.25),
    "claude-3-5-haiku": Price(0.8, 4.0, 0.08, 1.0),
}

# A name may carry the date or number of its release: gpt-4o-2024-08-06, claude-haiku-4-5-20251001, ...-latest.
_RELEASE = re.compile(r"-(?:\d{8}|\d{4}-\d{2}-\d{2}|latest)\Z")

_registered: dict[str, Price] = {}
_file: tuple[str, dict[str, Price]] | None = None
_lock = threading.Lock()


def register_price(
    model: str,
    *,
    input: float,
    output: float,
    cached_input: float | None = None,
    cache_write: float | None = None,
) -> None:
    """Set the price of ``model``, in US dollars per million tokens, for this process.

    A name without the date of its release stands for all its releases; one that ends with ``*`` for all models whose
    name begins so. Raises ValueError for a price below 0.
    """
    price = Price(input, output, cached_input, cache_write)
    _check(model, price)
    with _lock:
        _registered[model] = price


def price_of(model: str) -> Price | None:
    """The price of ``model``: registered, else from the file, else built in, else None.

    A vendor's prefix (``openai/gpt-4o``) does not count. Raises InvalidPrices when the file cannot be used.
    """
    name = model.rpartition("/")[2]
    for table in (_registered, _from_file(), _BUILT_IN):
        for candidate in (model, name, _RELEASE.sub("", name)):
            if candidate in table:
                return table[candidate]
        stars = [key for key in table if key.endswith("*") and name.startswith(key[:-1])]
        if stars:
            return table[max(stars, key=len)]
    return None


def cost_of_call(model: str, input_tokens: int, output_tokens: int, cached: int = 0, written: int = 0) -> float | None:
    """What one call cost in US dollars; None when the model has no price, or when an argument is not what it should be.

    Never raises: the call is made and paid for, and must not fail because its price cannot be looked up.
    """
    named, *counts = cast("tuple[object, ...]", (model, input_tokens, output_tokens, cached, written))
    if not isinstance(named, str) or not all(isinstance(count, int) for count in counts):
        return None
    try:
        price = price_of(model)
    except InvalidPrices as error:
        logger.warning("The cost of a call of %r is not known: %s", model, error)
        return None
    return None if price is None else price.cost(input_tokens, output_tokens, cached, written)


def _from_file() -> Mapping[str, Price]:
    global _file
    path = os.environ.get(VARIABLE)
    if not path:
        return {}
    with _lock:
        if _file is None or _file[0] != path:
            _file = (path, _read(path))
        return _file[1]


def _read(path: str) -> dict[str, Price]:
    try:
        with open(path, encoding="utf-8") as file:
            table = json.load(file)
    except (OSError, ValueError) as error:
        raise InvalidPrices(f"{VARIABLE} names {path!r}, which cannot be read as JSON: {error}") from error
    if not isinstance(table, dict):
        raise InvalidPrices(f"{path}: expected an object of model names, not {type(table).__name__}.")
    return {model: _entry(path, model, entry) for model, entry in table.items()}


def _entry(path: str, model: str, entry: Any) -> Price:
    known = {"input", "output", "cached_input", "cache_write"}
    if not isinstance(entry, dict) or not {"input", "output"} <= set(entry) <= known:
        raise InvalidPrices(
            f'{path}: the price of {model!r} has to be an object with "input" and "output", and perhaps '
            '"cached_input" and "cache_write", in US dollars per million tokens.'
        )
    wrong = [value for value in entry.values() if not isinstance(value, (int, float)) or isinstance(value, bool)]
    if wrong:
        raise InvalidPrices(f"{path}: the price of {model!r} has to be in numbers, not {wrong[0]!r}.")
    price = Price(**entry)
    try:
        _check(model, price)
    except ValueError as error:
        raise InvalidPrices(f"{path}: {error}") from error
    return price


def _check(model: str, price: Price) -> None:
    for value in (price.input, price.output, price.cached_input, price.cache_write):
        if value is not None and not 0 <= value < float("inf"):
            raise ValueError(f"The price of {model!r} has to be a number of US dollars from 0 on, not {value!r}.")
