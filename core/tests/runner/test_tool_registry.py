"""Tools: from functions and modules to calls by a model."""

from __future__ import annotations

import asyncio
import datetime
import enum
import json
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from framework import _secrets
from framework.errors import AgentFileError, LeaseLost, ToolError
from framework.llm.provider import Tool, ToolResult, ToolUse
from framework.runner.tool_registry import ToolRegistry, tool

KEY = "sk-test-1234567890abcdef"


@pytest.fixture
def registry() -> Iterator[ToolRegistry]:
    with ToolRegistry() as made:
        yield made


@pytest.fixture
def secret() -> Iterator[str]:
    _secrets.register_secret(KEY)
    yield KEY
    _secrets.forget_secrets()


def call(registry: ToolRegistry, name: str, /, **arguments: Any) -> ToolResult:
    return registry.get_executor()(ToolUse("call-1", name, arguments))


def answer(registry: ToolRegistry, name: str, /, **arguments: Any) -> Any:
    result = call(registry, name, **arguments)
    assert not result.is_error, result.content
    return json.loads(result.content)


def error(registry: ToolRegistry, name: str, /, **arguments: Any) -> str:
    result = call(registry, name, **arguments)
    assert result.is_error
    assert result.tool_use_id == "call-1"
    return str(json.loads(result.content)["error"])


# --- what a model is told ---------------------------------------------------------------------------------------------


class Size(enum.Enum):
    SMALL = "small"
    LARGE = "large"


class Place(BaseModel):
    city: str
    country: str = "de"


def parameters_of(registry: ToolRegistry, function: Callable[..., Any]) -> dict[str, Any]:
    registry.register_function(function)
    return registry.get_tools()[function.__name__].parameters


def test_the_plain_types_give_their_json_types_and_no_default_means_required(registry: ToolRegistry) -> None:
    def f(  # type: ignore[no-untyped-def]
        a: int,
        b: float,
        c: bool,
        d: dict,  # type: ignore[type-arg]
        e: list,  # type: ignore[type-arg]
        f: str,
        g,
        h=None,
        i: int = 3,
    ):
        return None

    schema = parameters_of(registry, f)
    assert schema["properties"] == {
        "a": {"type": "integer"},
        "b": {"type": "number"},
        "c": {"type": "boolean"},
        "d": {"type": "object"},
        "e": {"type": "array"},
        "f": {"type": "string"},
        "g": {"type": "string"},
        "h": {"type": "string"},
        "i": {"type": "integer"},
    }
    assert schema["required"] == ["a", "b", "c", "d", "e", "f", "g"]
    assert schema["type"] == "object"


def test_the_richer_types_give_what_they_allow(registry: ToolRegistry) -> None:
    def f(
        mode: Literal["fast", "slow"],
        size: Size,
        place: Place,
        names: list[str],
        limit: int | None = None,
        when: Annotated[str, "a day, as 2026-01-31"] = "",
        count: Annotated[int, Field(description="how many", ge=1)] = 1,
        default_size: Size = Size.LARGE,
    ) -> None:
        return None

    schema = parameters_of(registry, f)
    properties = schema["properties"]
    assert properties["mode"]["enum"] == ["fast", "slow"]
    assert schema["$defs"]["Size"]["enum"] == ["small", "large"]
    assert set(schema["$defs"]["Place"]["properties"]) == {"city", "country"}
    assert properties["names"] == {"type": "array", "items": {"type": "string"}}
    assert {"type": "null"} in properties["limit"]["anyOf"]
    assert properties["when"] == {"type": "string", "description": "a day, as 2026-01-31", "default": ""}
    assert properties["count"]["description"] == "how many"
    assert properties["count"]["minimum"] == 1
    assert properties["default_size"]["default"] == "large"


def test_description_and_name_come_from_the_call_the_decorator_or_the_function(registry: ToolRegistry) -> None:
    def plain() -> None:
        """What plain does.

        In two paragraphs.
        """

    @tool("What decorated does", name="other", effects=True)
    def decorated() -> None:
        """Not this."""

    registry.register_function(plain)
    registry.register_function(decorated)
    registry.register_function(plain, name="renamed", description="Given")
    tools = registry.get_tools()
    assert tools["plain"].description == "What plain does.\n\nIn two paragraphs."
    assert (tools["other"].description, tools["other"].effects) == ("What decorated does", True)
    assert (tools["renamed"].name, tools["renamed"].description, tools["renamed"].effects) == (
        "renamed",
        "Given",
        False,
    )
    assert registry.get_registered_names() == ["plain", "other", "renamed"]
    assert registry.has_tool("plain")
    assert not registry.has_tool("decorated")


