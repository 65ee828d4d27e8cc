"""A plugin for pytest, `-p tests.cpu_seconds`: at the end, the CPU seconds of each file, with those of what it started.

Unlike the seconds on the clock they hardly depend on what else the machine does.
"""

import os
from collections import Counter
from multiprocessing import forkserver

import psutil
import pytest


def spent() -> float:
    """By this process, by the fork server of its commands, and by the children of both that have ended."""
    processes = [os.getpid(), forkserver._forkserver._forkserver_pid]
    return sum(sum(psutil.Process(pid).cpu_times()[:4]) for pid in processes if pid)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    before, item.cpu_seconds = item.cpu_seconds, spent()
    report.cpu_seconds = item.cpu_seconds - before
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    item.cpu_seconds = spent()
    return (yield)


def pytest_terminal_summary(terminalreporter):
    files = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            files[getattr(report, "nodeid", "").partition("::")[0]] += getattr(report, "cpu_seconds", 0.0)
    terminalreporter.section("CPU seconds by file")
    for file, seconds in files.most_common():
        terminalreporter.write_line(f"{seconds:8.1f} {file}")
    terminalreporter.write_line(f"{files.total():8.1f} in all")
