"""The Python files of an agent's folder: what they may define, how they import each other, how they fail."""

from __future__ import annotations

import asyncio
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from framework import _secrets
from framework.errors import AgentFileError
from framework.llm.provider import Tool, ToolUse
from framework.llm.scripted import ScriptedLLM
from framework.runner import AgentRunner, node_function
from framework.runner.folder_code import load_modules
from framework.storage import codec
from tests.runner.agent_kit import chain, function, write_agent

ONE = chain(function("only", "", "value"))
CORE = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


async def value_of(folder: Path) -> Any:
    async with AgentRunner.load(folder) as runner:
        result = await runner.run()
    assert result.success, result.error
    return result.output["value"]


@pytest.mark.parametrize(
    "statement",
    ["from helpers import value", "from .helpers import value", "import helpers\nvalue = helpers.value"],
)
async def test_the_files_of_a_folder_import_each_other(tmp_path: Path, statement: str) -> None:
    nodes = f"{statement}\nNODES = {{'only': lambda: value()}}\n"
    helpers = "from deeper import number\n\ndef value():\n    return number\n"
    folder = write_agent(tmp_path / "a", ONE, nodes=nodes, helpers=helpers, deeper="number = 7\n")
    assert await value_of(folder) == 7
    assert "helpers" not in sys.modules
    assert "deeper" not in sys.modules
    assert str(folder) not in sys.path


async def test_a_package_in_the_folder_is_imported_too(tmp_path: Path) -> None:
    nodes = "from inner.part import number\nimport inner.part\nNODES = {'only': lambda: inner.part.number + number}\n"
    folder = write_agent(tmp_path / "a", ONE, nodes=nodes)
    write_agent(folder / "inner", ONE, __init__="", part="number = 4\n")
    assert await value_of(folder) == 8
    assert not [name for name in sys.modules if name.partition(".")[0] == "inner"]


async def test_two_agents_with_the_same_file_names_do_not_meet(tmp_path: Path) -> None:
    nodes = "from helpers import Value\nfrom framework.storage import codec\ncodec.register(Value)\n"
    nodes += "NODES = {'only': lambda: Value(1)}\n"
    helpers = "import dataclasses\n\n@dataclasses.dataclass\nclass Value:\n    number: int\n    of = '%s'\n"
    folders = [
        write_agent(tmp_path / place / "a", ONE, nodes=nodes, helpers=helpers % place) for place in ("one", "two")
    ]
    values = [await value_of(folder) for folder in folders]
    assert [value.of for value in values] == ["one", "two"]
    restored = [codec.decode(codec.encode(value)) for value in values]
    assert [type(value) for value in restored] == [type(value) for value in values]


async def test_a_module_of_the_program_with_the_same_name_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "helpers_of_all.py").write_text("number = 1\n")
    import helpers_of_all  # type: ignore[import-not-found]

    spec = helpers_of_all.__spec__

    nodes = "from helpers_of_all import number\nNODES = {'only': lambda: number}\n"
    folder = write_agent(tmp_path / "a", ONE, nodes=nodes, helpers_of_all="number = 2\n")
    assert await value_of(folder) == 2
    assert sys.modules["helpers_of_all"] is helpers_of_all
    assert helpers_of_all.number == 1
    assert helpers_of_all.__spec__ is spec


async def test_a_late_relative_import_works(tmp_path: Path) -> None:
    nodes = "def only():\n    from .helpers import number\n    return number\n\nNODES = {'only': only}\n"
    folder = write_agent(tmp_path / "a", ONE, nodes=nodes, helpers="number = 3\n")
    assert await value_of(folder) == 3


async def test_each_load_runs_the_files_anew(tmp_path: Path) -> None:
    nodes = "from helpers import number\nNODES = {'only': lambda: number}\n"
    folder = write_agent(tmp_path / "a", ONE, nodes=nodes, helpers="number = 1\n")
    assert await value_of(folder) == 1
    (folder / "helpers.py").write_text("number = 1 + 1\n")
    assert await value_of(folder) == 2


