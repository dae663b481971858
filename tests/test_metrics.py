"""What Prometheus is told: all workers together, whatever became of them, also on METRICS_PORT."""

import os
import re
import shlex
import signal
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
from flask.testing import FlaskClient
from service import Service, free_port, need, wait_until
from test_faults import GUNICORN, fill, mounting
from test_signals import UPGRADABLE, replace_workers
from test_sqlite_store import write_lock

import db
from serving import exporter, metrics
from sqlite.wal import FLUSH_FAILED

MakeApp = Callable[..., Flask]
SCRAPE_LIMIT_S = 0.5
BROKEN = "The metrics of this process can't be written"
Samples = dict[str, float]


def samples(text: str) -> Samples:
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def told(client: FlaskClient) -> Samples:
    return samples(client.get("/metrics").text)


def scrape(port: int) -> Samples:
    return samples(requests.get(f"http://127.0.0.1:{port}/metrics", timeout=10).text)


def outcome_counter(kind: str) -> str:
    return f'flash_sale_outcomes_total{{outcome="{kind}"}}'


def requests_of(route: str, status: int) -> str:
    labels = f'route="{route}",status="{status}"'
    return f"flash_sale_request_duration_seconds_count{{{labels}}}"


def buy(client: FlaskClient, key: str = "", customer_id: str = "alice") -> int:
    headers = {"Idempotency-Key": key} if key else {}
    body = {"customer_id": customer_id}
    return client.post("/buy_ticket", json=body, headers=headers).status_code


def test_the_sale_is_told_as_the_database_knows_it(client: FlaskClient) -> None:
    buy(client)
    answer = client.get("/metrics")
    assert answer.content_type == "text/plain; version=1.0.0; charset=utf-8"
    now = samples(answer.text)
    names = ("database_up", "stock", "sold", "initial_stock", "flush_failed")
    assert [now[f"flash_sale_{name}"] for name in names] == [1, 4, 1, 5, 0]
    assert now["flash_sale_wal_bytes"] > 0
    assert answer.text.endswith("\n")


def test_outcomes_requests_and_waits_are_counted(make_app: MakeApp) -> None:
    client = make_app(INITIAL_STOCK=1).test_client()
    before = told(client)
    assert [buy(client, "k"), buy(client, "k"), buy(client, "k", "bob")] == [200, 200, 422]
    assert [buy(client), buy(client, "other")] == [410, 410]
    client.get("/nowhere")
    client.get("/elsewhere")
    now = told(client)
    grown = {name: value - before.get(name, 0) for name, value in now.items()}
    kinds = ("sold", "replayed", "busy", "outcome_unknown")
    assert [grown[outcome_counter(kind)] for kind in kinds] == [1, 1, 0, 0]
    assert [grown[requests_of("/buy_ticket", status)] for status in (200, 410, 422)] == [2, 2, 1]
    assert grown[requests_of("other", 404)] == 2
    assert not [name for name in now if "nowhere" in name]
    assert grown["flash_sale_lock_wait_seconds_count"] == 1
    slowest = (
        'flash_sale_request_duration_seconds_bucket{le="+Inf",route="/buy_ticket",status="200"}'
    )
    assert grown[slowest] == 2


@pytest.mark.parametrize(
    "error", [db.Busy(1), db.Unavailable("x"), db.OutcomeUnknown("x"), db.BuyerGone()]
)
def test_each_kind_of_trouble_is_counted(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch, error: db.StoreError
) -> None:
    def fail(*_: Any) -> None:
        raise error

    name = outcome_counter(re.sub("(?<=[a-z])(?=[A-Z])", "_", type(error).__name__).lower())
    before = told(client)[name]
    monkeypatch.setattr(db.SQLiteStore, "buy", fail)
    buy(client)
    assert told(client)[name] == before + 1


def test_a_checkpoint_and_a_failed_flush_are_told(client: FlaskClient) -> None:
    before = told(client)
    client.post("/reset")
    assert (
        told(client)["flash_sale_checkpoints_total"] == before["flash_sale_checkpoints_total"] + 1
    )
    client.application.extensions["store"].file.stop(FLUSH_FAILED)
    assert told(client)["flash_sale_flush_failed"] == 1


def test_without_its_database_it_says_so_and_tells_the_rest(
    client: FlaskClient, database: Path
) -> None:
    buy(client)
    client.application.extensions["store"].close()
    database.rename(f"{database}.hidden")
    answer = client.get("/metrics")
    now = samples(answer.text)
    assert (answer.status_code, now["flash_sale_database_up"]) == (200, 0)
    assert "flash_sale_stock" not in now
    assert now[outcome_counter("sold")] > 0


def exporters(service: Service) -> list[int]:
    def name(pid: int) -> str:
        return Path(f"/proc/{pid}/comm").read_text().strip()

    return [pid for pid in service.workers() if name(pid) == exporter.NAME]


def workers(service: Service) -> list[int]:
    return [pid for pid in service.workers() if pid not in exporters(service)]


