"""Counts of what the adversary tried, in the summary."""

from collections import Counter

import pytest
from adversary import Tried


@pytest.fixture
def note(record_property):
    """Record what was tried of a kind."""

    def take(kind: str, tried: Tried) -> None:
        assert tried.cases > 0
        record_property("tried", [kind, tried.cases, dict(tried.outcomes)])

    return take


def pytest_terminal_summary(terminalreporter):
    cases, outcomes = Counter(), {}
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name == "tried":
                kind, count, seen = value
                cases[kind] += count
                outcomes.setdefault(kind, Counter()).update(seen)
    if not cases:
        return
    terminalreporter.write_sep("-", f"the adversary: {sum(cases.values())} cases")
    terminalreporter.write_line("| kind | cases | how they came out |")
    terminalreporter.write_line("|---|---|---|")
    for kind in sorted(cases):
        said = ", ".join(f"{count} {outcome}" for outcome, count in outcomes[kind].most_common())
        terminalreporter.write_line(f"| {kind} | {cases[kind]:,} | {said} |")
