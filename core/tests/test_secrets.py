"""Secrets stay out of every text: the masking itself, and a store and a log that were searched byte by byte."""

from __future__ import annotations

import base64
import json
import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from framework._secrets import (
    SecretFilter,
    forget_secrets,
    known_secrets,
    mask,
    mask_error,
    mask_value,
    place_of,
    register_environment,
    register_header,
    register_named,
    register_secret,
    register_url,
)
from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.edge import EdgeCondition, EdgeSpec, GraphSpec
from framework.graph.executor import GraphExecutor
from framework.graph.flexible_executor import ExecutorConfig, FlexibleGraphExecutor
from framework.graph.goal import Goal
from framework.graph.node import LLMNode, NodeContext, NodeProtocol, NodeResult, NodeSpec
from framework.graph.plan import ActionSpec, ActionType, Plan, PlanStep
from framework.graph.runtime_port import RuntimePort
from framework.graph.worker_errors import error_text
from framework.llm.openai import OpenAIProvider
from framework.llm.provider import Tool, ToolUse
from framework.llm.scripted import ScriptedLLM
from framework.runner.tool_registry import ToolRegistry
from framework.runtime.core import Runtime
from framework.storage.backend import open_storage

KEY = 'sk-live/"quoted"+9f8e7d6c5b4a'
GOAL = Goal(id="g", name="G", description="d")


@pytest.fixture(autouse=True)
def _no_secrets() -> Iterator[None]:
    forget_secrets()
    yield
    forget_secrets()


# --- masking ----------------------------------------------------------------------------------------------------------


def test_nothing_is_masked_and_nothing_is_copied_while_there_are_no_secrets() -> None:
    value = {"a": [KEY]}
    assert mask(KEY) is KEY
    assert mask_value(value) is value


@pytest.mark.parametrize(
    "spelling",
    [
        KEY,
        json.dumps(KEY)[1:-1],
        repr(KEY)[1:-1],
        quote(KEY),
        quote(KEY, safe=""),
        base64.b64encode(KEY.encode()).decode(),
    ],
)
def test_every_spelling_of_a_secret_is_masked(spelling: str) -> None:
    register_secret(f"  {KEY}\n")
    assert mask(f"before {spelling}, {spelling} after") == "before ***, *** after"


@given(st.text(min_size=8).filter(lambda text: len(text.strip()) >= 8), st.text(), st.text())
def test_a_secret_is_gone_whatever_is_around_it(secret: str, before: str, after: str) -> None:
    forget_secrets()
    register_secret(secret)
    masked = mask(before + secret.strip() + after)
    assert "***" in masked
    assert set(secret.strip()) <= set("*") or secret.strip() not in masked.split("***")


def test_of_a_secret_within_another_the_longer_wins() -> None:
    register_secret("abcdefgh")
    register_secret("abcdefgh-and-more")
    assert mask("abcdefgh-and-more abcdefgh") == "*** ***"


def test_short_and_empty_values_are_no_secrets() -> None:
    for value in (None, "", "1234567", "   x   "):
        register_secret(value)
    assert known_secrets() == 0


def test_a_structure_is_masked_without_being_changed() -> None:
    register_secret(KEY)
    register_secret("1234567890")
    inner = [1, "clean"]
    value = {"clean": inner, KEY: f"x{KEY}", "number": 1234567890, "pair": (KEY, True), "two": [{"k": KEY}]}
    before = json.dumps(value)
    masked = mask_value(value)
    assert masked == {
        "clean": [1, "clean"],
        "***": "x***",
        "number": "***",
        "pair": ("***", True),
        "two": [{"k": "***"}],
    }
    assert masked["clean"] is inner
    assert json.dumps(value) == before
    assert mask_value({KEY: 1, "***": 2}) == {"***": 2}


def test_an_error_without_a_message_is_named_by_its_type() -> None:
    register_secret(KEY)
    assert mask_error(ValueError(f"no {KEY}")) == "no ***"
    assert mask_error(ValueError()) == "ValueError"


