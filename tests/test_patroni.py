"""The service over a cluster that fails over by itself: nothing it told is lost or sold twice."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from hosts import REQUEST_TIMEOUT_S, Buyers, all_workers
from postgres_cluster import PASSWORD, reason_to_skip
from service import PROJECT, Service, wait_until

import proof.api
from proof.history import SOLD, SOLD_OUT

if SKIPPED := reason_to_skip():
    pytest.skip(SKIPPED, allow_module_level=True)

from postgres_patroni import CHANGE_LIMIT_S, LEASE_S, Member, PatroniCluster

STOCK, SALES = 1_500, 100
WORKERS = 4


@pytest.fixture(scope="module")
def cluster() -> Iterator[PatroniCluster]:
    with pytest.MonkeyPatch.context() as patch, PatroniCluster() as running:
        patch.setenv("NO_PROXY", "*")
        patch.setattr(proof.api, "REQUEST_TIMEOUT_S", REQUEST_TIMEOUT_S)
        yield running


@pytest.fixture(scope="module")
def service(cluster: PatroniCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    settings = {"DATABASE_URL": cluster.url, "LOCK_TIMEOUT": "0.5"}
    folder = tmp_path_factory.mktemp("service")
    with Service(folder, cwd=PROJECT, WEB_CONCURRENCY=str(WORKERS), **settings) as running:
        yield running
        assert PASSWORD not in running.log
        assert "Traceback" not in running.log


def kill_the_leader(cluster: PatroniCluster, leader: Member) -> Callable[[], None]:
    leader.kill()
    return leader.start


def switch_over(cluster: PatroniCluster, leader: Member) -> Callable[[], None]:
    cluster.patronictl("switchover", "--master", leader.name, "--force")
    return lambda: None


def freeze_the_leader(cluster: PatroniCluster, leader: Member) -> Callable[[], None]:
    """For longer than its lease: when it wakes it takes itself for the leader still."""
    leader.signal_all(signal.SIGSTOP)
    return lambda: leader.signal_all(signal.SIGCONT)


@pytest.mark.parametrize("lose", [kill_the_leader, switch_over, freeze_the_leader])
def test_the_same_workers_sell_on_and_every_unit_is_sold_once(
    cluster: PatroniCluster,
    service: Service,
    lose: Callable[[PatroniCluster, Member], Callable[[], None]],
) -> None:
    wait_until(cluster.is_complete, CHANGE_LIMIT_S, f"no standby: {cluster.logs()[-3000:]}")
    workers, leader = all_workers(service, WORKERS), cluster.leader
    with Buyers([service.url], STOCK, patience_s=60.0) as buyers:
        buyers.wait_for_sales(SALES)
        lost = time.monotonic()
        come_back = lose(cluster, leader)
        wait_until(lambda: has_another(cluster, leader), CHANGE_LIMIT_S, "no other leader")
        if lose is freeze_the_leader:
            assert time.monotonic() - lost > LEASE_S / 2
        come_back()
        buyers.wait_for_sales(SALES // 2)
        buyers.wait_until_sold_out()
    buyers.judge(cluster.leader, "sale")
    sold = [a for a in buyers.attempts if a.status == SOLD]
    assert len(sold) == STOCK
    assert max(a.start for a in sold) > lost
    assert any(a.status == SOLD_OUT for a in buyers.attempts)
    assert service.workers() == workers


def has_another(cluster: PatroniCluster, leader: Member) -> bool:
    with suppress(StopIteration):
        return cluster.leader is not leader
    return False
