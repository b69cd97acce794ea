"""The researcher's own steps: plain functions, one for each function node of agent.json."""

from __future__ import annotations

import os
import re
from pathlib import Path

from framework.runner import node_function

NOTES = Path(__file__).parent / "notes"


@node_function("intake")
def intake(question: str = "", **others: object) -> str:
    """The question, if there is one."""
    if not question.strip():
        raise ValueError('Give the question as input: -i \'{"question": "..."}\'')
    return question.strip()


@node_function("check")
def check(sources: list[str]) -> list[str]:
    """What is wrong with the sources; nothing lets the report be published."""
    known = {note.stem for note in NOTES.glob("*.md")}
    return [f"There is no note {source!r}." for source in sources if source not in known]


@node_function("check_again")
def check_again(sources: list[str]) -> list[str]:
    """The same after mending; what is still wrong now stays wrong."""
    problems = check(sources)
    if problems:
        raise ValueError(" ".join(problems))
    return problems


@node_function("publish")
def publish(question: str, report: str, sources: list[str]) -> str:
    """Write the report; a second time gives the same file, so running this step again does no harm."""
    name = re.sub(r"[^a-z0-9]+", "-", question.lower()).strip("-")[:60] or "report"
    folder = Path(os.environ.get("RESEARCHER_REPORTS", "reports"))
    folder.mkdir(parents=True, exist_ok=True)
    listing = "\n".join(f"- {source}" for source in sources) or "none"
    path = folder / f"{name}.md"
    path.write_text(f"# {question}\n\n{report}\n\nSources:\n{listing}\n", encoding="utf-8")
    return str(path)
