"""Tables and progress on a terminal: with rich where it is installed, as plain text where it is not."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence

try:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Table

    HAS_RICH = True
except ImportError:
    HAS_RICH = False

Rows = Sequence[Sequence[str]]


def markdown(columns: Sequence[str], rows: Rows, left: int = 1) -> str:
    """A Markdown table whose columns line up as text too; the first `left` columns are aligned to the left."""
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        padded = (c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return "| " + " | ".join(padded) + " |"

    rule = "|".join("-" * (w + 2) if i < left else "-" * (w + 1) + ":" for i, w in enumerate(widths))
    return "\n".join([line(columns), f"|{rule}|", *map(line, rows)])


def print_table(title: str, columns: Sequence[str], rows: Rows, caption: str = "", left: int = 1) -> None:
    """Print a table; the first `left` columns are aligned to the left."""
    if not HAS_RICH:
        print(f"\n{title}\n{markdown(columns, rows, left)}\n{caption}")
        return
    table = Table(title=title, caption=caption or None, title_justify="left", caption_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console() if sys.stdout.isatty() else Console(width=max(80, 20 * len(columns)))
    console.print(table, markup=False)


def fits(columns: Sequence[str], rows: Rows) -> bool:
    """Whether the table fits on the terminal; a file or a pipe has room for all."""
    return (
        not sys.stdout.isatty() or len(markdown(columns, rows).partition("\n")[0]) <= shutil.get_terminal_size().columns
    )


def warn(line: str) -> None:
    """One line about what could not be done, on stderr."""
    print(line.replace("\n", " "), file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[str, int], None]]:
    """A progress bar with the time that remains; yields ``update(what is being done, how many are done)``."""
    if not HAS_RICH or not sys.stderr.isatty():
        start = time.perf_counter()

        def line(description: str, done: int) -> None:
            warn(f"[{done}/{total}, {time.perf_counter() - start:.0f} s] {description}")

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda description, done: bar.update(task, description=description, completed=done)
