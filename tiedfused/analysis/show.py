"""Tables that print: to a terminal through rich, and as text through `str`."""

from __future__ import annotations

import io

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table


class Shown:
    """A result with a `__rich__`; ``print(result)`` shows the same as text."""

    def __rich__(self) -> RenderableType:
        raise NotImplementedError

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=120)
        console.print(self)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        return "\n".join(line.rstrip() for line in text.rstrip().splitlines())


def table(*columns: str, title: str | None = None, text_columns: int = 1) -> Table:
    """A table whose first `text_columns` columns are text, aligned left; the others are numbers, aligned right."""
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for index, column in enumerate(columns):
        left = index < text_columns
        made.add_column(column, justify="left" if left else "right", overflow="fold" if left else "ellipsis")
    return made
