"""How late an event loop is: the time to ``/healthz``, asked at equal gaps on one connection.

    python -m loadtest.loop_delay --url http://127.0.0.1:8000/healthz --seconds 10

prints a JSON list of milliseconds. A request is due at its instant whether or not the last was answered, and its time
counts from then.
"""

from __future__ import annotations

import argparse
import http.client
import json
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

GAP_S = 0.01
LIMIT_S = 10.0


def delays_ms(url: str, seconds: float) -> list[float]:
    """Milliseconds from each instant to its answer. Raises OSError and HTTPException."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=LIMIT_S)
    found = []
    began_s = time.perf_counter()
    for number in range(int(seconds / GAP_S)):
        due_s = began_s + number * GAP_S
        time.sleep(max(0.0, due_s - time.perf_counter()))
        connection.request("GET", parts.path)
        response = connection.getresponse()
        response.read()
        if response.status != http.client.OK:
            raise http.client.HTTPException(f"{url} answers {response.status}")
        found.append((time.perf_counter() - due_s) * 1e3)
    connection.close()
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Print the times."""
    parser = argparse.ArgumentParser(description="Times to an answer, asked at equal gaps")
    parser.add_argument("--url", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    arguments = parser.parse_args(argv)
    print(json.dumps(delays_ms(arguments.url, arguments.seconds)))


if __name__ == "__main__":
    main()
