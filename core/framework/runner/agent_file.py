"""``agent.json``: the text of an exported agent, read into a graph and a goal with errors that say where they are."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from framework.errors import AgentFileError, AgentNotFound, ExpressionError
from framework.graph.edge import AsyncEntryPointSpec, EdgeCondition, EdgeSpec, GraphSpec
from framework.graph.expressions import compile_expression
from framework.graph.goal import Constraint, Goal, SuccessCriterion
from framework.graph.node_base import NodeSpec
from framework.graph.text import shorten, summary_of

AGENT_FILE = "agent.json"
NODE_TYPES = ("llm_tool_use", "llm_generate", "function", "router", "human_input")
"""Node types with a meaning of their own; any other runs as llm_tool_use."""

_OLD_NAMES = {"type": "node_type", "prompt": "system_prompt"}
_EXPECTED = {
    "string_type": "a text",
    "string_unicode": "a text of valid Unicode",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number of usual size",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "mapping_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}

_Model = TypeVar("_Model", bound=BaseModel)
Place = tuple[int | str, ...]


@dataclass(frozen=True)
class AgentFile:
    """What an ``agent.json`` says. ``warnings`` lists what was understood but should be looked at; ``about`` is its
    object ``agent`` (id, name, version, description), as it is."""

    graph: GraphSpec
    goal: Goal
    warnings: Sequence[str] = ()
    about: Mapping[str, Any] = field(default_factory=dict)


def load_agent_export(data: str | Mapping[str, Any]) -> tuple[GraphSpec, Goal]:
    """Graph and goal of an exported agent, given as JSON text or as the object it holds.

    Raises ``AgentFileError`` for everything that cannot be understood, and nothing else.
    """
    agent = parse_agent(data)
    return agent.graph, agent.goal


def read_agent_file(folder: Path) -> AgentFile:
    """The agent of a folder. Raises ``AgentNotFound`` without an ``agent.json``, ``AgentFileError``."""
    file = folder / AGENT_FILE
    try:
        content = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise AgentNotFound(
            f"There is no agent in {str(folder)!r}: the folder has no file {AGENT_FILE}."
            if folder.is_dir()
            else f"There is no folder {str(folder)!r}; an agent is a folder with a file {AGENT_FILE}."
        ) from error
    except OSError as error:
        raise AgentFileError(str(file), f"the file cannot be read: {error.strerror or error}") from error
    return parse_agent(_text(content, str(file)), str(file))


def parse_agent(data: str | Mapping[str, Any], file: str = AGENT_FILE) -> AgentFile:
    """The agent that JSON text, or the object it holds, describes. ``file`` is what errors call it.

    Raises ``AgentFileError`` for everything that cannot be understood, and nothing else.
    """
    warnings: list[str] = []
    if isinstance(data, str):
        loaded, repeated = parse_json(data, file)
        warnings += [f"{_path(place)} is given more than once; the last one counts" for place in repeated]
    else:
        loaded = data
    if not isinstance(loaded, Mapping):
        raise AgentFileError(file, f"expected an object with the key 'graph', found {_found(loaded)}")
    invalid = next(_invalid_texts(loaded), None)
    if invalid is not None:
        raise AgentFileError(file, f"{_path(invalid)}: expected a text of valid Unicode, found half a character")
    if "graph" not in loaded:
        raise AgentFileError(file, "the key 'graph' is missing; it holds the agent's nodes and edges")
    problems: list[str] = []
    graph = _model(GraphSpec, _graph(loaded["graph"], warnings), "graph", loaded["graph"], problems)
    goal_id = (graph.goal_id or graph.id) if graph is not None else "goal"
    goal = _model(Goal, _goal(loaded.get("goal"), goal_id), "goal", loaded.get("goal"), problems)
    about = loaded.get("agent")
    if graph is None or goal is None:
        raise AgentFileError(file, *problems)
    if loaded.get("goal") is None:
        warnings.append("there is no goal; the agent's prompts say nothing of what it is for")
    warnings += _doubts(graph)
    return AgentFile(graph, goal, warnings, dict(about) if isinstance(about, Mapping) else {})


def parse_json(text: str, file: str) -> tuple[Any, list[Place]]:
    """The value of a JSON text, and the places whose key its object holds more than once.

    Raises ``AgentFileError`` with the line and column.
    """
    doubled: list[tuple[dict[str, Any], list[str]]] = []

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        built = dict(pairs)
        if len(built) < len(pairs):
            keys = [key for key, _ in pairs]
            doubled.append((built, [key for key in built if keys.count(key) > 1]))
        return built

    try:
        value = json.loads(text, object_pairs_hook=build, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise AgentFileError(f"{file}:{error.lineno}:{error.colno}", f"not valid JSON: {error.msg}") from error
    except ValueError as error:  # a number of too many digits, NaN
        raise AgentFileError(file, f"not valid JSON: {error}") from error
    except RecursionError as error:
        raise AgentFileError(file, "not valid JSON: its lists and objects are nested too deeply") from error
    if not doubled:
        return value, []
    keys_of = {id(built): keys for built, keys in doubled}
    return value, [(*place, key) for place, part in _parts(value) for key in keys_of.get(id(part), ())]


def _text(content: bytes, file: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise AgentFileError(f"{file}:{line}", "the file is not UTF-8 text; save it as UTF-8") from error


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON number")


def _parts(value: Any) -> Iterator[tuple[Place, Any]]:
    """Every value inside, with its place. Not recursive: the text may be nested as deeply as its reader allows."""
    waiting: list[tuple[Place, Any]] = [((), value)]
    seen: set[int] = set()
    while waiting:
        place, part = waiting.pop()
        yield place, part
        if not isinstance(part, (Mapping, list, tuple)) or id(part) in seen:
            continue
        seen.add(id(part))  # an object given by a program may contain itself
        items = part.items() if isinstance(part, Mapping) else enumerate(part)
        waiting += [((*place, key), inner) for key, inner in items]


def _invalid_texts(value: Any) -> Iterator[Place]:
    """The places of half characters (lone surrogates), which JSON can express and no store can keep."""
    for place, part in _parts(value):
        for text in (part, *place[-1:]):
            if isinstance(text, str) and not text.isascii():
                try:
                    text.encode()
                except UnicodeEncodeError:
                    yield place


# --- what the file says, as the models want it ------------------------------------------------------------------------


def _known(data: Any, model: type[BaseModel], **defaults: Any) -> Any:
    """``data`` with ``defaults`` for known keys that are missing or null; other values stay for the model to judge."""
    if not isinstance(data, Mapping):
        return data
    given = {key: value for key, value in data.items() if value is not None or key not in model.model_fields}
    return {**defaults, **given}


def _each(items: Any, model: type[BaseModel], **defaults: Any) -> Any:
    return [_known(item, model, **defaults) for item in items] if isinstance(items, list) else items


def _graph(data: Any, warnings: list[str]) -> Any:
    graph = _known(data, GraphSpec, id="agent-graph", goal_id="")
    if not isinstance(graph, dict):
        return graph
    points = graph.get("entry_points")
    graph.setdefault("entry_node", points.get("start", "") if isinstance(points, Mapping) else "")
    nodes = graph.get("nodes", [])
    if isinstance(nodes, list):
        graph["nodes"] = [_node(node, f"graph.nodes[{index}]", warnings) for index, node in enumerate(nodes)]
    graph["edges"] = _each(graph.get("edges", []), EdgeSpec, condition=EdgeCondition.ON_SUCCESS.value)
    entries = _each(graph.get("async_entry_points", []), AsyncEntryPointSpec)
    if isinstance(entries, list):
        entries = [{"name": each.get("id"), **each} if isinstance(each, dict) else each for each in entries]
    graph["async_entry_points"] = entries
    return graph


def _node(data: Any, place: str, warnings: list[str]) -> Any:
    node = _known(data, NodeSpec)
    if not isinstance(node, dict):
        return node
    for old, new in _OLD_NAMES.items():
        if node.get(old) is None:
            continue
        if new not in node:
            node[new] = node[old]
            warnings.append(f"{place}.{old} is the old name of {new}, and was read as that; rename it")
        elif node[new] != node[old]:
            warnings.append(f"{place}.{old} is ignored, because {new} is given too; remove it")
    return node


def _goal(data: Any, default_id: str) -> Any:
    goal = _known({} if data is None else data, Goal, id=default_id, description="")
    if not isinstance(goal, dict):
        return goal
    goal.setdefault("name", goal["id"])
    if "success_criteria" in goal:
        goal["success_criteria"] = _each(goal["success_criteria"], SuccessCriterion, metric="", target="")
    if "constraints" in goal:
        goal["constraints"] = _each(goal["constraints"], Constraint, constraint_type="hard", category="safety")
    return goal


def _doubts(graph: GraphSpec) -> Iterator[str]:
    """What can be run, but probably means something else."""
    for index, node in enumerate(graph.nodes):
        if node.node_type not in NODE_TYPES:
            yield (
                f"graph.nodes[{index}].node_type is {shorten(repr(node.node_type), 60)}, which is run as llm_tool_use; "
                f"known are {', '.join(NODE_TYPES)}"
            )
    for index, edge in enumerate(graph.edges):
        place, expression = f"graph.edges[{index}]", (edge.condition_expr or "").strip()
        if edge.condition is not EdgeCondition.CONDITIONAL:
            if expression:
                yield f"{place}.condition_expr is ignored, because condition is {edge.condition.value!r}"
            continue
        if not expression:
            yield f"{place} is conditional without a condition_expr, so it is always followed"
            continue
        try:
            compile_expression(expression)
        except ExpressionError as error:
            yield f"{place}.condition_expr counts as false: {error}"
    if (graph.model_extra or {}).get("parallel_groups"):
        yield "graph.parallel_groups is ignored; set fan_out on the node before the nodes that are to run at once"


# --- errors -----------------------------------------------------------------------------------------------------------


def _model(model: type[_Model], data: Any, name: str, original: Any, problems: list[str]) -> _Model | None:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        for each in error.errors(include_url=False, include_context=True):
            problems.append(_problem((name, *each["loc"]), each, original))
        return None


def _problem(place: Place, error: Mapping[str, Any], original: Any) -> str:
    kind, context = error["type"], error.get("ctx") or {}
    where = _path(_as_written(place, original))
    if kind == "missing":
        return f"{where}: this key is missing"
    if kind in ("enum", "literal_error"):
        expected = "one of " + str(context["expected"]).replace("'", "").replace(" or ", ", ")
    elif kind in _EXPECTED:
        expected = _EXPECTED[kind]
    else:
        message = str(error["msg"])
        expected = message.removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{where}: expected {expected}, found {_found(error.get('input'))}"


def _as_written(place: Place, original: Any) -> Place:
    """``place`` by the name the file uses for its last key."""
    *parents, last = place
    holder = original
    for key in parents[1:]:
        try:
            holder = holder[key]
        except (LookupError, TypeError):
            return place
    old = next((old for old, new in _OLD_NAMES.items() if new == last), None)
    if old is not None and isinstance(holder, Mapping) and holder.get(last) is None and old in holder:
        return (*parents, old)
    return place


def _path(place: Place) -> str:
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{shorten(str(key), 80)}" for key in place)
    # Half a character cannot be printed, but it can be named.
    return text.removeprefix(".").encode("utf-8", "backslashreplace").decode() or "the whole file"


def _found(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"the text {shorten(repr(value[:80]), 60)}"
    if isinstance(value, (int, float)):
        return f"the number {summary_of(value)}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return "an object" if isinstance(value, Mapping) else f"a {type(value).__name__}"
