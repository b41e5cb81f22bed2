"""The table of formats, made of the results of test_formats.py."""

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    rows: dict[str, dict[str, str]] = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for key, value in getattr(report, "user_properties", []):
                if key == "format":
                    rows.setdefault(value[0], {})[value[1]] = "yes" if outcome == "passed" else "NO"
    if not rows:
        return
    columns = ("loads", "equal to reference", "generates")
    terminalreporter.section("formats")
    terminalreporter.write_line(f"| format | {' | '.join(columns)} |")
    terminalreporter.write_line("| --- | --- | --- | --- |")
    for name, cells in sorted(rows.items()):
        terminalreporter.write_line(f"| {name} | {' | '.join(cells.get(c, 'not run') for c in columns)} |")
