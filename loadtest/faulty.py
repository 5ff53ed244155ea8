"""Run a console script in which a method raises at every n-th call: ``python -m loadtest.faulty ... -- SCRIPT ARGS``.

For what no client can bring about, such as an engine that fails. The product has no hook for it: the method is named
on the command line, as MODULE:CLASS.METHOD, and replaced before the script runs.

It raises only while the file ``armed`` exists in --control, so that a server can warm up first. Each time it appends a
line to ``raised`` there: how many items its last argument held, which for an engine is the images of the batch.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import runpy
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ARMED, RAISED = "armed", "raised"


class InjectedError(RuntimeError):
    """Raised on order."""


class Fault:
    """Counts the calls of all methods that it was put into, and raises at every ``every``-th while it is armed."""

    def __init__(self, every: int, control: Path) -> None:
        if every < 1:
            raise ValueError(f"--every is {every}; allowed: 1 or more")
        self._every, self._control = every, control
        self._calls, self._lock = 0, threading.Lock()

    def put_into(self, target: str) -> None:
        """Replace the method MODULE:CLASS.METHOD. Raises ValueError when there is none."""
        module_name, _, path = target.partition(":")
        class_name, _, method_name = path.partition(".")
        try:
            owner = getattr(importlib.import_module(module_name), class_name)
            method = getattr(owner, method_name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"--method {target}: {error}; allowed: MODULE:CLASS.METHOD") from error
        setattr(owner, method_name, self._around(method))

    def _around(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*arguments: Any) -> Any:
            if self._is_due():
                self._note(len(arguments[-1]))
                raise InjectedError(f"injected: one in {self._every} calls")
            return method(*arguments)

        return call

    def _is_due(self) -> bool:
        if not (self._control / ARMED).exists():
            return False
        with self._lock:
            self._calls += 1
            return self._calls % self._every == 0

    def _note(self, items: int) -> None:
        with self._lock, (self._control / RAISED).open("a", encoding="utf-8") as file:
            file.write(f"{items}\n")


def items_of_raised(control: Path) -> list[int]:
    """How many items each call held that was made to fail."""
    file = control / RAISED
    return [int(line) for line in file.read_text(encoding="utf-8").split()] if file.exists() else []


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; ends as the script does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", action="append", required=True, metavar="MODULE:CLASS.METHOD")
    parser.add_argument("--every", type=int, required=True, metavar="N", help="calls of all methods together")
    parser.add_argument("--control", type=Path, required=True, metavar="DIR")
    parser.add_argument("script", nargs=argparse.REMAINDER, metavar="SCRIPT ARGS", help="after --")
    arguments = parser.parse_args(argv)
    script = [word for word in arguments.script if word != "--"]
    if not script:
        parser.error("a script is needed after --")
    try:
        fault = Fault(arguments.every, arguments.control)
        for target in arguments.method:
            fault.put_into(target)
    except ValueError as error:
        parser.error(str(error))
    sys.argv = script
    runpy.run_path(script[0], run_name="__main__")


if __name__ == "__main__":
    main()