def folders(*masters: int) -> list[Path]:
    names = [f"flash-sale-metrics-{master}-*" for master in masters]
    return [folder for name in names for folder in metrics.FOLDER_PARENT.glob(name)]


def is_served(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_port_of_its_own_tells_the_sums_of_all_workers_dead_or_alive(tmp_path: Path) -> None:
    port = free_port()
    with Service(tmp_path, METRICS_PORT=str(port), INITIAL_STOCK="200") as service:
        wait_until(lambda: len(workers(service)) == 4, 10, "not four workers")
        wait_until(lambda: is_served(port), 10, "no metrics")
        for _ in range(40):
            assert service.buy().status_code == 200
        for victim in workers(service)[:2]:
            os.kill(victim, signal.SIGKILL)
        wait_until(lambda: scrape(port)["flash_sale_worker_deaths_total"] == 2, 10, "no death")
        for _ in range(40):
            assert service.buy().status_code == 200
        now = scrape(port)
        assert (now[outcome_counter("sold")], now["flash_sale_sold"]) == (80, 80)
        assert now[requests_of("/buy_ticket", 200)] == 80
        assert now["flash_sale_lock_wait_seconds_count"] >= 80
        assert requests.get(f"{service.url}/metrics", timeout=9).status_code == 404  # instead
        assert service.get("/")["endpoints"]["GET /metrics"].endswith("where that is set")


def test_without_a_port_of_its_own_any_worker_tells_the_sums(tmp_path: Path) -> None:
    with Service(tmp_path, sys.executable, "app.py") as service:
        assert exporters(service) == []
        for _ in range(20):
            assert service.buy().status_code == 200
        assert scrape(service.port)[outcome_counter("sold")] == 20
        assert len(folders(service.process.pid)) == 1
    assert folders(service.process.pid) == []


def test_no_scrape_waits_behind_buyers(tmp_path: Path) -> None:
    port = free_port()
    with Service(tmp_path, METRICS_PORT=str(port), WEB_CONCURRENCY="2") as service:
        wait_until(lambda: is_served(port), 10, "no metrics")
        with write_lock(tmp_path / "inventory.db"):
            waiting = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(50)]
            for buyer in waiting:
                buyer.sendall(b"POST /buy_ticket HTTP/1.0\r\n\r\n")
            started = time.monotonic()
            assert scrape(port)["flash_sale_stock"] == 100
            assert time.monotonic() - started < SCRAPE_LIMIT_S
        for buyer in waiting:
            buyer.close()


def test_the_process_of_the_metrics_is_replaced_and_is_no_worker(tmp_path: Path) -> None:
    port = free_port()
    with Service(tmp_path, METRICS_PORT=str(port), WEB_CONCURRENCY="2") as service:
        wait_until(lambda: is_served(port), 10, "no metrics")
        service.buy()
        (first,) = exporters(service)
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: exporters(service) not in ([], [first]), 10, "none took its place")
        wait_until(lambda: is_served(port), 10, "no metrics again")
        now = scrape(port)
        assert (now[outcome_counter("sold")], now["flash_sale_worker_deaths_total"]) == (1, 0)
        assert len(workers(service)) == 2
        assert service.stop(signal.SIGTERM) == 0
    wait_until(lambda: not is_served(port), 10, "the metrics are still served")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_it_ends_with_the_service_whatever_ends_that(tmp_path: Path, number: int) -> None:
    port = free_port()
    with Service(tmp_path, METRICS_PORT=str(port), WEB_CONCURRENCY="2") as service:
        wait_until(lambda: is_served(port), 10, "no metrics")
        os.killpg(service.process.pid, number) if number == signal.SIGINT else os.kill(
            service.process.pid, number
        )
        service.process.wait(20)
    wait_until(lambda: not is_served(port), 10, "it is still served")
    wait_until(lambda: not folders(service.process.pid), 10, "its folder stays")


def test_without_a_port_of_its_own_a_killed_master_leaves_no_folder(tmp_path: Path) -> None:
    with Service(tmp_path, WEB_CONCURRENCY="2") as service:
        assert len(folders(service.process.pid)) == 1
        wait_until(lambda: len(workers(service)) == 2, 10, "not two workers")
        service.process.kill()
        service.process.wait(10)
    wait_until(lambda: not folders(service.process.pid), 10, "its folder stays")


def test_an_upgrade_takes_neither_figures_nor_the_port_from_the_old_workers(tmp_path: Path) -> None:
    port = free_port()
    with Service(tmp_path, *UPGRADABLE, METRICS_PORT=str(port), WEB_CONCURRENCY="2") as service:
        wait_until(lambda: is_served(port), 10, "no metrics")
        service.buy()
        service.process.send_signal(signal.SIGUSR2)
        waits = "the metrics wait until it is free"
        wait_until(lambda: waits in service.log, 20, "the new master has no metrics process")
        wait_until(lambda: service.log.count("Booting worker") == 4, 20, "no new workers")
        assert scrape(port)[outcome_counter("sold")] == 1
        new_master = int(re.findall(r"\[(\d+)\] \[INFO\] Starting gunicorn", service.log)[1])
        old, new = service.process.pid, new_master
        assert [len(folders(old)), len(folders(new))] == [1, 1]
        assert service.stop(signal.SIGTERM) == 0
        wait_until(lambda: service.log.count("Metrics at:") == 2, 10, "nobody took the port over")
        assert [len(folders(old)), len(folders(new))] == [0, 1]
        service.buy()
        now = scrape(port)
        assert (now[outcome_counter("sold")], now["flash_sale_sold"]) == (1, 2)
        os.kill(new_master, signal.SIGTERM)
        wait_until(lambda: not is_served(port), 20, "the new one stays")
    wait_until(lambda: not folders(new), 10, "a folder stays")


