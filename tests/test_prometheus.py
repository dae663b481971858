"""deploy/prometheus/ with Debian's prometheus and promtool, against the running service."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
from service import PROJECT, Service, free_port, need, run_to_end, wait_until
from test_metrics import is_served
from test_sqlite_store import write_lock

RULES = PROJECT / "deploy" / "prometheus"
LIMIT_S = 20


def program(name: str) -> str:
    path = shutil.which(name)
    need(path, f"{name} is not installed (apt-get install prometheus)")
    return str(path)


def test_the_alerts_say_what_they_should_and_are_quiet_otherwise() -> None:
    for command in (("check", "config", "prometheus.yml"), ("test", "rules", "alerts_test.yml")):
        done = run_to_end([program("promtool"), *command], cwd=RULES)
        assert (done.returncode, "SUCCESS" in done.stdout) == (0, True), done.stdout + done.stderr


def test_the_operators_table_has_each_alert_and_no_other() -> None:
    rules = re.findall(r"- alert: (\w+)", (RULES / "alerts.yml").read_text())
    table = (PROJECT / "deploy" / "README.md").read_text().partition("| alert |")[2]
    named = re.findall(r"\bFlashSale\w+", table.partition("\n\n")[0])
    assert sorted(named) == sorted(rules) != []


def test_every_metric_of_the_alerts_is_one_of_the_service(client: Any) -> None:
    told = [client.get("/metrics").text for _ in range(2)][-1]  # the first is counted by then
    only_postgresql = "flash_sale_oldest_snapshot_seconds"
    names = set(re.findall(r"flash_sale_\w+", (RULES / "alerts.yml").read_text()))
    assert len(names) >= 8
    assert {name for name in names if f"\n{name}" not in told} == {only_postgresql}


@contextmanager
def prometheus(folder: Path, target: int) -> Iterator[str]:
    """One that reads our configuration, but for the port and more often: its URL."""
    port = free_port()
    for name in ("prometheus.yml", "alerts.yml"):
        text = (RULES / name).read_text(encoding="utf-8")
        text = text.replace("127.0.0.1:8100", f"127.0.0.1:{target}").replace(": 5s", ": 200ms")
        (folder / name).write_text(text, encoding="utf-8")
    flags = [f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    flags += [f"--web.listen-address=127.0.0.1:{port}"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([program("prometheus"), *flags], stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(LIMIT_S)


def ask(url: str, query: str) -> list[Any]:
    """The series that answer it; none while Prometheus starts."""
    try:
        answer = requests.get(f"{url}/api/v1/query", params={"query": query}, timeout=5)
        return list(answer.json()["data"]["result"]) if answer.ok else []
    except requests.ConnectionError:
        return []


def test_prometheus_reads_the_sale_and_sees_its_trouble(tmp_path: Path) -> None:
    port = free_port()
    with (
        Service(tmp_path, METRICS_PORT=str(port), LOCK_TIMEOUT="0.01") as service,
        prometheus(tmp_path, port) as url,
    ):
        wait_until(lambda: is_served(port), 10, "no metrics")
        for _ in range(3):
            service.buy()
        sold = 'flash_sale_sold == 3 and on () flash_sale_outcomes_total{outcome="sold"} == 3'
        wait_until(lambda: ask(url, sold), LIMIT_S, "Prometheus doesn't know of the sales")
        assert ask(url, "ALERTS") == []
        with write_lock(tmp_path / "inventory.db"):
            assert service.buy().status_code == 503
        fires = 'ALERTS{alertname="FlashSaleLockTimeouts",alertstate="firing"}'
        wait_until(lambda: ask(url, fires), LIMIT_S, "no alert")
