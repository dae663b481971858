"""The log of a sale: few lines, each with its cause, and no reader of them can stop a sale."""

import logging
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
from flask import Flask
from service import (
    PROJECT,
    Service,
    environment,
    free_port,
    purchase_request,
    send_at_once,
    wait_until,
)
from test_sqlite_store import execute, write_lock

import db
from serving import watch

MakeApp = Callable[..., Flask]
CROWD = 60


def test_the_log_tells_how_a_sale_goes(tmp_path: Path) -> None:
    with Service(tmp_path, INITIAL_STOCK="20", ITEM_NAME="Zoë's show") as service:
        for _ in range(22):
            service.buy()
    lines = re.findall(r"(?:INFO\]?) ((?:Selling|First|Sold|\d+ of).*)", service.log)
    assert lines[0].startswith("Selling Zoë's show: 20 of 20 units left, from /")
    assert lines[1] == "First sale, 19 of 20 units left"
    assert lines[2:-1] == [f"{left} of 20 units left" for left in range(18, 0, -2)]
    assert re.fullmatch(r"Sold out, \d+\.\d s after the first sale", lines[-1])


def test_after_a_reset_the_log_goes_by_the_new_stock(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    client = make_app(INITIAL_STOCK=7).test_client()
    client.post("/reset", json={"stock": 2})
    with caplog.at_level(logging.INFO, "flash_sale"):
        for _ in range(3):
            client.post("/buy_ticket")
    assert [re.sub(r"\d\.\d", "0.0", record.getMessage()) for record in caplog.records] == [
        "First sale, 1 of 2 units left",
        "Sold out, 0.0 s after the first sale",
    ]


def test_after_a_restock_the_log_goes_by_the_new_stock(
    make_app: MakeApp, database: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An operator's, beside the service; and then the service is started again."""
    client = make_app(INITIAL_STOCK=4).test_client()
    with caplog.at_level(logging.INFO, "flash_sale"):
        for _ in range(2):
            client.post("/buy_ticket")
        execute(
            database, "UPDATE inventory SET stock = stock + 2, initial_stock = initial_stock + 2"
        )
        for _ in range(2):
            client.post("/buy_ticket")
        restarted = make_app(INITIAL_STOCK=4).test_client()
        for _ in range(2):
            restarted.post("/buy_ticket")
    assert [record.getMessage() for record in caplog.records] == [
        "First sale, 3 of 4 units left",
        "2 of 4 units left",
        "3 of 6 units left",
        "2 of 6 units left",
        "1 of 6 units left",
        "Sold out",
    ]


def test_gunicorns_own_log_file_takes_the_lines_of_the_sale(tmp_path: Path) -> None:
    log = tmp_path / "sale.log"
    command = [sys.executable, "-m", "gunicorn", "--error-logfile", str(log), "app:app"]
    with Service(tmp_path, *command) as service:
        service.buy()
    assert "First sale, 99 of 100 units left\n" in log.read_text()
    assert "First sale" not in service.log


def test_trouble_of_one_kind_is_logged_once_a_second_by_all_workers_together(
    tmp_path: Path,
) -> None:
    with Service(tmp_path, LOCK_TIMEOUT="0.01") as service:
        with write_lock(tmp_path / "inventory.db"):
            started = time.monotonic()
            answers = send_at_once(service.port, [purchase_request("alice")] * CROWD)
            seconds = time.monotonic() - started
        lines = re.findall(
            r"\[ERROR\] POST /buy_ticket: Busy: no write lock after .* s", service.log
        )
    assert [answer.status for answer in answers] == [503] * CROWD
    assert 1 <= len(lines) <= 1 + seconds + 1  # two workers may see the pause end at once


def test_another_kind_of_trouble_has_its_own_line(
    client: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for error in (db.Busy(1), db.Unavailable("no disk"), db.Busy(2)):

        def fail(*_: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(db.SQLiteStore, "buy", fail)
        client.post("/buy_ticket")
    assert [record.getMessage() for record in caplog.records] == [
        "POST /buy_ticket: Busy: no write lock after 1.000 s",
        "POST /buy_ticket: Unavailable: no disk",
    ]


def test_a_line_is_dropped_while_standard_error_takes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    with open(reading, "rb") as reader, open(writing, "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        record = logging.LogRecord("x", logging.INFO, "", 0, "", (), None)
        assert watch.stderr_takes_a_line(record)
        fill(writing)
        assert not watch.stderr_takes_a_line(record)
        reader.read(1 << 16)
        assert watch.stderr_takes_a_line(record)


def fill(pipe: int) -> None:
    os.set_blocking(pipe, False)
    try:
        while os.write(pipe, b"x" * 4096):
            pass
    except BlockingIOError:
        os.set_blocking(pipe, True)


@pytest.mark.parametrize("of", ["both", "the access log"])
def test_a_collector_that_stopped_reading_stops_no_sale(tmp_path: Path, of: str) -> None:
    port = free_port()
    variables = environment(
        DATABASE_URL=f"sqlite:///{tmp_path}/inventory.db", PORT=str(port), INITIAL_STOCK="30"
    )
    reading, writing = os.pipe()
    fill(writing)
    command = [sys.executable, "-m", "gunicorn", "--access-logfile", "-", "app:app"]
    errors = writing if of == "both" else subprocess.DEVNULL
    process = subprocess.Popen(command, cwd=PROJECT, env=variables, stdout=writing, stderr=errors)
    try:
        wait_until(lambda: is_listening(port), 20, "it doesn't start")
        answers = [
            requests.post(f"http://127.0.0.1:{port}/buy_ticket", timeout=9) for _ in range(31)
        ]
        assert [answer.status_code for answer in answers] == [200] * 30 + [410]
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(reading)
        os.close(writing)


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
