"""What nginx tells by itself, what only the service may tell, and how many may wait for it.

Each line of deploy/nginx.conf that decides it is held to it twice: the check passes with the file
as it is, and fails with that line changed.
"""

import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from edge import (
    PATIENCE_S,
    Edits,
    Upstream,
    address,
    ask,
    ask_at_once,
    buy,
    connect,
    for_a_second,
    get,
    nginx,
    read_all,
    reply,
)
from service import Answer, parse_answer

OLDEST_S = 2.0  # of what nginx keeps for one second: it counts whole ones
SOLD = '{"success": true}'
Check = Callable[[Path, Edits], None]


def sold_out(request: str) -> bytes:
    """As a service that marks too much: what nginx must not keep it has to see by itself."""
    return for_a_second(405 if request.startswith("GET /buy_ticket") else 410)


def a_refusal_is_told_without_the_service(folder: Path, edits: Edits) -> None:
    with Upstream(sold_out) as upstream, nginx(folder, upstream.port, edits) as port:
        answers = [ask(port, buy(), address(number)) for number in range(30)]
        assert {answer.status for answer in answers} == {410}
        assert len(upstream.requests) <= 4  # one each second
    for answer in answers:
        assert answer.headers["cache-control"] == "no-store"
        assert "x-accel-expires" not in answer.headers


def a_reading_is_told_without_the_service(folder: Path, edits: Edits) -> None:
    def stock(_: str) -> bytes:
        return for_a_second(200, '{"current_stock": 7}')

    with Upstream(stock) as upstream, nginx(folder, upstream.port, edits) as port:
        answers = [ask(port, get(f"/inventory?{number}")) for number in range(200)]
        assert {answer.text for answer in answers} == {'{"current_stock": 7}'}
        assert len(upstream.requests) <= 4


def what_the_service_does_not_mark_is_not_kept(folder: Path, edits: Edits) -> None:
    with Upstream(lambda _: reply(410)) as upstream, nginx(folder, upstream.port, edits) as port:
        for raw_request in [buy("k"), buy("k"), get("/inventory"), get("/inventory")]:
            assert ask(port, raw_request).status == 410
        assert len(upstream.requests) == 4
        assert [ask(port, raw).status for raw in (buy(), buy())] == [410, 410]
        assert len(upstream.requests) == 8  # a refusal is asked for twice before it is kept


def a_get_is_not_told_what_a_purchase_was_told(folder: Path, edits: Edits) -> None:
    with Upstream(sold_out) as upstream, nginx(folder, upstream.port, edits) as port:
        assert [ask(port, one).status for one in (buy(), get("/buy_ticket"))] == [410, 405]


def a_buyer_with_a_key_is_asked_about(folder: Path, edits: Edits) -> None:
    def owner(request: str) -> bytes:
        return reply(200, SOLD) if "Idempotency-Key" in request else for_a_second(410)

    with Upstream(owner) as upstream, nginx(folder, upstream.port, edits) as port:
        buyers = [buy(), buy("k"), buy("0"), buy(headers="Idempotency_Key: k\r\n"), buy()]
        assert [ask(port, buyer).status for buyer in buyers] == [410, 200, 200, 200, 410]


def what_a_buyer_with_a_key_was_told_is_told_to_nobody_else(folder: Path, edits: Edits) -> None:
    with Upstream(sold_out) as upstream, nginx(folder, upstream.port, edits) as port:
        for buyer in (buy("k"), buy("0"), buy()):
            ask(port, buyer)
        assert len(upstream.requests) == 4  # the last asks twice, to keep it


def purchases_do_not_wait_for_each_other(folder: Path, edits: Edits) -> None:
    both, together = threading.Barrier(2), threading.Event()

    def answer(_: str) -> bytes:
        with suppress(threading.BrokenBarrierError):
            both.wait(3)  # seconds
            together.set()
        return for_a_second(200, SOLD)

    with Upstream(answer) as upstream, nginx(folder, upstream.port, edits) as port:
        assert [answer.status for answer in ask_at_once(port, [buy(), buy()])] == [200, 200]
        assert together.is_set()


def each_purchase_is_passed_on_once_and_for_its_buyer(folder: Path, edits: Edits) -> None:
    """After a refill, when a refusal was kept a moment ago: the next two buyers buy."""
    refilled, both = threading.Event(), threading.Event()

    def answer(_: str) -> bytes:
        if not refilled.is_set():
            return for_a_second(410)
        both.wait(3)  # seconds
        return reply(200, SOLD)

    with Upstream(answer) as upstream, nginx(folder, upstream.port, edits) as port:
        assert ask(port, buy()).status == 410
        refilled.set()
        before = len(upstream.requests)
        time.sleep(OLDEST_S + 0.1)  # until nginx knows that it is old
        with connect(port) as first, connect(port) as second:
            first.sendall(buy())
            upstream.wait_for(before + 1)
            second.sendall(buy())
            with suppress(AssertionError):
                upstream.wait_for(before + 2, 1)
            both.set()
            answers = [parse_answer(read_all(client)) for client in (first, second)]
        assert [answer.status for answer in answers] == [200, 200]
        assert len(upstream.requests) == before + 2


def readings_wait_for_one_that_asks(folder: Path, edits: Edits) -> None:
    def stock(_: str) -> bytes:
        time.sleep(0.2)  # as long as the others need to come
        return for_a_second(200, '{"current_stock": 7}')

    with Upstream(stock) as upstream, nginx(folder, upstream.port, edits) as port:
        answers = ask_at_once(port, [get("/inventory")] * 20)
        assert {answer.status for answer in answers} == {200}
        assert len(upstream.requests) == 1


