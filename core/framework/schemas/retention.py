"""``RetentionPolicy``: which runs and checkpoints of a store an operator keeps, and how ages and sizes are written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

_AGE = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|d|w)", re.IGNORECASE)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?b)?|b)?", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_LONGEST = timedelta(days=365_000)


def parse_age(text: str) -> timedelta:
    """``90s``, ``30m``, ``12h``, ``30d``, ``2w`` as a length of time. Raises ``ValueError`` that says what to write."""
    found = _AGE.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!r} is no age; write a number and s, m, h, d or w, such as 30d or 12h")
    seconds = float(found[1]) * _SECONDS[found[2].lower()]
    if seconds > _LONGEST.total_seconds():
        raise ValueError(f"{text!r} is more than a thousand years; leave the option out to keep without end")
    return timedelta(seconds=seconds)


def parse_size(text: str) -> int:
    """``500MB``, ``2GB``, ``1.5 GiB``, ``4096`` in bytes; powers of 1024. Raises ``ValueError`` that says what to
    write."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!r} is no size; write a number and KB, MB, GB or TB, such as 500MB or 2GB")
    return int(float(found[1]) * 1024 ** _POWERS[(found[2] or "").lower()])


def _age(value: Any) -> Any:
    # As JSON has it: ISO 8601, such as P30D.
    return parse_age(value) if isinstance(value, str) and not value.startswith(("P", "-P")) else value


def _size(value: Any) -> Any:
    return parse_size(value) if isinstance(value, str) else value


Age = Annotated[timedelta, BeforeValidator(_age), Field(ge=timedelta(0), le=_LONGEST)]
Size = Annotated[int, BeforeValidator(_size), Field(ge=0)]
Count = Annotated[int, Field(ge=0)]


class RetentionPolicy(BaseModel):
    """Which finished runs of a store are kept, and for how long. What is not set keeps everything.

    A run goes when any rule says so. Its age counts from its last change. A run and the runs that are parts of it go
    together or not at all. ``completed`` runs are one kind; ``failed`` and ``cancelled`` ones, which can be resumed,
    the other. Never removed: runs that are running; paused and crashed ones, unless ``unfinished_max_age`` is set;
    pinned runs and checkpoints; the newest readable checkpoint of a run; definitions that a run still has. Ages are
    ``timedelta``, seconds, or texts such as ``30d``; sizes are bytes or texts such as ``2GB``. Unknown options are
    refused.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_age: Age | None = Field(
        default=None, description="Finished runs, and checkpoints but the newest of any run, go when they are older."
    )
    max_total_bytes: Size | None = Field(
        default=None, description="The finished runs that changed longest ago go until the store holds no more."
    )
    keep_completed: Count | None = Field(default=None, description="How many completed runs stay, the newest.")
    keep_failed: Count | None = Field(default=None, description="How many failed or cancelled runs stay, the newest.")
    completed_max_age: Age | None = Field(default=None, description="For completed runs, in place of max_age.")
    failed_max_age: Age | None = Field(default=None, description="For failed and cancelled runs, in place of max_age.")
    unfinished_max_age: Age | None = Field(
        default=None, description="Paused and crashed runs go, too, when nothing happened to them for this long."
    )

    @property
    def is_empty(self) -> bool:
        """Whether it removes nothing, ever."""
        return all(getattr(self, name) is None for name in type(self).model_fields)

    @classmethod
    def parse(cls, text: str, where: str = "A retention policy") -> Self:
        """The policy in ``max_age=30d,max_total_bytes=2GB,keep_completed=100``. Raises ``ValueError`` naming ``where``,
        the part that is wrong and what to write."""
        options: dict[str, str] = {}
        for part in filter(None, (each.strip() for each in text.split(","))):
            name, mark, value = (each.strip() for each in part.partition("="))
            name = name.replace("-", "_")
            if not mark or not value:
                raise ValueError(f"{where}: {part!r} is not name=value, such as max_age=30d or keep_completed=100.")
            if name in options:
                raise ValueError(f"{where}: {name} is given twice.")
            options[name] = value
        if not options:
            raise ValueError(f"{where} is empty; write for example max_age=30d,keep_failed=500.")
        return cls.from_options(options, where)

    @classmethod
    def from_options(cls, options: Mapping[str, Any], where: str = "A retention policy") -> Self:
        """The policy of these options by name. Raises ``ValueError`` in one line."""
        try:
            return cls(**options)
        except ValidationError as error:
            raise ValueError(f"{where}: {'; '.join(_said(cls, each) for each in error.errors())}.") from None


def _said(cls: type[BaseModel], error: Any) -> str:
    name = str(error["loc"][0]) if error["loc"] else ""
    if error["type"] == "extra_forbidden":
        return f"there is no {name}; the options are {', '.join(cls.model_fields)}"
    if error["type"] == "value_error":
        return f"{name}: {error['ctx']['error']}"
    if error["type"].startswith("int"):
        return f"{name}: {error['input']!r} is no whole number, such as 100"
    return f"{name}: {error['msg'][:1].lower()}{error['msg'][1:]}"
