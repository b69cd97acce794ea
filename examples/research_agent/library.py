"""The agent's sources: a small library of documents, and the two tools that search and read it. No network."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

from framework.llm.provider import Tool, ToolResult, ToolUse


@dataclass(frozen=True, slots=True)
class Document:
    """One source. ``longest_m`` is the longest span it speaks of; ``facts`` is what a reader takes from it."""

    id: str
    title: str
    topic: str
    longest_m: int
    carries_rail: bool
    facts: str


DOCUMENTS = (
    Document("G1", "Rio-Niteroi Bridge", "girder span", 300, False, "Steel box girder, main span 300 m, opened 1974."),
    Document("G2", "Stolma Bridge", "girder span", 301, False, "Concrete box girder, main span 301 m, opened 1998."),
    Document("A1", "Sydney Harbour Bridge", "arch span", 503, True, "Steel arch, span 503 m, carries trains; 1932."),
    Document("A2", "Bayonne Bridge", "arch span", 510, False, "Steel arch, span about 510 m, opened 1931."),
    Document("C1", "Tilikum Crossing", "cable_stayed span", 238, True, "Main span 238 m, trams and buses, 2015."),
    Document("C2", "Oresund Bridge", "cable_stayed span", 490, True, "Main span 490 m, carries road and rail, 2000."),
    Document("S1", "Golden Gate Bridge", "suspension span", 1280, False, "Main span 1,280 m, road only, 1937."),
    Document("S2", "25 de Abril Bridge", "suspension span", 1013, True, "Span 1,013 m; stiffened to carry trains."),
    Document("M1", "Inspecting stay cables", "cable_stayed upkeep", 0, False, "Stays can be replaced one at a time."),
    Document("M2", "Painting steel arches", "arch upkeep", 0, False, "Steel arches are repainted again and again."),
)
_BY_ID = {document.id: document for document in DOCUMENTS}

_TEXT = {"type": "string"}
TOOLS = [
    Tool("search_library", "Ids of the documents on a topic", {"type": "object", "properties": {"topic": _TEXT}}),
    Tool("read_document", "One document by its id", {"type": "object", "properties": {"id": _TEXT}}),
]


def call_tool(use: ToolUse, *, seconds: float = 0.0) -> ToolResult:
    """Run one of ``TOOLS``; it takes ``seconds``."""
    time.sleep(seconds)
    if use.name == "search_library":
        found = [document.id for document in DOCUMENTS if document.topic == use.input["topic"]]
        return ToolResult(use.id, json.dumps(found))
    document = _BY_ID.get(str(use.input.get("id")))
    if use.name != "read_document" or document is None:
        return ToolResult(use.id, f"There is no tool {use.name!r}, or no document for {use.input}.", is_error=True)
    facts = {
        "id": document.id,
        "title": document.title,
        "longest_m": document.longest_m,
        "carries_rail": document.carries_rail,
        "facts": document.facts,
    }
    return ToolResult(use.id, json.dumps(facts))
