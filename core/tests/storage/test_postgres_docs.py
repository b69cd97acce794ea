"""What the guide to PostgreSQL shows is so: its program runs, with the tests' server in the place of the example's."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

from framework.storage.postgres_address import _OPTIONS, parse
from tests.postgres_server import PostgresServer

EXAMPLE = "postgresql://agents:secret@db.example:5432/agents"
PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "postgresql.md"


def test_the_guide_runs(postgres: PostgresServer) -> None:
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", text, re.DOTALL)
    blocks = [(code, printed) for code, printed in blocks if EXAMPLE in code]  # test_docs.py runs the others
    assert blocks
    for code, printed in blocks:
        url = postgres.new_database()
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(code.replace(EXAMPLE, url), {})  # noqa: S102 - our own page
        shown = said.getvalue().replace(parse(url).shown, "postgresql://agents@db.example:5432/agents")
        assert shown == printed


def test_the_guide_names_every_option() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for option in _OPTIONS:
        assert f"| `{option}` |" in text
    for url in re.findall(r"^postgresql://\S+$", text, re.MULTILINE):
        parse(url)
