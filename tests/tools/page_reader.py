"""An HTML page as a reader sees it."""

from __future__ import annotations

import base64
from html.parser import HTMLParser
from pathlib import Path


class Page(HTMLParser):
    """The texts, tables and pictures of a page.

    Attributes:
        references: everything that the page would fetch.
        pictures: alternative text and content.
        tables: caption and rows of texts.
        marked: texts of highlighted cells.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.pictures: list[tuple[str, bytes]] = []
        self.tables: list[tuple[str, list[list[str]]]] = []
        self.marked: set[str] = set()
        self.text = ""
        self._table, self._cell, self._caption = [], None, ""  # _cell: the class of the cell under way
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append(tag)
        self.references += [given[key] for key in ("src", "href", "srcset", "action") if key in given]
        if tag == "img":
            self.pictures.append((given["alt"], base64.b64decode(given["src"].partition(",")[2], validate=True)))
        elif tag == "table":
            self._table, self._caption = [], ""
        elif tag == "tr":
            self._table.append([])
        elif tag in ("td", "th"):
            self._table[-1].append("")
            self._cell = given["class"]
        elif tag == "caption":
            self._cell = "caption"

    def handle_endtag(self, tag):
        if tag == "table":
            self.tables.append((self._caption, self._table))
        elif tag in ("td", "th", "caption"):
            self._cell = None
        elif tag in ("p", "h1", "h2", "dt", "dd", "small", "summary", "figcaption", "title", "span"):
            self.text += "\n"

    def handle_data(self, data):
        if self._cell == "caption":
            self._caption += data
        elif self._cell is not None:
            self._table[-1][-1] += data
            if self._cell == "option":
                self.marked.add(data)
        elif self.tags[-1:] != ["style"]:
            self.text += data

    def table(self, caption: str) -> list[dict[str, str]]:
        """The rows of the tables with a caption."""
        tables = [table for name, table in self.tables if name == caption]
        return [dict(zip(head, row, strict=True)) for head, *rows in tables for row in rows]
