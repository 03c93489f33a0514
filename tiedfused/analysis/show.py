"""Tables that print: to a terminal through rich, and as text through `str`.

rich is imported where something is shown: the layer itself runs where it is not installed.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table


class Shown:
    """A result with a `__rich__`; ``print(result)`` shows the same as text."""

    def __rich__(self) -> RenderableType:
        raise NotImplementedError

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=120)
        console.print(self)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        return "\n".join(line.rstrip() for line in text.rstrip().splitlines())


def table(*columns: str, title: str | None = None, text_columns: int = 1) -> Table:
    """A table whose first `text_columns` columns are text, aligned left; the others are numbers, aligned right."""
    from rich import box
    from rich.table import Table

    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for index, column in enumerate(columns):
        left = index < text_columns
        made.add_column(column, justify="left" if left else "right", overflow="fold" if left else "ellipsis")
    return made


def group(*shown: RenderableType) -> Group:
    """One below the other."""
    from rich.console import Group

    return Group(*shown)
