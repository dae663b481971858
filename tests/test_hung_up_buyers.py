"""A buyer without a key who hung up before his turn doesn't buy; whoever still waits does."""

import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import requests
from service import Service, parse_answer, purchase_request, wait_until
from test_signals import ESTABLISHED, backlog, tcp_rows
from test_sqlite_store import write_lock

import db
from serving.buyers import is_there
from sqlite.wal import LONG_WAIT_S

BUYERS = 40


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with Service(tmp_path, WEB_CONCURRENCY="2", LOCK_TIMEOUT="20") as running:
        wait_until(lambda: len(running.workers()) == 2, 20, "not two workers")
        yield running


def connect(port: int, request: bytes) -> socket.socket:
    buyer = socket.create_connection(("127.0.0.1", port), timeout=30)
    buyer.sendall(request)
    return buyer


def read_all(buyer: socket.socket) -> bytes:
    return b"".join(iter(lambda: buyer.recv(65536), b""))


@pytest.mark.parametrize("how", ["closed", "reset"])
def test_who_gave_up_while_the_lock_was_held_is_sold_nothing(
    service: Service, tmp_path: Path, how: str
) -> None:
    with write_lock(tmp_path / "inventory.db"):
        with ExitStack() as crowd:
            for _ in range(BUYERS):
                buyer = crowd.enter_context(connect(service.port, purchase_request("alice")))
                if how == "reset":
                    buyer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            # Two of them wait for the lock already.
            wait_until(lambda: backlog(service.port) == BUYERS - 2, 10, "they don't wait")
        wait_until(
            lambda: not tcp_rows(service.port, ESTABLISHED), 10, "their ends haven't arrived"
        )
        time.sleep(2 * LONG_WAIT_S)  # whoever was asked before is asked again after such a wait
    assert service.buy("bob").json()["remaining_stock"] == 99  # last in the queue
    assert service.get("/audit")["purchase_records"] == 1
    assert "BuyerGone: the buyer hung up, nothing was sold" in service.log
    if how == "closed":  # of a reset connection gunicorn may not even read the request
        metrics = requests.get(f"{service.url}/metrics", timeout=10).text
        assert f'flash_sale_outcomes_total{{outcome="buyer_gone"}} {BUYERS}.0' in metrics


def test_who_waits_is_sold_to_also_when_the_lock_comes_late(
    service: Service, tmp_path: Path
) -> None:
    with ExitStack() as crowd:
        with write_lock(tmp_path / "inventory.db"):
            buyers = [connect(service.port, purchase_request("alice")) for _ in range(BUYERS)]
            wait_until(lambda: backlog(service.port) == BUYERS - 2, 10, "they don't wait")
        for buyer in map(crowd.enter_context, buyers):  # each stays open until all are answered
            assert parse_answer(read_all(buyer)).status == 200
    assert service.get("/audit")["purchase_records"] == BUYERS


def test_a_half_closed_connection_looks_the_same_and_is_told_so(service: Service) -> None:
    with connect(service.port, purchase_request("alice")) as buyer:
        buyer.shutdown(socket.SHUT_WR)
        answer = parse_answer(read_all(buyer))
    assert (answer.status, answer.json["message"]) == (503, db.BuyerGone.message)
    assert service.get("/audit")["purchase_records"] == 0


def test_a_buyer_with_a_key_is_sold_to_even_so(service: Service) -> None:
    with connect(service.port, purchase_request("alice", "key-1")) as buyer:
        buyer.shutdown(socket.SHUT_WR)
        assert parse_answer(read_all(buyer)).status == 200
    assert service.buy("alice", "key-1").headers["Idempotent-Replayed"] == "true"


def test_a_client_of_http_1_0_is_served_as_ever(service: Service) -> None:
    request = purchase_request("alice").replace(b"HTTP/1.1", b"HTTP/1.0", 1)
    with connect(service.port, request) as buyer:
        assert b" 200 OK\r\n" in read_all(buyer)


class Encrypted:
    def recv(self, size: int, flags: int) -> bytes:
        raise ValueError("non-zero flags not allowed in calls to recv() on SSLSocket")


def test_where_it_cannot_be_told_the_buyer_counts_as_there() -> None:
    assert is_there({})
    assert is_there({"gunicorn.socket": Encrypted()})


def test_what_is_read_later_is_left_in_the_connection() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert is_there({"gunicorn.socket": ours})
        theirs.sendall(b"more")
        assert is_there({"gunicorn.socket": ours})
        assert ours.recv(4) == b"more"
        theirs.close()
        assert not is_there({"gunicorn.socket": ours})