def test_a_module_keeps_a_name_that_does_not_tell_where_the_folder_is(tmp_path: Path) -> None:
    """Stores name registered types by their module: a deployment to another path must find them again."""
    code = "import sys; from pathlib import Path; from framework.runner.folder_code import load_modules\n"
    code += "print(load_modules(Path(sys.argv[1]), ['nodes'])['nodes'].__name__)"
    names = set()
    for place in ("one", "two"):
        folder = write_agent(tmp_path / place / "my-agent", ONE, nodes="")
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder)], cwd=CORE, capture_output=True, text=True, check=True
        )
        names.add(done.stdout.strip())
    assert names == {"surefoot_agent_my_agent.nodes"}


async def test_tools_py_may_define_nodes_and_runs_once(tmp_path: Path) -> None:
    tools = (
        "from pathlib import Path\nfrom framework.runner import node_function, tool\n"
        "with open(Path(__file__).with_name('loads'), 'a') as loads: loads.write('x')\n"
        "@tool\ndef search(text: str) -> str:\n    return text\n"
        "@node_function('only')\ndef only():\n    return search('found')\n"
    )
    folder = write_agent(tmp_path / "a", ONE, tools=tools)
    async with AgentRunner.load(folder) as runner:
        assert runner.tool_registry.get_registered_names() == ["search"]
        assert (await runner.run()).output["value"] == "found"
    assert (folder / "loads").read_text() == "x"


async def test_a_node_object_in_nodes_is_used(tmp_path: Path) -> None:
    nodes = (
        "from framework.graph import NodeResult\n\nclass Only:\n    async def execute(self, ctx):\n"
        "        return NodeResult(True, {'value': ctx.node_id})\n"
        "    def validate_input(self, ctx):\n        return []\n"
        "\nNODES = {'only': Only()}\n"
    )
    assert await value_of(write_agent(tmp_path / "a", ONE, nodes=nodes)) == "only"