def test_the_environments_secrets_are_known_by_the_names_of_the_variables() -> None:
    register_environment(
        {
            "OPENAI_API_KEY": "secret-one",
            "github_token": "secret-two",
            "MY_SECRET": "secret-three",
            "DB_PASSWORD": "secret-four",
            "DATABASE_URL": "postgresql://me:secret-five@host/db",
            "HOME": "/home/somebody",
            "AWS_KEY_FILE": "/etc/aws/key-file",
            "LC_ALL": "en_US.UTF-8",
            "KEY_ROTATION": "Disabled",
        }
    )
    texts = ["secret-one", "secret-two", "secret-three", "secret-four", "secret-five"]
    assert mask(" ".join(texts)) == "*** *** *** *** ***"
    for harmless in ("/home/somebody", "/etc/aws/key-file", "en_US.UTF-8", "postgresql://me", "Disabled"):
        assert mask(harmless) == harmless


@pytest.mark.parametrize(
    "name", "GITHUB_PAT MYSQL_PWD PGPASS DB_PASS JWT AUTH_BEARER SENTRY_DSN REDIS_AUTH npm_config__auth".split()
)
def test_names_that_mean_a_secret_are_known(name: str) -> None:
    register_environment({name: "the-value-of-it"})
    assert mask("the-value-of-it") == "***"


@pytest.mark.parametrize(
    "name", "PATH PWD OLDPWD AUTHOR GIT_AUTHOR_NAME COMPASS PGPASSFILE SSH_AUTH_SOCK XAUTHORITY PATTERN".split()
)
def test_names_that_only_look_like_it_are_not(name: str) -> None:
    register_environment({name: "the-value-of-it"})
    assert known_secrets() == 0


def test_the_secrets_of_a_url_are_known_in_every_form() -> None:
    register_named("SERVICE", "postgres://me%40x:p%40ss%2Fword@db/x?sslmode=verify-full&sslpassword=another-one")
    register_named("OTHER", "https://lonely-key-of-mine@host/1")
    basic = base64.b64encode(b"me@x:p@ss/word").decode()
    for said in ("p%40ss%2Fword", "p@ss/word", basic, "another-one", "lonely-key-of-mine"):
        assert mask(f"<{said}>") == "<***>"
    assert mask("verify-full postgres://me%40x") == "verify-full postgres://me%40x"


def test_what_a_services_url_holds_beside_its_place_is_known() -> None:
    url = "http://bob:pw@host:8080/v1?region=north-west-2&token=abc&q=a%20b%20c%20d%20e"
    register_url(url)
    assert mask(url) == "http://***/v1?region=***&***&q=***"
    assert mask(base64.b64encode(b"bob:pw").decode()) == "***"
    assert mask("a b c d e") == "***"
    assert place_of(url) == "http://host:8080/v1"
    assert place_of("nowhere") is place_of("http://[") is None


def test_a_headers_token_is_known_with_and_without_its_scheme() -> None:
    register_header("Authorization", "Bearer the-token-itself")
    register_header("X-Api-Key", "the-api-key")
    register_header("Accept", "application/json")
    register_named("plain", "no-secret-here")
    assert mask("Bearer the-token-itself") == "***"
    assert mask("the-token-itself the-api-key") == "*** ***"
    assert mask("application/json no-secret-here") == "application/json no-secret-here"


# --- logs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Path]:
    """A log file with everything any logger says, through the filter."""
    path = tmp_path / "all.log"
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s %(message)s %(extra)s", defaults={"extra": ""}))
    handler.addFilter(SecretFilter())
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield path
    root.setLevel(level)
    root.removeHandler(handler)
    handler.close()


def test_log_records_are_masked_wherever_the_secret_is(log: Path) -> None:
    register_secret(KEY)
    logger = logging.getLogger("framework.test_secrets")
    logger.info("plain %s", "text")
    logger.info("argument %s", KEY)
    logger.info(f"message {KEY}")
    logger.info("dict %(key)s", {"key": KEY})
    logger.info("extra", extra={"extra": KEY})
    logger.info("stack", stack_info=True)
    try:
        raise ValueError(KEY)
    except ValueError as error:
        logger.exception("failed: %s", error)
    text = log.read_text()
    assert KEY not in text
    assert "plain text" in text
    assert text.count("***") == 6
    assert "Traceback" in text
    assert "ValueError: ***" in text


