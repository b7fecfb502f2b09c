"""Say at the end of a run what was not tested, and why."""

from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line for the tests of the site that wait for a browser."""
    skipped = terminalreporter.stats.get("skipped", [])
    waiting = [report for report in skipped if "no Chromium" in str(report.longrepr)]
    if waiting:
        terminalreporter.write_line(
            f"{len(waiting)} tests of the site in a browser were skipped: there is no Chromium "
            "(on Debian: apt-get install chromium)"
        )
