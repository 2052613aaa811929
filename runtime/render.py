"""Reports, checks and the list of passes as tables for a terminal; plain text where there is none."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from ..report import Report


def print_report(report: Report) -> None:
    """The report on stdout."""
    console = _console()
    console.print(report.headline(), style="bold", markup=False)
    if rows := report.table():
        console.print(_table(rows[0], rows[1:], numbers=True))
    for line in report.remarks():
        console.print(line, markup=False)


def print_check(check: dict[str, Any]) -> None:
    """What `--check` found, on stdout."""
    console = _console()
    console.print(f"{check['name']}: {check['summary']}", style="bold", markup=False)
    if check["refused"]:
        console.print(check["refused"], markup=False)
        return
    for name, shape in check["inputs"].items():
        console.print(f"input {name}: {shape}", markup=False)
    headings = {"cuts": "tokens can leave", "rope": "RoPE", "reason": "remark"}
    sites = check["sites"]
    shown = [key for key in (sites[0] if sites else ()) if any(site[key] != "" for site in sites)]
    if shown:
        names = [headings.get(key, key) for key in shown]
        console.print(_table(names, ([str(site[key]) for key in shown] for site in sites)))
    for miss in check["near_misses"]:
        console.print(f"not taken for attention: {miss['node']}, {miss['reason']}", markup=False)
    rows = ((p["name"], "yes" if p["applies"] else "no", p["tried"], p["layers"], p["reason"]) for p in check["passes"])
    console.print(_table(("pass", "applies", "tried as", "at layers", "why not elsewhere"), rows))


def print_passes(passes: list[dict[str, Any]]) -> None:
    """The registered passes with their parameters, on stdout."""
    console = _console()
    for one in passes:
        origin = "" if one["origin"] == "tamis" else f", from {one['origin']}"
        console.print(f"{one['name']}  ({one['family']}{origin})", style="bold", markup=False)
        console.print(f"    {one['doc']}", markup=False)
        for name, default in one["parameters"].items():
            console.print(f"    {name} = {default}   {one['explained'].get(name, '')}".rstrip(), markup=False)


def _console() -> Any:
    from rich.console import Console

    # Away from a terminal nothing may be cut or wrapped: the reader is a file or another program.
    width = None if sys.stdout.isatty() else 400
    return Console(file=sys.stdout, width=width, highlight=False, soft_wrap=width is not None)


def _table(names: Iterable[str], rows: Iterable[Iterable[str]], *, numbers: bool = False) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD if sys.stdout.isatty() else None, pad_edge=False)
    for name in names:
        table.add_column(name, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table
