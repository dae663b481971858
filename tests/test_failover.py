"""A primary and its synchronous standby: when the primary is lost, the same workers sell on at the other."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import requests
from hosts import REQUEST_TIMEOUT_S, Buyers
from postgres_cluster import PASSWORD, ROLE, Cluster, reason_to_skip
from service import PROJECT, Service, wait_until

import proof_of_correctness as proof

if SKIPPED := reason_to_skip():
    pytest.skip(SKIPPED, allow_module_level=True)

STOCK = 800
SALES = 100  # before the primary is killed
LIMIT_S = 20
SYNCHRONOUS = "SELECT sync_state FROM pg_stat_replication"


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as running, pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "REQUEST_TIMEOUT_S", REQUEST_TIMEOUT_S)
        yield running


@pytest.fixture
def primary(stack: ExitStack) -> Cluster:
    cluster = stack.enter_context(Cluster())
    cluster.create_database("sale")
    return cluster


@pytest.fixture
def standby(stack: ExitStack, primary: Cluster) -> Cluster:
    """From here on the primary commits nothing that the standby hasn't on its disk."""
    copy = primary.standby("standby")
    stack.callback(copy.remove)
    copy.start()
    primary.sql("ALTER SYSTEM SET synchronous_standby_names = 'standby'")
    primary.reload()
    wait_until(lambda: primary.sql(SYNCHRONOUS) == "sync", LIMIT_S, "the standby is not synchronous")
    return copy


@pytest.fixture
def service(tmp_path: Path, stack: ExitStack, primary: Cluster, standby: Cluster) -> Service:
    servers = ",".join(f"{server.host}:{server.port}" for server in (primary, standby))
    url = f"postgresql://{ROLE}:{PASSWORD}@{servers}/sale?target_session_attrs=read-write"
    settings = {"LOCK_TIMEOUT": "1", "WEB_CONCURRENCY": "4", "DATABASE_URL": url}
    return stack.enter_context(Service(tmp_path, cwd=PROJECT, **settings))


def test_the_same_workers_sell_on_at_the_standby_when_the_primary_is_killed_in_mid_sale(
    service: Service, primary: Cluster, standby: Cluster
) -> None:
    wait_until(lambda: len(service.workers()) == 4, LIMIT_S, "workers are missing")
    workers = service.workers()
    with Buyers([service.url], STOCK) as buyers:
        buyers.wait_for_sales(SALES)
        primary.kill()
        standby.promote()
        buyers.wait_until_sold_out()
    buyers.judge(standby, "sale")
    assert sum(a.status == proof.SOLD for a in buyers.attempts) == STOCK
    assert any(a.status == proof.SOLD_OUT for a in buyers.attempts)
    assert service.workers() == workers
    assert PASSWORD not in service.log
    assert "Traceback" not in service.log


def test_what_the_standby_does_not_have_is_not_acknowledged_even_to_who_asks_again(
    service: Service, primary: Cluster, standby: Cluster
) -> None:
    assert service.buy("alice", "key-1").status_code == 200
    standby.kill()
    answers = [service.buy("bob", "key-2").status_code for _ in range(3)]
    assert 200 not in answers
    primary.kill()
    standby.start()
    standby.promote()
    replayed = insist(service, "alice", "key-1")
    assert replayed.headers["Idempotent-Replayed"] == "true"
    assert insist(service, "bob", "key-2").json()["remaining_stock"] == 98
    assert standby.sql("SELECT count(*) FROM purchases", "sale") == "2"


def insist(service: Service, customer: str, key: str) -> requests.Response:
    """Ask until it is sold: the answer."""
    answers: list[requests.Response] = []

    def sold() -> bool:
        answers.append(service.buy(customer, key))
        return answers[-1].status_code == 200

    wait_until(sold, LIMIT_S, f"nothing sold to {customer}")
    return answers[-1]