async def test_the_same_function_seen_in_both_files_is_one(tmp_path: Path) -> None:
    nodes = "from framework.runner import node_function\n@node_function()\ndef only():\n    return 5\n"
    folder = write_agent(tmp_path / "a", ONE, nodes=nodes, tools="from nodes import only\n")
    assert await value_of(folder) == 5


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"nodes": "x = 1\n\nraise RuntimeError('no luck')\n"}, r"nodes\.py:3: RuntimeError: no luck$"),
        ({"nodes": "def f(:\n"}, r"nodes\.py:1: SyntaxError: "),
        ({"nodes": "import sys\nsys.exit(3)\n"}, r"nodes\.py:2: SystemExit: 3$"),
        ({"nodes": "import no_such_thing\n"}, r"nodes\.py:1: ModuleNotFoundError: No module named 'no_such_thing'"),
        ({"nodes": "import helpers\n", "helpers": "\n1 / 0\n"}, r"helpers\.py:2: ZeroDivisionError: division by zero$"),
        ({"tools": "1 / 0\n"}, r"tools\.py:1: ZeroDivisionError"),
        ({"nodes": "NODES = [1]\n"}, r"nodes\.py: NODES is a dict of node id -> function or node object, not a list$"),
        ({"nodes": "NODES = {1: print}\n"}, r"NODES has the key 1; node ids are texts$"),
        ({"nodes": "NODES = {'only': 5}\n"}, r"NODES\['only'\] is a function or an object .*, not a int$"),
        ({"nodes": "NODES = {'only': dict}\n"}, r"not the class dict; write dict\(\.\.\.\)$"),
        (
            {
                "nodes": "from framework.runner import node_function\n@node_function('only')\ndef f(): pass\n"
                "@node_function('only')\ndef g(): pass\n"
            },
            r"nodes\.py: node 'only' has two functions; keep one of them$",
        ),
        (
            {"nodes": "NODES = {'only': print}\n", "tools": "NODES = {'only': repr}\n"},
            r"nodes\.py: node 'only' has a function in .*tools\.py already; keep one$",
        ),
        (
            {"nodes": "from framework.runner import node_function\n@node_function\ndef f(): pass\n"},
            r"nodes\.py:2: TypeError",
        ),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line_with_its_place(
    tmp_path: Path, files: dict[str, str], problem: str
) -> None:
    folder = write_agent(tmp_path / "a", ONE, **files)
    with pytest.raises(AgentFileError, match=problem) as caught:
        AgentRunner.load(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_secret_in_an_exception_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAIL_API_KEY", "hunter2-hunter2")
    nodes = "import os\nraise RuntimeError('refused: ' + os.environ['MAIL_API_KEY'])\n"
    with pytest.raises(AgentFileError, match=r"refused: \*\*\*"):
        AgentRunner.load(write_agent(tmp_path / "a", ONE, nodes=nodes))
    _secrets.forget_secrets()


def test_a_failed_load_leaves_imports_as_they_were(tmp_path: Path) -> None:
    folder = write_agent(tmp_path / "a", ONE, nodes="import helpers\n1 / 0\n", helpers="")
    before = list(sys.meta_path)
    with pytest.raises(AgentFileError):
        AgentRunner.load(folder)
    assert sys.meta_path == before
    assert "helpers" not in sys.modules


def test_files_that_are_not_there_are_no_modules(tmp_path: Path) -> None:
    assert load_modules(tmp_path, ["nodes", "tools"]) == {}


def test_a_marked_function_stays_what_it_was() -> None:
    @node_function("a", "b")
    @node_function()
    def double(number: int) -> int:
        return 2 * number

    assert double(4) == 8
    with pytest.raises(TypeError, match="with brackets"):
        node_function(double)  # type: ignore[arg-type]


async def test_the_tools_of_a_real_mcp_server_are_there_at_the_first_run(tmp_path: Path) -> None:
    def script(messages: list[Any], system: str | None, tools: list[Tool]) -> Any:
        assert [tool.name for tool in tools] == ["add"]
        if len(messages) == 1:
            return ToolUse("1", "add", {"a": 2, "b": 3})
        return messages[-1]["content"][0]["content"]

    node = {"id": "only", "node_type": "llm_tool_use", "tools": ["add"], "output_keys": ["value"]}
    folder = write_agent(tmp_path / "a", chain(node))
    program = str(Path(__file__).with_name("mcp_server_program.py"))
    server = {
        "name": "tests",
        "transport": "stdio",
        "command": sys.executable,
        "args": [program, "stdio"],
        "env": {"MCP_TEST_DIR": str(tmp_path)},
    }
    (folder / "mcp_servers.json").write_text(json.dumps({"servers": [server]}))
    async with AgentRunner.load(folder, llm=ScriptedLLM(script)) as runner:
        assert not runner.tool_registry.has_tool("add")
        assert runner.validate(connect=False).missing_tools == []
        results = await asyncio.gather(runner.run(), runner.run())
        assert [json.loads(result.output["value"]) for result in results] == [{"result": 5}, {"result": 5}]
        assert runner.validate().missing_tools == []
        assert not any("tests" in text for text in runner.warnings)


@pytest.mark.parametrize("statement", ["import helpers", "from helpers import number", "import helpers.deeper"])
@pytest.mark.parametrize("elsewhere", [False, True])
async def test_an_import_inside_a_function_says_what_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, statement: str, elsewhere: bool
) -> None:
    if elsewhere:  # then that would be found, and silently be the wrong one
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "helpers.py").write_text("number = 1\n")
        monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    nodes = f"def only():\n    {statement}\n\nNODES = {{'only': only}}\n"
    folder = write_agent(tmp_path / "a", ONE, nodes=nodes, helpers="number = 2\n")
    async with AgentRunner.load(folder) as runner:
        result = await runner.run()
    assert not result.success
    assert "import it at the top of the file, or write `from . import helpers`" in (result.error or "")
    assert "helpers" not in sys.modules


async def test_the_imports_it_advises_work_and_everybody_elses_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = (
        "def only():\n    import json\n    from . import helpers\n    return helpers.number\n\nNODES = {'only': only}\n"
    )
    assert (
        await value_of(write_agent(tmp_path / "a", ONE, nodes=nodes, helpers_of_mine="", helpers="number = 2\n")) == 2
    )
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "helpers_of_mine.py").write_text("number = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    assert importlib.import_module("helpers_of_mine").number == 1
    del sys.modules["helpers_of_mine"]
