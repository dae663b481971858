"""The rehearsal: a crowd from many addresses buys through nginx, and its script judges the sale."""

import itertools
import re
import sys
from pathlib import Path

import pytest
from edge import Upstream, nginx, reply
from service import Service, allow_open_files, run_to_end

CROWD = (sys.executable, "benchmarks/crowd.py", "--limit", "40", "--addresses", "100")


def figures(output: str) -> dict[str, str]:
    return dict(re.findall(r"^([^:\n]+): (.*)$", output, re.MULTILINE))


@pytest.mark.parametrize("keys", [[], ["--keys"]], ids=["without keys", "with keys"])
def test_2000_buyers_at_once_buy_100_units_through_nginx(tmp_path: Path, keys: list[str]) -> None:
    allow_open_files(5_000)  # nginx inherits it
    with Service(tmp_path) as service, nginx(tmp_path, service.port) as port:
        url = f"http://127.0.0.1:{port}"
        done = run_to_end([*CROWD, "--url", url, "--buyers", "2000", *keys])
        assert done.returncode == 0, done.stdout + done.stderr
        audit = service.get("/audit")
    told = figures(done.stdout)
    assert (told["connected at once"], told["sold"], told["violations"]) == ("2000", "100", "[]")
    assert (told["without a final answer"], told["resets and lost connections"]) == ("0", "{}")
    assert (audit["purchase_records"], audit["current_stock"]) == (100, 0)


FAULTS = {
    "sells one unit too many": "oversold",
    "closes connections": "without an answer",
    "gives no final answer": "without a final answer: 20",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_rehearsal_fails_where_the_sale_does(fault: str) -> None:
    sold = itertools.count(1)

    def answer(request: str) -> bytes:
        if request.startswith("GET"):
            return reply(200, '{"current_stock": 3}')
        number = next(sold)
        if fault == "closes connections" and number == 5:
            return b""
        if fault == "gives no final answer":
            return reply(503)
        if number > 3 + (fault == "sells one unit too many"):
            return reply(410, '{"remaining_stock": 0}')
        return reply(200, f'{{"remaining_stock": {3 - number}, "purchase_id": {number}}}')

    with Upstream(answer) as upstream:
        url = f"http://127.0.0.1:{upstream.port}"
        done = run_to_end([*CROWD, "--url", url, "--buyers", "20", "--limit", "3"])
    assert (done.returncode, figures(done.stdout)["proven"]) == (1, "False"), done.stderr
    assert FAULTS[fault] in done.stdout


IMPOSSIBLE = {
    "sold out": (200, '{"current_stock": 0}'),
    "the sale opens at 20:00": (200, '{"current_stock": 3, "open": false, "opens_at": "20:00"}'),
    "answered 503": (503, '{"message": "Server busy"}'),
    "no stock at": (200, "<html>"),
}


@pytest.mark.parametrize("reason", IMPOSSIBLE)
def test_what_cannot_be_rehearsed_is_said_in_a_line_before_anybody_buys(reason: str) -> None:
    with Upstream(lambda request: reply(*IMPOSSIBLE[reason])) as upstream:
        done = run_to_end([*CROWD, "--url", f"http://127.0.0.1:{upstream.port}", "--buyers", "20"])
        assert len(upstream.requests) == 1
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Cannot rehearse: ")
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1