def the_service_sees_that_a_buyer_has_hung_up(folder: Path, edits: Edits) -> None:
    news = threading.Event()

    def answer(_: str) -> bytes:
        news.wait(0.5)  # seconds, as long as they need
        return reply(200, SOLD)

    with Upstream(answer) as upstream, nginx(folder, upstream.port, edits) as port:
        with connect(port) as client:
            client.sendall(buy())
            upstream.wait_for(1)
        assert upstream.gone.wait(2)


FEW: Edits = {
    "max_conns=1000 ": "max_conns=3 ",
    "worker_processes auto": "worker_processes 4",
}


def no_more_wait_than_the_service_can_answer(folder: Path, edits: Edits) -> None:
    """Whoever is too many is told so at once. All of nginx's workers count together."""
    release = threading.Event()

    def answer(request: str) -> bytes:
        if request.startswith("POST"):
            release.wait(PATIENCE_S)
        return reply(200, SOLD)

    with (
        Upstream(answer) as upstream,
        nginx(folder, upstream.port, FEW | edits) as port,
        ExitStack() as stack,
    ):
        buyers = [stack.enter_context(connect(port, address(number))) for number in range(40)]
        for buyer in buyers:
            buyer.sendall(buy())
        refused = first_answers(buyers, 37)
        assert [answer.status for answer in refused] == [503] * 37
        upstream.wait_for(3)
        assert len(upstream.requests) == 3
        assert ask(port, get("/inventory")).status == 200  # a rush keeps nobody from looking
        release.set()
        sold = first_answers(buyers, 3)
    assert [answer.status for answer in sold] == [200] * 3
    for one in refused:
        assert one.headers["retry-after"] == "1"
        assert one.json == {"success": False, "message": "Server busy - please retry"}
    assert "live upstreams" not in (folder / "error.log").read_text()  # no line for each of them
    assert not (folder / "unanswered.log").read_text()


def first_answers(clients: list[socket.socket], number: int) -> list[Answer]:
    """Of those who are answered first; they leave the list."""
    answers: list[Answer] = []
    while len(answers) < number:
        answered, _, _ = select.select(clients, [], [], 3)  # seconds
        assert answered, f"only {len(answers)} of {number} were answered"
        for client in answered[: number - len(answers)]:
            clients.remove(client)
            with client:
                answers.append(parse_answer(read_all(client)))
    return answers


STEP_2 = "proxy_intercept_errors on;"
CACHED = "proxy_cache answers; proxy_cache_methods POST;"  # in step 2, as if there were no step 3
LINES: list[tuple[Check, str, str]] = [
    (a_refusal_is_told_without_the_service, "proxy_cache_methods POST;", ""),
    (a_refusal_is_told_without_the_service, "proxy_cache answers;", ""),
    (a_refusal_is_told_without_the_service, "proxy_intercept_errors on;", ""),
    (a_refusal_is_told_without_the_service, "error_page 410 = @sold_out;", ""),
    (a_reading_is_told_without_the_service, "proxy_cache answers;", ""),
    (a_reading_is_told_without_the_service, "$request_method$uri", "$request_method$request_uri"),
    (
        what_the_service_does_not_mark_is_not_kept,
        "proxy_cache answers;",
        "proxy_cache answers; proxy_cache_valid any 1s; proxy_ignore_headers Cache-Control;",
    ),
    (a_refusal_is_told_without_the_service, "proxy_cache_key $request_method$uri;", ""),
    (a_get_is_not_told_what_a_purchase_was_told, "$request_method$uri", "$uri"),
    (a_buyer_with_a_key_is_asked_about, "proxy_cache_bypass $has_key;", ""),
    (a_buyer_with_a_key_is_asked_about, "bypass $has_key", "bypass $http_idempotency_key"),
    (a_buyer_with_a_key_is_asked_about, "underscores_in_headers on;", ""),
    (a_buyer_with_a_key_is_asked_about, "proxy_set_header Idempotency-Key ", "# "),
    (
        what_a_buyer_with_a_key_was_told_is_told_to_nobody_else,
        "nobody1 @with_key;",
        "nobody1 @without_key;",
    ),
    (purchases_do_not_wait_for_each_other, STEP_2, f"{CACHED} proxy_cache_lock on;"),
    (each_purchase_is_passed_on_once_and_for_its_buyer, "use_stale off", "use_stale error"),
    (
        each_purchase_is_passed_on_once_and_for_its_buyer,
        STEP_2,
        f"{CACHED} proxy_cache_use_stale updating; proxy_cache_background_update on;",
    ),
    (the_service_sees_that_a_buyer_has_hung_up, STEP_2, CACHED),
    (the_service_sees_that_a_buyer_has_hung_up, "client_abort off", "client_abort on"),
    (readings_wait_for_one_that_asks, "proxy_cache_lock on;", ""),
    (no_more_wait_than_the_service_can_answer, "max_conns=3 ", ""),
    (no_more_wait_than_the_service_can_answer, "zone purchases 64k;", ""),
    (no_more_wait_than_the_service_can_answer, "error.log crit;", "error.log error;"),
    (no_more_wait_than_the_service_can_answer, '"~^/error/50. (.*: )?0?$" 1;', ""),
    (no_more_wait_than_the_service_can_answer, "http://readings", "http://purchases"),
]
CHECKS = list(dict.fromkeys(check for check, _, _ in LINES))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_as_the_file_stands(tmp_path: Path, check: Check) -> None:
    check(tmp_path, {})


@pytest.mark.parametrize(
    ("check", "line", "instead"), LINES, ids=[f"{line} -> {new}" for _, line, new in LINES]
)
def test_no_longer_with_a_line_changed(
    tmp_path: Path, check: Check, line: str, instead: str
) -> None:
    with pytest.raises((AssertionError, OSError)):
        check(tmp_path, {line: instead})
