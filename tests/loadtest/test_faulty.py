import importlib
import sys

import pytest

from loadtest.fault_scenarios import FAILING_CALLS
from loadtest.faulty import ARMED, Fault, InjectedError, items_of_raised, main

TARGET = '''
class Engine:
    def run(self, width, items):
        """Its own."""
        return width, len(items)
'''
SCRIPT = """
import sys
from target_of_fault import Engine
engine, seen = Engine(), []
for call in range(6):
    try:
        seen.append(engine.run(call, [0, 0]))
    except RuntimeError:
        seen.append("raised")
print(seen, sys.argv[1:])
"""


@pytest.fixture
def target(tmp_path, monkeypatch):
    (tmp_path / "target_of_fault.py").write_text(TARGET)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "argv", sys.argv)
    yield tmp_path
    sys.modules.pop("target_of_fault", None)


def test_every_nth_call_of_all_methods_raises_while_it_is_armed(target):
    fault = Fault(3, target)
    fault.put_into("target_of_fault:Engine.run")
    from target_of_fault import Engine

    engine = Engine()
    assert engine.run.__doc__ == "Its own."
    assert [engine.run(1, "ab") for _ in range(7)] == [(1, 2)] * 7
    (target / ARMED).touch()
    assert [engine.run(1, "a"), engine.run(1, "a")] == [(1, 1)] * 2
    with pytest.raises(InjectedError, match="one in 3 calls"):
        engine.run(1, "abcd")
    assert engine.run(2, "a") == (2, 1)
    (target / ARMED).unlink()
    assert [engine.run(1, "ab") for _ in range(7)] == [(1, 2)] * 7
    assert items_of_raised(target) == [4]


def test_nothing_raised_is_no_item(tmp_path):
    assert items_of_raised(tmp_path) == []


def test_a_script_runs_with_the_fault_in_it(target, capsys):
    (target / "script.py").write_text(SCRIPT)
    (target / ARMED).touch()
    method = ["--method", "target_of_fault:Engine.run", "--every", "2", "--control", str(target)]
    main([*method, "--", str(target / "script.py"), "serve", "--port", "1"])
    seen = "[(0, 2), 'raised', (2, 2), 'raised', (4, 2), 'raised'] ['serve', '--port', '1']"
    assert capsys.readouterr().out.strip() == seen
    assert items_of_raised(target) == [2, 2, 2]


@pytest.mark.parametrize(
    ("method", "every", "script", "complaint"),
    [
        ("target_of_fault:Engine.walk", "2", ["s"], "allowed: MODULE:CLASS.METHOD"),
        ("nowhere_at_all:Engine.run", "2", ["s"], "allowed: MODULE:CLASS.METHOD"),
        ("Engine", "2", ["s"], "allowed: MODULE:CLASS.METHOD"),
        ("target_of_fault:Engine.run", "0", ["s"], "allowed: 1 or more"),
        ("target_of_fault:Engine.run", "2", [], "a script is needed"),
    ],
)
def test_what_cannot_be_is_said(target, capsys, method, every, script, complaint):
    with pytest.raises(SystemExit, match="2"):
        main(["--method", method, "--every", every, "--control", str(target), "--", *script])
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("target", FAILING_CALLS)
def test_what_is_made_to_fail_is_what_the_service_calls(target):
    module, _, path = target.partition(":")
    owner, _, method = path.partition(".")
    assert callable(getattr(getattr(importlib.import_module(module), owner), method))
