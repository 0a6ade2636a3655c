"""The result of a check for people (a table, Markdown) and for CI servers (JUnit XML)."""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.etree import ElementTree as Xml

from rich.markup import escape
from rich.table import Table

from diffpress.compress.verdict import number, with_interval

if TYPE_CHECKING:
    from diffpress.compress.check import CheckResult
    from diffpress.compress.report import Finding, Outcome

_COLORS: dict[Outcome, str] = {"pass": "green", "fail": "red", "undecided": "yellow", "not gated": "dim"}
_SUITE = "diffpress check"


def table(result: CheckResult) -> Table:
    """One row for each criterion, and the verdict below."""
    rows = Table(
        "criterion", "found", "allowed", "verdict", title=escape(f"{result.candidate} against {result.baseline}")
    )
    for item in result.findings:
        rows.add_row(item.name, escape(_found(item)), number(item.limit), f"[{_COLORS[item.outcome]}]{item.outcome}")
    rows.caption = result.sentence
    return rows


def markdown(result: CheckResult) -> str:
    """A summary for a pull request."""
    lines = [
        f"### diffpress check: {result.outcome}",
        "",
        f"{result.sentence}.",
        "",
        "| criterion | found | allowed | verdict |",
        "|---|---:|---:|---|",
    ]
    for item in result.findings:
        lines.append(f"| {item.name} | {_found(item)} | {number(item.limit)} | **{item.outcome}** |")
    return "\n".join([*lines, "", "Intervals in parentheses; decided by the interval's ends.", ""])


def _found(item: Finding) -> str:
    """The figure, or why there is none."""
    return item.sentence if item.found is None else with_interval(item.found)


def markdown_error(error: Exception) -> str:
    """The same of a check that could not be made."""
    return f"### diffpress check: not made\n\n{error}\n"


def junit(result: CheckResult, *, strict: bool) -> str:
    """JUnit XML: one test case for each criterion; an undecided one is skipped, or with ``strict`` a failure."""
    cases = []
    for item in result.findings:
        case = Xml.Element("testcase", classname=_SUITE, name=item.name)
        if item.outcome == "fail" or (strict and item.outcome == "undecided"):
            Xml.SubElement(case, "failure", message=item.sentence)
        elif item.outcome == "undecided":
            Xml.SubElement(case, "skipped", message=f"undecided: {item.sentence}")
        else:
            Xml.SubElement(case, "system-out").text = item.sentence
        cases.append(case)
    return _suite(cases)


def junit_error(error: Exception) -> str:
    """JUnit XML of a check that could not be made."""
    case = Xml.Element("testcase", classname=_SUITE, name="comparable")
    Xml.SubElement(case, "error", message=str(error), type=type(error).__name__)
    return _suite([case])


def _suite(cases: list[Xml.Element]) -> str:
    count = {kind: str(sum(case.find(kind) is not None for case in cases)) for kind in ("failure", "error", "skipped")}
    suite = Xml.Element(
        "testsuite",
        name=_SUITE,
        tests=str(len(cases)),
        failures=count["failure"],
        errors=count["error"],
        skipped=count["skipped"],
    )
    suite.extend(cases)
    Xml.indent(suite)
    return Xml.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"
