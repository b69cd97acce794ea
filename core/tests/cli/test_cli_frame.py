"""The frame of the command line: help, options, errors, JSON, tables, texts, stores, and how a run is found."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from framework.errors import RunBusy, RunNotFound, SurefootError
from framework.runner.cli import stores, text
from framework.runner.cli.app import COMMANDS, end_process, surefoot
from framework.runner.cli.doctor import file_system_of
from framework.runner.cli.exits import CommandError, Exit, code_of, message_of
from framework.runner.cli.inputs import parse_pair
from framework.runner.cli.output import Column, Screen, Styled, _cut, _fit, jsonable
from framework.runner.cli.running import Loop, run_to_end
from framework.runner.cli.settings import Settings
from framework.runner.cli.shell import parse_line
from framework.schemas.run import RunState
from framework.storage.backend import open_storage
from framework.storage.memory import MemoryStorage
from framework.storage.records import Commit, NewRun
from tests.cli.cli_kit import CORE, Done, Site, plain

Here = Callable[..., Done]


# --- help and options -------------------------------------------------------------------------------------------------


def test_help_names_every_command_and_loads_nothing_that_runs_one(site: Site) -> None:
    code = "import sys; sys.argv = ['surefoot', '--help']\nfrom framework.runner.cli.app import run_command_line\n"
    code += "run_command_line()\nprint('LOADED', *sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=site.environment(),
        cwd=site.folder,
        check=True,
    )
    shown, _, loaded = done.stdout.partition("LOADED")
    for name in COMMANDS:
        assert f"\n  {name} " in shown
    assert "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 paused, 4 not found, 5 busy" in shown
    heavy = {"pydantic", "rich", "asyncio", "sqlite3", "orjson", "openai", "anthropic", "mcp", "click.testing"}
    assert not heavy & set(loaded.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_of_its_own_and_the_options_of_all(here: Here, name: str) -> None:
    done = here(name, "--help")
    assert done.code == 0
    assert done.out.startswith(f"Usage: surefoot {name}")
    assert "--storage URL" in done.out
    command = surefoot.get_command(click.Context(surefoot), name)
    assert command is not None
    assert command.help


def test_the_options_of_all_may_stand_before_or_after_the_command(here: Here, site: Site) -> None:
    before = here("-o", "json", "--storage", "sqlite:///a.db", "info", site.agent)
    after = here("info", site.agent, "-o", "json", "--storage", "sqlite:///a.db")
    both = here("-o", "json", "info", "--storage", "sqlite:///a.db", site.agent, "-v")
    assert before.code == 0
    assert before.out == after.out == both.out


def test_the_version_is_that_of_the_package(site: Site) -> None:
    done = site.call("--version")
    assert (done.code, done.out) == (0, "surefoot, version 0.1.0\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runn"], "There is no command 'runn'. Did you mean 'run' or 'runs'? See `surefoot --help`."),
        (["zzz"], "There is no command 'zzz'. See `surefoot --help`."),
        (["info"], "Missing argument 'AGENT'. See `surefoot info --help`."),
        (["info", "x", "--nope"], "No such option"),
        (["info", "x", "-o", "xml"], "'xml' is not one of 'table', 'json'"),
        (["recover", "--interval", "0"], "0.0 is not in the range"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(here: Here, words: list[str], message: str) -> None:
    done = here(*words)
    assert done.code == 2
    assert done.out == ""
    assert done.err.startswith("error: ")
    assert message in done.err
    assert len(done.err.splitlines()) == 1


def test_without_a_command_the_help_is_shown_and_the_exit_code_is_2(here: Here) -> None:
    done = here()
    assert done.code == 2
    assert "Commands:" in done.err


# --- errors -----------------------------------------------------------------------------------------------------------


def test_an_unexpected_error_is_one_line_and_with_verbose_a_traceback_both_masked(site: Site) -> None:
    site.make_agent(nodes="raise RuntimeError('key sk-very-secret-3 refused')")
    for words, variables in ((["-v"], {}), ([], {"SUREFOOT_DEBUG": "1"})):
        loud = site.call("info", site.agent, *words, THE_TOKEN="sk-very-secret-3", **variables)
        assert loud.code == 1
        assert "Traceback" in loud.err
        assert "sk-very-secret-3" not in loud.err
    quiet = site.call("info", site.agent, THE_TOKEN="sk-very-secret-3")
    assert quiet.code == 1
    assert quiet.out == ""
    assert "Traceback" not in quiet.err
    assert quiet.err.startswith("error: ")
    assert "key *** refused" in quiet.err
    assert len(quiet.err.splitlines()) == 1


def test_in_json_mode_an_error_is_the_document(here: Here) -> None:
    done = here("info", "nowhere", "-o", "json")
    assert done.code == 4
    document = done.document
    assert document["exit_code"] == 4
    assert document["error"] in done.err
    assert set(document) == {"error", "kind", "exit_code"}


def test_each_kind_of_error_has_its_exit_code_and_text() -> None:
    assert code_of(RunNotFound("r")) == Exit.NOT_FOUND
    assert code_of(RunBusy("r", "me", 1.0)) == Exit.BUSY
    assert code_of(SurefootError("x")) == Exit.FAILED
    assert code_of(CommandError("x", Exit.USAGE)) == 2
    assert (
        message_of(FileNotFoundError(2, "No such file or directory", "a.json")) == "No such file or directory: a.json"
    )
    assert message_of(ZeroDivisionError("division by zero")).startswith(
        "ZeroDivisionError: division by zero (this should"
    )
    assert message_of(KeyboardInterrupt()).startswith("KeyboardInterrupt (")


def test_warnings_of_the_log_are_shown_without_tracebacks(here: Here, site: Site) -> None:
    site.make_agent(
        nodes="import logging\ntry: 1/0\nexcept Exception: logging.getLogger('mine').exception('it broke')\n"
        "NODES = {n: (lambda **k: 1) for n in ('survey', 'build', 'hand_over')}"
    )
    done = here("validate", site.agent)
    assert done.code == 0
    assert "warning: it broke\n" in done.err
    assert "ZeroDivisionError" not in done.err
    assert "ZeroDivisionError" in here("validate", site.agent, "-v").err


def test_another_encoding_shows_escapes_and_ends_nothing(site: Site) -> None:
    words = ("run", site.agent, "-i", json.dumps({"place": "Zürich ☃", "buyer": "Ада"}))
    shown = site.call(*words, PYTHONUTF8="0", PYTHONIOENCODING="ascii", LC_ALL="C", PYTHONCOERCECLOCALE="0")
    assert shown.code == 0
    assert "\\u2603" in shown.out
    assert "✓" not in shown.out + shown.err
    answered = site.call(*words, "-q", PYTHONUTF8="0", PYTHONIOENCODING="ascii")
    assert answered.document["output"]["keys"] == "keys of house by plan of Zürich ☃ for Ада"
    assert answered.out.isascii()


# --- output -----------------------------------------------------------------------------------------------------------


def test_json_carries_every_kind_of_value() -> None:
    import datetime
    import decimal

    value = {
        "when": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
        "amount": decimal.Decimal("1.5"),
        "bytes": b"\xff",
        "set": {1},
        1: (2, float("nan")),
        "state": RunState.PAUSED,
        "object": object,
    }
    round_trip = json.loads(json.dumps(jsonable(value), allow_nan=False))
    assert round_trip["when"] == "2026-01-02T00:00:00Z"
    assert (round_trip["amount"], round_trip["set"], round_trip["1"]) == ("1.5", [1], [2, "NaN"])
    assert round_trip["state"] == "paused"
    assert "object" in round_trip["object"]


def test_an_id_is_cut_where_its_end_can_be_seen() -> None:
    name = "tenant-7/customer-onboarding-2026-000123"
    assert _cut(name, 24, "…", middle=True) == "tenant-7…ing-2026-000123"
    assert _cut(name, 24, "…") == "tenant-7/customer-onboa…"
    assert _cut(name, len(name), "…", middle=True) == name
    assert text.width_of(_cut("客户" * 20, 15, "~", middle=True)) in (14, 15)
    assert all(text.width_of(_cut(name, room, "…", middle=True)) == room for room in range(1, 40))


def test_a_table_in_a_pipe_is_whole_and_has_no_control_codes(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    columns = [Column("run"), Column("steps", right=True), Column("what", grow=True)]
    screen.table(columns, [("r1", "7", "x" * 500), ("much-longer", Styled("12", "red"), "two\nlines \x1b[31m")])
    out = capsys.readouterr().out
    assert plain(out)
    assert out.splitlines() == [
        "RUN          STEPS  WHAT",
        f"r1               7  {'x' * 500}",
        "much-longer     12  two lines \\x1b[31m",
    ]


def test_in_json_mode_lines_go_to_stderr_so_that_stdout_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen(json=True)
    screen.say("a line")
    screen.fields([("name", "value")])
    screen.document({"a": 1})
    screen.error("too late for a document")
    told = capsys.readouterr()
    assert json.loads(told.out) == {"a": 1}
    assert told.err.splitlines() == ["a line", "name  value", "error: too late for a document"]


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(0, 3), st.booleans()), min_size=1, max_size=6),
    st.integers(20, 120),
)
def test_a_table_fits_whenever_it_can(shape: list[tuple[int, int, bool]], room: int) -> None:
    columns = [Column(str(index), drop=drop, grow=grow) for index, (_, drop, grow) in enumerate(shape)]
    chosen, widths = _fit(columns, [width for width, _, _ in shape], room)
    used = sum(widths[index] for index in chosen) + 2 * (len(chosen) - 1)
    assert used <= room or all(not columns[index].drop and widths[index] <= 6 for index in chosen)
    assert chosen == sorted(chosen)
    kept = {index for index, column in enumerate(columns) if not column.drop}
    assert kept <= set(chosen)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        *((0, "0.0 s"), (0.84, "0.8 s"), (9.96, "10 s"), (59.4, "59 s"), (60, "1 min"), (200, "3 min 20 s")),
        *((3600, "1 h"), (7500, "2 h 5 min"), (90000, "1 d 1 h"), (-3, "0.0 s"), (400 * 86400, "400 d")),
    ],
)
def test_durations(seconds: float, expected: str) -> None:
    assert text.duration(seconds) == expected


def test_other_texts() -> None:
    assert [text.ago(seconds) for seconds in (0.2, 40, 120, 7200, 200000)] == [
        *("now", "40 s ago", "2 min ago", "2 h ago", "2 d ago")
    ]
    assert [text.size(count) for count in (0, 512, 1536, 3_355_443, 5 * 1024**4)] == [
        *("0 B", "512 B", "1.5 KB", "3.2 MB", "5120.0 GB")
    ]
    assert (text.money(0.00421), text.money(1234.5)) == ("$0.0042", "$1,234.50")
    assert (text.tokens(1), text.tokens(1234)) == ("1 token", "1,234 tokens")
    assert text.timestamp(0.5) == "1970-01-01T00:00:00.500Z"
    assert text.clean("a\x1b[2J\r\n\tb\u202e") == "a\\x1b[2J\n    b\\x202e"
    assert (text.width_of("abc"), text.width_of("日本"), text.width_of("e\u0301")) == (3, 4, 1)
    assert text.shortened("a  b\nc" * 100, 10).endswith("...")
    assert text.preview({"a": 1}) == '{"a": 1}'
    assert text.preview("x" * 3000, 10) == "xxxxxxxxxx... (3,000 characters)"
    assert text.command_line("surefoot", ["-i", '{"a": 1}']) == "surefoot -i '{\"a\": 1}'"


@given(st.text())
def test_no_text_keeps_a_control_character(given_text: str) -> None:
    assert not any(
        (ord(char) < 32 and char != "\n") or 127 <= ord(char) < 160 or char in "\u202e\u2066\u2028"
        for char in text.clean(given_text)
    )


# --- what users type --------------------------------------------------------------------------------------------------


def test_a_pair_is_json_or_a_text() -> None:
    assert parse_pair("a=1", "--set") == ("a", 1)
    assert parse_pair("a=null", "--set") == ("a", None)
    assert parse_pair("a=two words=x", "--set") == ("a", "two words=x")
    assert parse_pair('a={"b": [1]}', "--set") == ("a", {"b": [1]})
    for wrong in ("a", "=1", "a={b}", 'a="b'):
        with pytest.raises(CommandError) as caught:
            parse_pair(wrong, "--set")
        assert caught.value.code == Exit.USAGE


def test_a_line_of_the_shell_is_json_pairs_or_text() -> None:
    assert parse_line('{"a": 1}', "key") == {"a": 1}
    assert parse_line("a=1 b='two words'", "key") == {"a": 1, "b": "two words"}
    assert parse_line("what is 1+1=2?", "key") == {"key": "what is 1+1=2?"}
    assert parse_line("it's so", "key") == {"key": "it's so"}


# --- stores and runs --------------------------------------------------------------------------------------------------


def store_with(*runs: tuple[str, RunState], parent: str | None = None) -> MemoryStorage:
    storage = MemoryStorage()
    for run_id, state in runs:
        storage.open_run(
            NewRun(run_id, "graph", "g", "f", b"{}", b"", parent_run_id=parent), "elsewhere/1/2/3/4/5", 60.0
        )
        if state is not RunState.RUNNING:
            refused = storage.commit([Commit(run_id, 1, 1, b"[]", state=state, release=True)])
            assert refused == [None]
    return storage


def test_a_run_is_found_by_id_beginning_or_latest() -> None:
    storage = store_with(("order-1", RunState.PAUSED), ("order-12", RunState.COMPLETED), ("other", RunState.COMPLETED))
    assert stores.find_run(storage, "order-1").run_id == "order-1"  # a whole id, though it also begins another
    assert stores.find_run(storage, "oth").run_id == "other"
    assert stores.find_run(storage, "latest").run_id == "other"
    assert stores.find_run(storage, "latest", latest=stores.RESUMABLE).run_id == "order-1"
    for given_id, code, message in [
        ("ord", Exit.USAGE, "is the beginning of 2 run ids"),
        ("odrer-1", Exit.NOT_FOUND, "Did you mean order-1"),
        ("latst", Exit.NOT_FOUND, "Did you mean latest"),
        ("zzzzzz", Exit.NOT_FOUND, "`surefoot runs list` shows"),
    ]:
        with pytest.raises(CommandError, match=message) as caught:
            stores.find_run(storage, given_id)
        assert caught.value.code == code


def test_latest_leaves_out_parts_of_other_runs_and_says_why_there_is_none() -> None:
    with pytest.raises(CommandError, match="no runs in this store yet"):
        stores.find_run(MemoryStorage(), "latest")
    part = store_with(("part", RunState.PAUSED), parent="whole")
    with pytest.raises(CommandError):
        stores.find_run(part, "latest", latest=stores.RESUMABLE)
    running = store_with(("busy", RunState.RUNNING))
    with pytest.raises(CommandError, match="the unfinished ones are running"):
        stores.find_run(running, "latest", latest=stores.RESUMABLE)


def test_many_runs_are_read_page_by_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "_PAGE", 3)
    storage = store_with(*((f"run-{number}", RunState.COMPLETED) for number in range(10)))
    assert [run.run_id for run in stores.all_runs(storage)] == [f"run-{number}" for number in reversed(range(10))]


def test_the_store_is_the_option_then_the_variable_then_the_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("SUREFOOT_STORAGE", "sqlite:///variable.db")
    assert stores.storage_url(Settings(storage="sqlite:///option.db")) == "sqlite:///option.db"
    assert stores.storage_url(Settings()) == "sqlite:///variable.db"
    assert not stores.is_default(Settings())
    monkeypatch.delenv("SUREFOOT_STORAGE")
    assert stores.is_default(Settings())
    assert stores.file_of(stores.storage_url(Settings())) == tmp_path / "surefoot" / "runs.db"
    assert (
        stores.command_for(Settings(storage="file:///a b"), "resume", "x")
        == "surefoot resume x --storage 'file:///a b'"
    )
    with open_storage(f"sqlite:///{tmp_path / 'seen.db'}"):
        assert stores.file_of("postgresql://host/name") is None


def test_the_file_system_of_a_path_is_told() -> None:
    kind = file_system_of(CORE)
    assert kind is None or kind.isascii()
    assert file_system_of(Path("/proc")) in (None, "proc")


# --- running ----------------------------------------------------------------------------------------------------------


def test_work_can_be_run_from_another_thread_where_signals_cannot_be_handled() -> None:
    results: list[int] = []

    async def work() -> int:
        return 7

    thread = threading.Thread(target=lambda: results.append(run_to_end(work)))
    thread.start()
    thread.join()
    assert results == [7]


def test_a_loop_runs_several_works_and_raises_their_errors() -> None:
    async def fails() -> None:
        raise ValueError("mine")

    async def works() -> str:
        return "fine"

    with Loop() as loop:
        with pytest.raises(ValueError, match="mine"):
            loop.run(fails)
        assert loop.run(works) == "fine"


@pytest.mark.parametrize("code", [0, 3, 130])
def test_the_process_ends_with_the_code(code: int) -> None:
    with pytest.raises(SystemExit) as caught:
        end_process(code)
    assert caught.value.code == code
