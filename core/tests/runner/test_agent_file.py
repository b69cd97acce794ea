"""``agent.json``: what is understood, what is kept, and how everything else is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from framework.errors import AgentFileError, SurefootError
from framework.graph.edge import EdgeCondition
from framework.runner.agent_file import load_agent_export, parse_agent, read_agent_file
from tests.runner.agent_kit import GOAL, chain, edge, function

FULL: dict[str, Any] = {
    "agent": {"id": "mail", "name": "Mail agent", "version": "2.0.0", "description": "Answers mail."},
    "graph": {
        "id": "mail-graph",
        "goal_id": "greet",
        "version": "2.1.0",
        "entry_node": "read",
        "entry_points": {"start": "read", "ask_resume": "send"},
        "pause_nodes": ["ask"],
        "terminal_nodes": ["send"],
        "nodes": [
            {"id": "read", "node_type": "llm_generate", "output_keys": ["topic", "urgent"], "colour": "red"},
            {"id": "route", "node_type": "router", "routes": {"urgent": "ask", "default": "send"}},
            {"id": "ask", "node_type": "human_input", "output_keys": ["answer"]},
            function("send", "answer", "sent"),
        ],
        "edges": [
            edge("read", "route", description="then decide"),
            edge("ask", "send", condition="llm_decide", priority=3, input_mapping={"answer": "reply"}),
        ],
        "max_steps": 12,
        "max_retries_per_node": 4,
        "default_model": "gpt-4o-mini",
        "max_tokens": 2048,
        "description": "Reads, asks, sends.",
        "created_at": "2026-01-02",
        "name": "The mail graph",
        "async_entry_points": [{"id": "hook", "name": "Hook", "entry_node": "read", "trigger_type": "webhook"}],
    },
    "goal": {
        **GOAL,
        "context": {"tone": "kind"},
        "input_schema": {"type": "object"},
        "output_schema": {"type": "string"},
        "constraints": [{"id": "k", "description": "Be kind."}],
    },
    "required_tools": ["search"],
    "metadata": {"by": "export"},
}


def problem_of(data: Any) -> str:
    with pytest.raises(AgentFileError) as caught:
        parse_agent(data if isinstance(data, str) else json.dumps(data), "mail/agent.json")
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, SurefootError)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("mail/agent.json")
    return text.removeprefix("mail/agent.json")


def graph_with(node: Any = None, **fields: Any) -> dict[str, Any]:
    nodes = [function("a"), *([node] if node is not None else [])]
    return {"graph": {**chain(function("a")), "nodes": nodes, **fields}, "goal": GOAL}


# --- what is understood -----------------------------------------------------------------------------------------------


def test_a_full_export_keeps_everything_it_says() -> None:
    agent = parse_agent(json.dumps(FULL))
    graph, goal = agent.graph, agent.goal
    assert graph.validate() == []
    assert agent.warnings == []
    assert agent.about["name"] == "Mail agent"
    assert (graph.id, graph.version, graph.max_steps, graph.max_retries_per_node) == ("mail-graph", "2.1.0", 12, 4)
    assert (graph.default_model, graph.max_tokens, graph.description) == ("gpt-4o-mini", 2048, "Reads, asks, sends.")
    assert graph.entry_points == {"start": "read", "ask_resume": "send"}
    assert (graph.pause_nodes, graph.terminal_nodes) == (["ask"], ["send"])
    assert graph.model_extra == {"name": "The mail graph", "created_at": "2026-01-02"}
    assert graph.nodes[0].model_extra == {"colour": "red"}
    assert graph.nodes[1].routes == {"urgent": "ask", "default": "send"}
    assert graph.nodes[2].name == "ask"
    assert graph.nodes[2].description == ""
    assert [each.condition for each in graph.edges] == [EdgeCondition.ON_SUCCESS, EdgeCondition.LLM_DECIDE]
    assert graph.edges[0].description == "then decide"
    assert (graph.edges[1].priority, graph.edges[1].input_mapping) == (3, {"answer": "reply"})
    assert graph.async_entry_points[0].trigger_type == "webhook"
    assert (goal.context, goal.input_schema, goal.output_schema) == (
        {"tone": "kind"},
        {"type": "object"},
        {"type": "string"},
    )
    assert (goal.success_criteria[0].metric, goal.success_criteria[0].target) == ("", "")
    assert (goal.constraints[0].constraint_type, goal.constraints[0].category) == ("hard", "safety")


def test_text_and_object_give_the_same_and_the_object_stays_as_it_was() -> None:
    data = copy.deepcopy(FULL)
    from_object, from_text = load_agent_export(data), load_agent_export(json.dumps(FULL))
    assert data == FULL
    assert from_object[0] == from_text[0]
    assert from_object[1].model_dump(exclude={"created_at", "updated_at"}) == from_text[1].model_dump(
        exclude={"created_at", "updated_at"}
    )


def test_what_a_graph_and_a_goal_leave_out_has_the_documented_defaults() -> None:
    graph, goal = load_agent_export({"graph": {}, "goal": {"description": "d"}})
    assert (graph.id, graph.goal_id, graph.version, graph.entry_node) == ("agent-graph", "", "1.0.0", "")
    assert (graph.max_steps, graph.max_retries_per_node, graph.nodes, graph.edges) == (100, 3, [], [])
    assert (goal.id, goal.name, goal.description) == ("agent-graph", "agent-graph", "d")
    assert load_agent_export({"graph": {"goal_id": "g"}})[1].id == "g"


def test_null_means_not_given_for_known_keys() -> None:
    node = {"id": "b", "name": None, "description": None, "input_keys": None, "system_prompt": None, "mine": None}
    graph, goal = load_agent_export(
        {
            "graph": {
                **chain(function("a")),
                "nodes": [function("a"), node],
                "edges": [edge("a", "b", condition=None, condition_expr=None, priority=None, input_mapping=None)],
                "pause_nodes": None,
                "max_steps": None,
            },
            "goal": {
                "id": None,
                "name": None,
                "success_criteria": None,
                "constraints": [{"id": "k", "description": "d", "category": None}],
            },
        }
    )
    assert graph.edges[0].condition is EdgeCondition.ON_SUCCESS
    assert (graph.nodes[1].name, graph.max_steps, graph.pause_nodes) == ("b", 100, [])
    assert graph.nodes[1].model_extra == {"mine": None}
    assert (goal.id, goal.constraints[0].category) == ("greet", "safety")


def test_the_entry_point_start_is_the_entry_when_no_entry_node_is_named() -> None:
    data = graph_with(entry_points={"start": "a"})
    del data["graph"]["entry_node"]
    assert load_agent_export(data)[0].entry_node == "a"


def test_legacy_keys_are_read_and_named_in_a_warning() -> None:
    node = {"id": "b", "type": "llm_generate", "prompt": 'Answer {"x": 1} about {topic}.'}
    agent = parse_agent(graph_with(node, edges=[edge("a", "b")]))
    assert (agent.graph.nodes[1].node_type, agent.graph.nodes[1].system_prompt) == ("llm_generate", node["prompt"])
    assert [text.partition(" ")[0] for text in agent.warnings] == ["graph.nodes[1].type", "graph.nodes[1].prompt"]
    assert "node_type" in agent.warnings[0]


def test_the_new_key_wins_over_the_legacy_one() -> None:
    node = {"id": "b", "type": "router", "node_type": "function", "prompt": "p", "system_prompt": "p"}
    agent = parse_agent(graph_with(node, edges=[edge("a", "b")]))
    assert agent.graph.nodes[1].node_type == "function"
    assert agent.warnings == ["graph.nodes[1].type is ignored, because node_type is given too; remove it"]


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        ({"edges": [edge("a", "b", condition_expr="x > 1")]}, "graph.edges[0].condition_expr is ignored"),
        ({"edges": [edge("a", "b", condition="conditional")]}, "graph.edges[0] is conditional without"),
        (
            {"edges": [edge("a", "b", condition="conditional", condition_expr="__import__('os')")]},
            "graph.edges[0].condition_expr counts as false",
        ),
        ({"parallel_groups": [["a", "b"]], "edges": [edge("a", "b")]}, "graph.parallel_groups is ignored"),
    ],
)
def test_what_probably_means_something_else_is_a_warning(change: dict[str, Any], warning: str) -> None:
    agent = parse_agent(graph_with(function("b"), **change))
    assert len(agent.warnings) == 1
    assert agent.warnings[0].startswith(warning)
    assert agent.graph.validate() == []


def test_an_unknown_node_type_runs_as_a_model_with_tools_and_is_a_warning() -> None:
    agent = parse_agent(graph_with({"id": "b", "node_type": "wizard"}, edges=[edge("a", "b")]))
    assert agent.graph.nodes[1].node_type == "wizard"
    assert "'wizard'" in agent.warnings[0]
    assert "llm_tool_use" in agent.warnings[0]


def test_a_missing_goal_is_a_warning() -> None:
    data = graph_with()
    del data["goal"]
    agent = parse_agent(data)
    assert agent.goal.id == "greet"
    assert any("no goal" in text for text in agent.warnings)


def test_a_key_given_twice_is_a_warning_with_its_place() -> None:
    agent = parse_agent('{"graph": {"id": "x", "nodes": [{"id": "a", "id": "b"}], "id": "y"}, "goal": {}}')
    assert agent.graph.id == "y"
    assert agent.graph.nodes[0].id == "b"
    assert [text for text in agent.warnings if "more than once" in text] == [
        "graph.id is given more than once; the last one counts",
        "graph.nodes[0].id is given more than once; the last one counts",
    ]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ("[]", ": expected an object with the key 'graph', found a list of 0"),
        ('"text"', ": expected an object with the key 'graph', found the text 'text'"),
        ("{}", ": the key 'graph' is missing; it holds the agent's nodes and edges"),
        ('{"graph": null}', ": graph: expected an object, found null"),
        ('{"graph": []}', ": graph: expected an object, found a list of 0"),
        ('{"graph": {}, "goal": 5}', ": goal: expected an object, found the number 5"),
        ("{\n  'graph': 1}", ":2:3: not valid JSON: Expecting property name enclosed in double quotes"),
        ("", ":1:1: not valid JSON: Expecting value"),
        ('{"graph": {"max_steps": NaN}}', ": not valid JSON: NaN is no JSON number"),
        ("[" * 100_000, ": not valid JSON: its lists and objects are nested too deeply"),
        ('{"graph": {"id": "\\ud800"}}', ": graph.id: expected a text of valid Unicode, found half a character"),
        ('{"graph": {"\\udfff": 1}}', "expected a text of valid Unicode, found half a character"),
    ],
)
def test_a_file_that_is_no_agent_is_refused_in_one_line(data: str, problem: str) -> None:
    assert problem in problem_of(data)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (graph_with(nodes=5), "graph.nodes: expected a list, found the number 5"),
        (graph_with(nodes={"a": {}}), "graph.nodes: expected a list, found an object"),
        (graph_with("b"), "graph.nodes[1]: expected an object, found the text 'b'"),
        (graph_with({"name": "b"}), "graph.nodes[1].id: this key is missing"),
        (graph_with({"id": None}), "graph.nodes[1].id: this key is missing"),
        (graph_with({"id": 7}), "graph.nodes[1].id: expected a text, found the number 7"),
        (graph_with({"id": "b", "type": 7}), "graph.nodes[1].type: expected a text, found the number 7"),
        (graph_with({"id": "b", "prompt": []}), "graph.nodes[1].prompt: expected a text, found a list of 0"),
        (graph_with({"id": "b", "input_keys": "x"}), "graph.nodes[1].input_keys: expected a list, found the text 'x'"),
        (graph_with({"id": "b", "input_keys": [True]}), "graph.nodes[1].input_keys[0]: expected a text, found true"),
        (graph_with({"id": "b", "routes": ["c"]}), "graph.nodes[1].routes: expected an object, found a list of 1"),
        (graph_with({"id": "b", "max_retries": "few"}), "graph.nodes[1].max_retries: expected a whole number, found"),
        (graph_with(edges=[{"id": "e", "source": "a"}]), "graph.edges[0].target: this key is missing"),
        (
            graph_with(edges=[edge("a", "b", condition="sometimes")]),
            "graph.edges[0].condition: expected one of always, on_success, on_failure, conditional, llm_decide, "
            "found the text 'sometimes'",
        ),
        (graph_with(entry_points=["a"]), "graph.entry_points: expected an object, found a list of 1"),
        (graph_with(entry_points={"start": 1}), "graph.entry_points.start: expected a text, found the number 1"),
        (graph_with(async_entry_points=[{"id": "h"}]), "graph.async_entry_points[0].entry_node: this key is missing"),
        (
            {**graph_with(), "goal": {"success_criteria": [{"id": "c"}]}},
            "goal.success_criteria[0].description: this key is missing",
        ),
        (
            {**graph_with(), "goal": {"success_criteria": [{"id": "c", "description": "d", "weight": 3}]}},
            "goal.success_criteria[0].weight: expected less than or equal to 1, found the number 3",
        ),
        ({**graph_with(), "goal": {"context": "kind"}}, "goal.context: expected an object, found the text 'kind'"),
    ],
)
def test_a_wrong_value_is_refused_with_its_place_what_was_expected_and_what_was_found(data: Any, problem: str) -> None:
    assert problem_of(data).startswith(f": {problem}")


def test_all_problems_are_known_and_the_first_five_shown() -> None:
    with pytest.raises(AgentFileError) as caught:
        parse_agent({"graph": {"nodes": [{"id": number} for number in range(6)]}, "goal": {"name": 1}})
    assert len(caught.value.problems) == 7
    assert str(caught.value).endswith("; and 2 more")


# --- the file ---------------------------------------------------------------------------------------------------------


def test_a_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "agent.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(FULL).encode())
    assert read_agent_file(tmp_path).graph.id == "mail-graph"


def test_a_file_that_is_no_utf8_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "agent.json").write_bytes(b'{"graph":\n{"id": "gr\xfc\xdfe"}}')
    with pytest.raises(AgentFileError, match=r"agent\.json:2: the file is not UTF-8"):
        read_agent_file(tmp_path)


def test_a_folder_without_an_agent_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file agent\.json"):
        read_agent_file(tmp_path)
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        read_agent_file(tmp_path / "nowhere")
    with pytest.raises(SurefootError):
        read_agent_file(tmp_path)


def test_an_agent_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "agent.json").mkdir()
    with pytest.raises(AgentFileError, match="cannot be read"):
        read_agent_file(tmp_path)


# --- any input --------------------------------------------------------------------------------------------------------

_texts = st.text(st.characters(exclude_categories=()), max_size=8)
_keys = (
    st.sampled_from(
        "graph goal agent nodes edges id source target condition condition_expr routes type prompt node_type name "
        "model_config entry_node entry_points input_keys __class__ validate description success_criteria "
        "async_entry_points".split()
    )
    | _texts
)
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _texts | _keys,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_keys, inner, max_size=5),
    max_leaves=25,
)


def loads_or_is_refused(data: Any) -> None:
    try:
        graph, goal = load_agent_export(data)
    except AgentFileError as error:
        assert error.problems
        assert "\n" not in str(error)
        str(error).encode()
    else:
        assert isinstance(graph.validate(), list)
        goal.to_prompt_context()


@settings(deadline=None)
@given(_json)
def test_any_json_loads_or_is_refused(value: Any) -> None:
    loads_or_is_refused(json.dumps(value))


@settings(deadline=None)
@given(_json, _json)
def test_any_graph_and_goal_load_or_are_refused(graph: Any, goal: Any) -> None:
    loads_or_is_refused({"graph": graph, "goal": goal})


@settings(deadline=None)
@given(st.text())
@example('{"graph": ' + "1" * 5000 + "}")
def test_any_text_loads_or_is_refused(text: str) -> None:
    loads_or_is_refused(text)


def places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(found for key, part in inner for found in places(part, (*place, key)))]


@settings(deadline=None)
@given(st.sampled_from(places(FULL)[1:]), _json)
def test_a_good_agent_with_any_one_value_changed_loads_or_is_refused(place: tuple[Any, ...], value: Any) -> None:
    data = copy.deepcopy(FULL)
    holder: Any = data
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    loads_or_is_refused(json.dumps(data))