def test_a_record_that_cannot_be_formatted_passes_with_its_arguments_masked() -> None:
    register_secret(KEY)
    record = logging.LogRecord("x", logging.INFO, "f.py", 1, f"{KEY}: %s %s", (KEY,), None)
    assert SecretFilter().filter(record)
    assert (record.msg, record.args) == ("***: %s %s", ("***",))


# --- the places that every text passes -------------------------------------------------------------------------------


class PlainRuntime:
    """A runtime of somebody else's, which masks nothing."""

    has_listeners = True

    def __init__(self) -> None:
        self.told: list[str] = []

    def start_run(self, **_: Any) -> str:
        return "run-1"

    def end_run(self, *, success: bool, narrative: str, output_data: dict[str, Any]) -> None:
        self.told.append(narrative)

    def report_problem(self, *, severity: str, description: str) -> str:
        self.told.append(description)
        return "prob_1"

    def emit(self, event: Any) -> None:
        self.told.append(event.error)


async def test_what_any_runtime_is_told_is_masked() -> None:
    register_secret(KEY)
    runtime = PlainRuntime()
    port = RuntimePort(runtime)
    port.problem("critical", f"problem {KEY}")
    port.emit("run_ended", error=f"error {KEY}")
    await port.end(False, f"narrative {KEY}", {})
    assert runtime.told == ["problem ***", "error ***", "narrative ***"]


def test_the_text_of_a_steps_error_is_masked() -> None:
    register_secret(KEY)
    assert error_text(ValueError(KEY)) == "***"
    assert error_text(ValueError()) == "ValueError"


# --- a whole run ------------------------------------------------------------------------------------------------------


class Refusing(BaseHTTPRequestHandler):
    """An endpoint that answers as vendors do, with the key in the error."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        key = self.headers.get("authorization", "").removeprefix("Bearer ")
        body = json.dumps({"error": {"message": f"Incorrect API key provided: {key}", "code": "invalid"}}).encode()
        self.send_response(401)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Not to the terminal."""


@pytest.fixture
def endpoint() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        server.shutdown()
        thread.join()


class Raises(NodeProtocol):
    async def execute(self, ctx: NodeContext) -> NodeResult:
        raise RuntimeError(f"cannot log in with {KEY}")

    def validate_input(self, ctx: NodeContext) -> list[str]:
        return [f"odd key {KEY}"]


class Returns(NodeProtocol):
    async def execute(self, ctx: NodeContext) -> NodeResult:
        ctx.runtime.report_problem(severity="warning", description=f"seen {KEY}", root_cause=KEY, suggested_fix=KEY)
        decision = ctx.runtime.decide("try", [{"id": "a"}], "a", f"because of {KEY}")
        ctx.runtime.record_outcome(decision, success=False, error=f"outcome {KEY}", summary=KEY)
        return NodeResult(success=False, error=f"returned {KEY}")


class AsksOverHttp(NodeProtocol):
    def __init__(self, base_url: str) -> None:
        self.llm = OpenAIProvider("some-model", api_key=HTTP_KEY, base_url=base_url)

    async def execute(self, ctx: NodeContext) -> NodeResult:
        result = await LLMNode().execute(replace(ctx, llm=self.llm))
        assert not result.success
        assert "Incorrect API key" in (result.error or "")
        return result


HTTP_KEY = "sk-http-0a1b2c3d4e5f6071"  # one that fits into a header


def leak() -> dict[str, Any]:
    """Gives the key."""
    return {"token": KEY, "note": f"use {KEY}"}


def burst() -> None:
    """Raises with the key."""
    raise ConnectionError(f"https://host/?key={quote(KEY)}")


@pytest.fixture
def registry() -> Iterator[ToolRegistry]:
    with ToolRegistry() as made:
        made.register_function(leak)
        made.register_function(burst)
        yield made


def searched(folder: Path) -> int:
    """How many bytes of files there are in ``folder``; none of them is part of a key."""
    size = 0
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            size += len(content)
            for key in (KEY, HTTP_KEY):
                for spelling in (key, json.dumps(key)[1:-1], repr(key)[1:-1], quote(key), key[:14], key[-14:]):
                    assert spelling.encode() not in content, (path.name, spelling)
    return size


