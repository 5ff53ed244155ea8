"""List the skipped tests of a JUnit report; exit 1 when one was skipped without a good reason.

Good reasons are a missing image archive, and only where SLICEWISE_DATA_DIR names none, a missing GPU,
and programs that the machine does not have and that could not be installed.
"""

import os
import sys
from xml.etree import ElementTree

ALLOWED = (
    "needs CUDA",
    "needs Chromium",
    "needs prometheus",
    "needs promtool",
    "needs redis-server",
    *(() if os.environ.get("SLICEWISE_DATA_DIR") else ("needs SLICEWISE_DATA_DIR",)),
)


def main(report: str) -> int:
    """Print each skip; 1 when one is unexpected or no test ran."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    unexpected = 0
    for case in cases:
        for skip in case.iter("skipped"):
            reason = skip.get("message") or ""
            expected = any(allowed in reason for allowed in ALLOWED)
            unexpected += not expected
            print(f"skipped{'' if expected else ' UNEXPECTEDLY'}: {case.get('classname')}.{case.get('name')}: {reason}")
    print(f"{len(cases)} tests, {unexpected} unexpected skips")
    return 1 if unexpected or not cases else 0


sys.exit(main(sys.argv[1]))
