# SPDX-License-Identifier: BSD-3-Clause
"""Tests marked `interpreted` run under Triton's interpreter, each module in a child process of its own.

The interpreter has to be chosen before Triton is imported, while other tests of this tier compile kernels. The child
sends the reports of its tests as they come, so that here they look like any other.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

PIPE = "PYTEST_REPORT_PIPE"  # environment variable: the file descriptor that takes a child's reports, as JSON
CHILDREN = pytest.StashKey[dict[Path, "Child"]]()


class Child:
    """A pytest process over the interpreted tests of one module."""

    def __init__(self, config: pytest.Config, node_ids: list[str]) -> None:
        self.config = config
        self.reports: dict[str, list[pytest.TestReport]] = defaultdict(list)
        read, write = os.pipe()
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
        self.process = subprocess.Popen(
            [*command, *node_ids],
            cwd=config.rootpath,
            env=os.environ | {"TRITON_INTERPRET": "1", PIPE: str(write)},
            pass_fds=[write],
            stdout=subprocess.DEVNULL,
        )
        os.close(write)
        self.pipe = os.fdopen(read)

    def run(self, item: pytest.Item) -> list[pytest.TestReport]:
        """The reports of one test; a failed one if the process ended without it."""
        reports = self.reports[item.nodeid]
        while not any(report.when == "teardown" for report in reports):
            line = self.pipe.readline()
            if not line:
                reason = f"the interpreting process ended with exit code {self.process.wait()} before this test did"
                return [pytest.TestReport(item.nodeid, item.location, {}, "failed", reason, "call")]
            report = self.config.hook.pytest_report_from_serializable(config=self.config, data=json.loads(line))
            if isinstance(report.longrepr, list):  # JSON has no tuples
                report.longrepr = tuple(report.longrepr)
            self.reports[report.nodeid].append(report)
        return reports


def pytest_configure(config: pytest.Config) -> None:
    config.stash[CHILDREN] = {}
    if PIPE in os.environ:
        config.pluginmanager.register(Reporter(config, int(os.environ.pop(PIPE))))


def pytest_sessionstart() -> None:
    if _interpreting():
        _patch_once_per_launch()


def pytest_unconfigure(config: pytest.Config) -> None:
    for child in config.stash[CHILDREN].values():
        child.process.terminate()
        child.process.wait()


class Reporter:
    """Sends reports to the parent."""

    def __init__(self, config: pytest.Config, pipe: int) -> None:
        self.config, self.pipe = config, os.fdopen(pipe, "w")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        print(json.dumps(data), file=self.pipe, flush=True)


def _patch_once_per_launch() -> None:
    """Triton's interpreter patches its language again at each call of a device function: half of its time."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    patched = set()

    def patch_once(fn):
        if id(fn.__globals__) in patched:
            return None
        patched.add(id(fn.__globals__))
        scope = patch(fn)
        restore = scope.restore
        scope.restore = lambda: (patched.clear(), restore())
        return scope

    interpreter._patch_lang = patch_once


def _interpreting() -> bool:
    from flash_attn3 import env  # not above: it imports Triton, before `--backend triton` has chosen the interpreter

    return env.triton_interpret()


def _interpreted(item: pytest.Item) -> bool:
    return item.get_closest_marker("interpreted") is not None and not _interpreting()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    if not _interpreted(item):
        return None
    children = item.config.stash[CHILDREN]
    if item.path not in children:
        tests = [other.nodeid for other in item.session.items if other.path == item.path and _interpreted(other)]
        children[item.path] = Child(item.config, tests)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in children[item.path].run(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True