def test_a_port_that_is_taken_stops_no_sale(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with Service(tmp_path, METRICS_PORT=str(port), WEB_CONCURRENCY="2") as service:
            said = f"METRICS_PORT {port}: [Errno 98] Address already in use"
            wait_until(lambda: said in service.log, 10, "it didn't say so")
            assert service.buy().status_code == 200
            taken.close()
            wait_until(lambda: is_served(port), 10, "no metrics")
            assert scrape(port)["flash_sale_sold"] == 1
            assert service.log.count(said) == 1


def test_a_start_that_fails_leaves_no_folder(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        variables = {"PORT": str(taken.getsockname()[1]), "TMPDIR": str(tmp_path)}
        variables["DATABASE_URL"] = f"sqlite:///{tmp_path}/inventory.db"
        command = [sys.executable, "app.py"]
        done = subprocess.Popen(command, env=os.environ | variables, stderr=subprocess.DEVNULL)
        assert done.wait(20) == 1
    assert folders(done.pid) == []


def test_memory_that_is_full_stops_no_sale(tmp_path: Path) -> None:
    """New workers find no room for their figures; a page that can't be had would kill them."""
    need(mounting(), "no right to mount (root with CAP_SYS_ADMIN is needed)")
    mount = f"mount -t tmpfs -o size=40m tmpfs {metrics.FOLDER_PARENT} && exec"
    command = ("unshare", "--mount", "sh", "-c", f"{mount} {shlex.join(GUNICORN)}")
    with Service(tmp_path, *command, WEB_CONCURRENCY="2") as service:
        fill(Path(f"/proc/{service.process.pid}/root{metrics.FOLDER_PARENT}"))
        replace_workers(service)
        assert [service.buy().status_code for _ in range(20)] == [200] * 20
        assert "flash_sale_sold 20.0" in requests.get(f"{service.url}/metrics", timeout=10).text
    assert "No space left on device" in service.log
    assert "SIGBUS" not in service.log


def test_workers_go_on_in_the_files_of_those_that_ended(tmp_path: Path) -> None:
    with Service(tmp_path, WEB_CONCURRENCY="2") as service:
        for number in range(1, 4):
            service.buy()
            replace_workers(service)
            sold = outcome_counter("sold")
            assert scrape(service.port)[sold] == number
        names = sorted(file.name for file in metrics_folder(service).iterdir())
    assert names == [f"{kind}_{slot}.db" for kind in metrics.FILES for slot in range(5)]


def test_a_command_leaves_no_folder(tmp_path: Path) -> None:
    environment = os.environ | {"DATABASE_URL": f"sqlite:///{tmp_path}/inventory.db"}
    command = [sys.executable, "-m", "flask", "--app", "app", "init-db"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as done:
        assert done.wait(20) == 0
    assert folders(done.pid) == []


def test_figures_that_cannot_be_written_stop_no_sale(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A unit would be sold, and its buyer told nothing."""

    def fail(*_: object) -> None:
        raise FileNotFoundError("histogram_1.db")

    app = make_app()
    monkeypatch.setattr(metrics, "FAILURES", [])
    monkeypatch.setattr(metrics, "outcome_of", fail)
    monkeypatch.setattr(metrics, "duration_of", fail)
    app.extensions["store"].measure(metrics.harmless(fail), metrics.harmless(fail))
    client = app.test_client()
    assert [client.post("/buy_ticket").status_code for _ in range(6)] == [200] * 5 + [410]
    assert caplog.text.count(BROKEN) == 1


def test_a_worker_sells_on_when_the_folder_of_the_figures_was_removed(tmp_path: Path) -> None:
    with Service(tmp_path, WEB_CONCURRENCY="1", TMPDIR=str(tmp_path)) as service:
        assert service.buy().status_code == 200
        (worker,) = service.workers()
        folder = metrics_folder(service)
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: set(service.workers()) - {worker}, 20, "no new worker")
        assert [service.buy().status_code for _ in range(3)] == [200] * 3
        assert "flash_sale_sold 4.0" in requests.get(f"{service.url}/metrics", timeout=10).text
    assert BROKEN not in service.log


def metrics_folder(service: Service) -> Path:
    parent = metrics.FOLDER_PARENT
    (folder,) = parent.glob(f"flash-sale-metrics-{service.process.pid}-*")
    return folder