def test_a_tool_cannot_have_effects_and_be_read_only() -> None:
    with pytest.raises(ToolError, match="not both"):
        tool(effects=True, read_only=True)


def test_an_annotation_that_cannot_be_read_is_refused_with_the_place(registry: ToolRegistry) -> None:
    def f(x: Missing) -> None:  # type: ignore[name-defined] # noqa: F821
        return None

    with pytest.raises(ToolError, match=r"'f' \(.*test_tool_registry\.py, line \d+\).*Missing"):
        registry.register_function(f)


# --- calls ------------------------------------------------------------------------------------------------------------


def test_arguments_are_converted_to_what_the_function_takes(registry: ToolRegistry) -> None:
    seen: list[Any] = []

    def f(place: Place, size: Size, day: datetime.date, n: int, /, tags: set[str]) -> None:
        seen.extend([place, size, day, n, tags])

    registry.register_function(f)
    call(registry, "f", place={"city": "Bonn"}, size="small", day="2026-01-31", n="7", tags=["a"])
    assert seen == [Place(city="Bonn"), Size.SMALL, datetime.date(2026, 1, 31), 7, {"a"}]


def test_arguments_that_do_not_fit_are_all_named_and_the_function_is_not_called(registry: ToolRegistry) -> None:
    def f(a: int, b: str, c: Place) -> None:
        raise AssertionError("called")

    registry.register_function(f)
    said = error(registry, "f", a="many", c={}, d=1)
    for part in ("Invalid arguments for tool 'f'", "'a'", "many", "'b' is missing", "'c.city'", "'d' (known: a, b, c)"):
        assert part in said


def test_a_function_with_keyword_arguments_takes_any(registry: ToolRegistry) -> None:
    def f(a: int, **more: Any) -> dict[str, Any]:
        return {"a": a, **more}

    registry.register_function(f)
    assert registry.get_tools()["f"].parameters["additionalProperties"] is True
    assert answer(registry, "f", a=1, b=2) == {"a": 1, "b": 2}


@dataclass
class Point:
    x: int
    when: datetime.date


@pytest.mark.parametrize(
    ("value", "content"),
    [
        ("plain text", "plain text"),
        ({"a": [1, None]}, '{"a": [1, null]}'),
        (7, "7"),
        (None, "null"),
        (Place(city="Köln"), '{"city": "Köln", "country": "de"}'),
        (Point(1, datetime.date(2026, 1, 31)), '{"x": 1, "when": "2026-01-31"}'),
        (float("nan"), "null"),
    ],
)
def test_a_value_becomes_text_or_json(registry: ToolRegistry, value: Any, content: str) -> None:
    registry.register("f", Tool("f", ""), lambda _: value)
    assert call(registry, "f") == ToolResult("call-1", content, is_error=False)


def test_a_value_that_is_no_json_is_an_error_with_its_text(registry: ToolRegistry) -> None:
    class Odd:
        def __str__(self) -> str:
            return "an odd thing"

    registry.register("f", Tool("f", ""), lambda _: Odd())
    result = call(registry, "f")
    assert result.is_error
    assert json.loads(result.content)["raw_content"] == "an odd thing"
    assert "Odd" in json.loads(result.content)["error"]


def test_what_goes_wrong_becomes_a_result_for_the_model(registry: ToolRegistry) -> None:
    def f() -> None:
        raise KeyError("city")

    registry.register_function(f)
    assert error(registry, "f") == "KeyError: 'city'"
    assert error(registry, "g") == "There is no tool 'g'; known: f"
    result = registry.get_executor()(ToolUse("call-1", "f", [1]))  # type: ignore[arg-type]
    assert "must be a JSON object" in json.loads(result.content)["error"]


async def test_an_error_of_the_runs_own_store_is_raised(registry: ToolRegistry) -> None:
    def lost() -> None:
        raise LeaseLost("run", 1)

    async def lost_later() -> None:
        raise LeaseLost("run", 1)

    registry.register_function(lost)
    registry.register_function(lost_later)
    for name in ("lost", "lost_later"):
        with pytest.raises(LeaseLost):
            call(registry, name)
        with pytest.raises(LeaseLost):
            await registry.get_executor().acall(ToolUse("1", name, {}))


def test_arguments_of_a_tool_given_with_a_schema_are_checked_at_the_top(registry: ToolRegistry) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}, "s": {"type": ["string", "null"]}, "e": {"enum": ["a", "b"]}},
        "required": ["n"],
        "additionalProperties": False,
    }
    registry.register("f", Tool("f", "", schema), lambda arguments: arguments)
    assert answer(registry, "f", n=1, s=None, e="a") == {"n": 1, "s": None, "e": "a"}
    said = error(registry, "f", s=1, e="c", z=1)
    for part in ("'n' is missing", "'s' must be of the type string or null, not 1", "'e' must be one of", "'z'"):
        assert part in said
    assert "'n' must be of the type integer, not true" in error(registry, "f", n=True)