async def test_a_graphs_run_leaves_no_secret_in_its_store_its_record_or_the_log(
    tmp_path: Path, endpoint: str, registry: ToolRegistry, log: Path
) -> None:
    register_secret(KEY)
    told: list[str] = []

    def script(messages: list[Any], system: str | None, tools: list[Tool]) -> Any:
        told.extend(map(str, messages))
        turn = len([message for message in messages if message["role"] == "assistant"])
        return [ToolUse("1", "leak", {}), ToolUse("2", "burst", {}), "done"][turn]

    failing: dict[str, Any] = {"max_retries": 2, "retry_delay_seconds": 0.0}
    nodes = [NodeSpec(id="tools", tools=["leak", "burst"], output_keys=["answer"])]
    nodes += [NodeSpec(id=name, node_type="function", **failing) for name in ("raises", "http", "returns")]
    order = [node.id for node in nodes]
    edges = [EdgeSpec(id=f"{a}-{b}", source=a, target=b, condition=EdgeCondition.ALWAYS) for a, b in pairwise(order)]
    graph = GraphSpec(id="graph", goal_id="g", entry_node="tools", nodes=nodes, edges=edges, terminal_nodes=["returns"])
    storage = open_storage(f"sqlite:///{tmp_path}/store/runs.db")
    (tmp_path / "records").mkdir()
    runtime = Runtime(tmp_path / "records")
    errors: list[str] = []
    runtime.add_listener(lambda event: errors.append(event.error or ""))
    executor = GraphExecutor(
        runtime,
        llm=ScriptedLLM(script),
        tools=list(registry.get_tools().values()),
        tool_executor=registry.get_async_executor(),
        node_registry={"raises": Raises(), "http": AsksOverHttp(endpoint), "returns": Returns()},
        checkpoint_manager=CheckpointManager(storage),
    )
    result = await executor.execute(graph, GOAL, {"question": "?"}, run_id="run-1")
    assert result.path == order
    assert "***" in (result.error or "")
    assert KEY not in (result.error or "")
    assert any("***" in each for each in told)
    shown = [*told, *errors, str(result), str(storage.find_run("run-1"))]
    for each in shown:
        assert KEY not in each
        assert HTTP_KEY not in each
    assert searched(tmp_path) > 20_000  # the store with its journal, the run's document, and the log
    storage.close()
    assert searched(tmp_path / "store") > 4096
    assert "***" in "".join(path.read_text() for path in (tmp_path / "records").rglob("*.json"))


async def test_a_plans_run_leaves_no_secret_either(tmp_path: Path, registry: ToolRegistry, log: Path) -> None:
    register_secret(KEY)

    def step(name: str, *needs: str, **action: Any) -> PlanStep:
        return PlanStep(id=name, description=name, action=ActionSpec(**action), dependencies=list(needs), max_retries=1)

    plan = Plan(
        id="p",
        goal_id="g",
        description="d",
        steps=[
            step("leak", action_type=ActionType.TOOL_USE, tool_name="leak"),
            step("own", "leak", action_type=ActionType.TOOL_USE, tool_name="own_tool"),
            step("burst", "own", action_type=ActionType.TOOL_USE, tool_name="burst"),
        ],
    )
    other = plan.model_copy(deep=True, update={"id": "q"})
    other.steps = [step("fails", action_type=ActionType.FUNCTION, function_name="fails")]

    def fails() -> None:
        raise PermissionError(f"not with {KEY}")

    storage = open_storage(f"sqlite:///{tmp_path}/store/runs.db")
    (tmp_path / "records").mkdir()
    executor = FlexibleGraphExecutor(
        Runtime(tmp_path / "records"),
        tools=registry.get_tools(),
        tool_executor=registry.get_async_executor(),
        functions={"fails": fails, "own_tool": leak},
        config=ExecutorConfig(retry_delay_seconds=0.0),
        checkpoint_manager=CheckpointManager(storage),
    )
    results = [
        await executor.execute_plan(plan, GOAL, {}, run_id="run-1"),
        await executor.execute_plan(other, GOAL, {}, run_id="run-2"),
    ]
    assert plan.get_step("leak").result is not None  # type: ignore[union-attr]
    for each in results:
        assert KEY not in str(each)
        assert "***" in str(each)
    assert searched(tmp_path) > 20_000
    storage.close()
