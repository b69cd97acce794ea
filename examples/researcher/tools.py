"""The researcher's tools: a folder of notes to search and read."""

from __future__ import annotations

from pathlib import Path

from framework.runner import tool

NOTES = Path(__file__).parent / "notes"


@tool(description="Ids and titles of the notes that hold every word of the query.")
def search_notes(query: str) -> list[dict[str, str]]:
    words = {word.strip(".,?!").lower().removesuffix("s") for word in query.split() if len(word) > 3}
    found = []
    for note in sorted(NOTES.glob("*.md")):
        text = note.read_text(encoding="utf-8")
        if words and all(word in text.lower() for word in words):
            found.append({"id": note.stem, "title": text.splitlines()[0].removeprefix("# ")})
    return found


@tool(description="The text of one note.")
def read_note(id: str) -> str:
    known = {note.stem: note for note in NOTES.glob("*.md")}
    if id not in known:
        raise LookupError(f"There is no note {id!r}; there are: {', '.join(sorted(known))}.")
    return known[id].read_text(encoding="utf-8")