def test_register_refuses_an_executor_that_cannot_be_called(registry: ToolRegistry) -> None:
    with pytest.raises(ToolError, match="executor"):
        registry.register("f", Tool("f", ""), None)  # type: ignore[arg-type]


# --- async tools ------------------------------------------------------------------------------------------------------


async def test_an_async_tool_works_from_a_thread_from_a_loop_and_handed_on(registry: ToolRegistry) -> None:
    threads: list[threading.Thread] = []

    async def double(n: int) -> int:
        await asyncio.sleep(0)
        threads.append(threading.current_thread())
        return n * 2

    registry.register_function(double)
    use = ToolUse("call-1", "double", {"n": 4})
    expected = ToolResult("call-1", "8")
    assert await asyncio.to_thread(registry.get_executor(), use) == expected
    assert registry.get_executor()(use) == expected  # even where a loop runs
    assert threads[0] is threads[1] is not threading.main_thread()
    assert await registry.get_executor().acall(use) == expected
    later = registry.get_async_executor()(use)
    assert not isinstance(later, ToolResult)
    assert await later == expected
    assert threads[2] is threads[3] is threading.main_thread()


async def test_a_sync_tool_never_blocks_the_loop(registry: ToolRegistry) -> None:
    released = threading.Event()

    def wait() -> str:
        assert released.wait(30)
        return "done"

    registry.register_function(wait)
    running = asyncio.create_task(registry.get_executor().acall(ToolUse("1", "wait", {})))
    await asyncio.sleep(0)
    released.set()  # reached only because the loop goes on
    assert (await running).content == "done"


async def test_cancelling_a_call_cancels_an_async_tool(registry: ToolRegistry) -> None:
    began, cancelled = asyncio.Event(), asyncio.Event()

    async def hang() -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    registry.register_function(hang)
    running = asyncio.create_task(registry.get_executor().acall(ToolUse("1", "hang", {})))
    await began.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert cancelled.is_set()


def test_an_async_tool_that_waits_for_another_in_its_own_thread_does_not_hang(registry: ToolRegistry) -> None:
    async def inner() -> str:
        return "inner"

    async def outer() -> str:
        return registry.get_executor()(ToolUse("1", "inner", {})).content

    registry.register_function(inner)
    registry.register_function(outer)
    assert call(registry, "outer").content == "inner"


def test_cleanup_ends_the_thread_of_async_tools_and_a_later_call_starts_it_again(registry: ToolRegistry) -> None:
    async def f() -> int:
        return 1

    registry.register_function(f)
    for _ in range(2):
        assert answer(registry, "f") == 1
        assert any(thread.name == "surefoot async tools" for thread in threading.enumerate())
        registry.cleanup()
        assert not any(thread.name == "surefoot async tools" for thread in threading.enumerate())


# --- modules ----------------------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def test_a_module_gives_its_decorated_functions_and_its_dict(registry: ToolRegistry, tmp_path: Path) -> None:
    module = write(
        tmp_path / "agent" / "tools.py",
        """
from framework.llm.provider import Tool, ToolResult
from framework.runner.tool_registry import tool

@tool
def first(n: int) -> int:
    "The first."
    return n + 1

@tool(description="The second", name="second", effects=True)
async def whatever(text: str = "x") -> str:
    return text.upper()

def not_a_tool():
    raise AssertionError

def third(a: str) -> str:
    return a * 2

TOOLS = {"third": third, "fourth": Tool("fourth", "The fourth", {"type": "object", "properties": {}})}

def tool_executor(use):
    return ToolResult(use.id, '{"asked": "%s"}' % use.name)
""",
    )
    assert registry.discover_from_module(module) == 4
    assert sorted(registry.get_registered_names()) == ["first", "fourth", "second", "third"]
    assert answer(registry, "first", n=1) == 2
    assert call(registry, "second", text="a").content == "A"
    assert call(registry, "third", a="ab").content == "abab"
    assert answer(registry, "fourth") == {"asked": "fourth"}
    assert registry.get_tools()["second"].effects


@pytest.mark.parametrize(
    ("answered", "value"),
    [
        ('ToolResult(use.id, "not {valid json}")', None),
        ('ToolResult(use.id, "")', {}),
        ('ToolResult(use.id, "[1]")', [1]),
        ('{"a": 1}', {"a": 1}),
    ],
)
def test_what_a_modules_executor_answers_is_read_as_json(
    registry: ToolRegistry, tmp_path: Path, answered: str, value: Any
) -> None:
    module = write(
        tmp_path / "tools.py",
        f"""
from framework.llm.provider import Tool, ToolResult
TOOLS = {{"t": Tool("t", "")}}
def tool_executor(use):
    return {answered}
""",
    )
    registry.discover_from_module(module)
    if value is None:
        assert answer(registry, "t")["raw_content"] == "not {valid json}"
        assert "no JSON" in answer(registry, "t")["error"]
    else:
        assert answer(registry, "t") == value


