"""What an inspection found, as tables and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TypeVar

from rich.markup import escape
from rich.table import Table

from prism_trt.errors import PrismError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Check:
    """One thing that was checked."""

    name: str
    problem: str | None
    """What is wrong, in one sentence; None when it passed."""


@dataclass
class Report:
    """What one path is."""

    path: str
    kind: str
    facts: dict[str, str] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Every check passed."""
        return all(check.problem is None for check in self.checks)

    def check(self, name: str, examine: Callable[[], Result]) -> Result | None:
        """Run `examine` as the check `name`; a `PrismError` fails it. Returns its result, None when it failed."""
        try:
            result = examine()
        except PrismError as error:
            self.checks.append(Check(name, str(error)))
            return None
        self.checks.append(Check(name, None))
        return result


def require(condition: bool, problem: str) -> None:
    """Raise `problem` as a `PrismError` unless `condition` holds."""
    if not condition:
        raise PrismError(problem)


def to_json(report: Report) -> str:
    """`report` as indented JSON."""
    return json.dumps({**asdict(report), "sound": report.sound}, indent=2)


def to_tables(report: Report) -> list[Table]:
    """Tables of the facts and of the checks."""
    verdict = "[green]sound[/]" if report.sound else "[red]NOT sound[/]"
    facts = Table("", "", title=f"{escape(report.path)}: {report.kind}, {verdict}", show_header=False)
    for name, value in report.facts.items():
        facts.add_row(name, escape(value))
    checks = Table("check", "result")
    for check in report.checks:
        checks.add_row(check.name, "[green]ok[/]" if check.problem is None else f"[red]{escape(check.problem)}[/]")
    return [facts, checks]
