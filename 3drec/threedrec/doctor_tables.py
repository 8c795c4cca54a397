"""How ``3drec doctor`` shows its report: tables on a terminal, plain lines elsewhere and without ``rich``."""

import sys
from collections.abc import Callable, Iterable

from nvsadapter_guidance.weight_files import WEIGHT_SETS
from threedrec.doctor import OK, Report


def show(report: Report) -> None:
    """Print the report as tables, or as plain lines without ``rich``."""
    for title, rows in _sections(report):
        _table(title, rows)
    for problem in report.problems:
        sys.stdout.write(f"problem: {problem}\n")


def _sections(report: Report) -> Iterable[tuple[str, list[tuple[str, str, str]]]]:
    yield "machine", [(name, value, "") for name, value in report.system.items()]
    kinds: dict[str, list[tuple[str, str, str]]] = {"packages": [], "extras": [], "backends": []}
    for package in report.packages:
        state = package.state if package.state != OK else package.purpose
        kind = {"required": "packages", "backend": "backends"}.get(package.group, "extras")
        name = f"{package.name} [{package.group}]" if kind == "extras" else package.name
        kinds[kind].append((name, package.version or "-", state))
    yield from kinds.items()
    yield (
        "weights",
        [("embedded model", "here", "")]
        + [
            (
                weight["name"],
                "here" if weight["path"] else "partly here" if weight["partial"] else "-",
                weight["path"] or f"missing: 3drec weights download {_short_name(weight['name'])}",
            )
            for weight in report.weights
        ],
    )
    if report.choice:
        yield "a run would use", [(name, value, "") for name, value in report.choice.items()]


def _short_name(file: str) -> str:
    """What to say to ``3drec weights download`` for a file: the set that it belongs to, or its name."""
    return next((name for name, files in WEIGHT_SETS.items() if file in files), file)


def _table(title: str, rows: list[tuple[str, str, str]]) -> None:
    printer: Callable[[str, list[tuple[str, str, str]]], None] = _plain_table
    if sys.stdout.isatty():
        try:
            import rich  # noqa: F401

            printer = _rich_table
        except ImportError:
            pass
    printer(title, rows)


def _plain_table(title: str, rows: list[tuple[str, str, str]]) -> None:
    width = max(len(row[0]) for row in rows)
    sys.stdout.write(f"{title}\n")
    for name, value, note in rows:
        sys.stdout.write(f"  {name:<{width}}  {value}{f'  {note}' if note else ''}\n")


def _rich_table(title: str, rows: list[tuple[str, str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False)
    for column in ("cyan", "", "yellow"):
        table.add_column(style=column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)