async def test_an_error_of_a_modules_async_executor_stays_one(registry: ToolRegistry, tmp_path: Path) -> None:
    module = write(
        tmp_path / "tools.py",
        """
from framework.llm.provider import Tool, ToolResult
TOOLS = {"t": Tool("t", "")}
async def tool_executor(use):
    return ToolResult("another id", "no such city", is_error=True)
""",
    )
    registry.discover_from_module(module)
    expected = ToolResult("call-1", "no such city", is_error=True)
    assert call(registry, "t") == expected
    assert await registry.get_executor().acall(ToolUse("call-1", "t", {})) == expected


def test_two_agents_with_a_file_of_the_same_name_do_not_meet(registry: ToolRegistry, tmp_path: Path) -> None:
    for agent in ("a", "b"):
        write(tmp_path / agent / "helpers.py", f"name = {agent!r}\n")
        text = f"""
from framework.runner.tool_registry import tool
from .helpers import name
@tool(name="who_{agent}")
def who() -> str:
    return name
"""
        assert registry.discover_from_module(write(tmp_path / agent / "tools.py", text)) == 1
    assert [call(registry, f"who_{agent}").content for agent in "ab"] == ["a", "b"]


def test_a_missing_file_has_no_tools(registry: ToolRegistry, tmp_path: Path) -> None:
    assert registry.discover_from_module(tmp_path / "tools.py") == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\nimport no_such_module_anywhere\n", r"tools\.py:2: ModuleNotFoundError"),
        ("x = 1\n\ndef f(:\n", r"tools\.py:3: SyntaxError"),
        ("def f():\n    return 1 / 0\n\nf()\n", r"tools\.py:2: ZeroDivisionError"),
        ("import sys\nsys.exit(3)\n", r"tools\.py:2: SystemExit"),
    ],
)
def test_a_module_that_fails_is_named_with_its_line(
    registry: ToolRegistry, tmp_path: Path, text: str, said: str
) -> None:
    with pytest.raises(AgentFileError, match=said):
        registry.discover_from_module(write(tmp_path / "tools.py", text))


@pytest.mark.parametrize(
    ("declared", "said"),
    [
        ("[1]", "TOOLS is a list"),
        ("{'a': 1}", r"TOOLS\['a'\] is a int"),
        ("{'ok': print, 'a': Tool('a', '')}", "nothing runs it"),
    ],
)
def test_a_module_that_declares_something_else_adds_nothing(
    registry: ToolRegistry, tmp_path: Path, declared: str, said: str
) -> None:
    module = write(tmp_path / "tools.py", f"from framework.llm.provider import Tool\nTOOLS = {declared}\n")
    with pytest.raises(ToolError, match=said):
        registry.discover_from_module(module)
    assert registry.get_registered_names() == []


# --- secrets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [str, lambda key: {"key": key}, lambda key: [f"Bearer {key}!"], lambda key: {key: 1}])
def test_a_tools_answer_never_shows_a_known_secret(
    registry: ToolRegistry, secret: str, wrap: Callable[[str], Any]
) -> None:
    registry.register("f", Tool("f", ""), lambda _: wrap(secret))
    result = call(registry, "f")
    assert secret not in result.content
    assert "***" in result.content


def test_neither_does_an_error_or_the_log_of_it(
    registry: ToolRegistry, secret: str, caplog: pytest.LogCaptureFixture
) -> None:
    def f(n: int) -> None:
        raise RuntimeError(f"401 for key {secret}")

    registry.register_function(f)
    caplog.handler.addFilter(_secrets.SecretFilter())
    with caplog.at_level(logging.DEBUG, logger="framework"):
        assert error(registry, "f", n=1) == "RuntimeError: 401 for key ***"
        assert secret not in error(registry, "f", n=secret)
        assert secret not in error(registry, secret)
    assert "RuntimeError" in caplog.text
    assert secret not in caplog.text


def test_secrets_in_the_environment_are_known_to_every_registry(
    monkeypatch: pytest.MonkeyPatch, registry: ToolRegistry
) -> None:
    monkeypatch.setenv("SOME_SERVICE_API_KEY", "value-of-the-key")
    try:
        with ToolRegistry() as made:
            made.register("f", Tool("f", ""), lambda _: "the value-of-the-key")
            assert call(made, "f").content == "the ***"
    finally:
        _secrets.forget_secrets()
