"""Three app hosts, one database, a network between them: each may fail in the middle of a sale."""

import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from hosts import REQUEST_TIMEOUT_S, AppHost, Buyers, Network, all_workers, serving
from postgres_cluster import Cluster, reason_to_skip
from postgres_proxy import Proxy
from service import wait_until

from proof import api
from proof.buyers import hold_sale
from proof.checker import find_violations
from proof.history import BUSY, SOLD, SOLD_OUT
from proof.orders import Crowd, single_orders
from proof.result import equalities

if SKIPPED := reason_to_skip():
    pytest.skip(SKIPPED, allow_module_level=True)

APP_HOSTS = ("app1", "app2", "app3")
DATABASE_PORT, APP_PORT, SLOW_APP_PORT = 5432, 8001, 8101
WORKERS = 2  # on each app host
SETTINGS = {"LOCK_TIMEOUT": "0.5", "WEB_CONCURRENCY": str(WORKERS)}
STOCK = 100_000  # the sales with a fault end when the fault is over
SALES = 60  # before a fault
LIMIT_S = 20
DELAY_S = 0.02  # in each direction
CUTS = 6


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    """The tests themselves are on the buyers' host."""
    with ExitStack() as stack:
        built = stack.enter_context(Network("database", *APP_HOSTS, "buyers"))
        stack.enter_context(built.inside("buyers"))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("NO_PROXY", "*")
        patch.setattr(api, "REQUEST_TIMEOUT_S", REQUEST_TIMEOUT_S)
        yield built


@pytest.fixture(scope="module")
def cluster(network: Network) -> Iterator[Cluster]:
    host, prefix = network.address("database"), network.prefix("database")
    with Cluster(host=host, port=DATABASE_PORT, prefix=prefix) as running:
        running.create_database("sale")
        yield running


@pytest.fixture(scope="module")
def hosts(
    tmp_path_factory: pytest.TempPathFactory, network: Network, cluster: Cluster
) -> Iterator[list[AppHost]]:
    folder, settings = (
        tmp_path_factory.mktemp("hosts"),
        SETTINGS | {"DATABASE_URL": cluster.url("sale")},
    )
    started = [
        AppHost(folder, network, name, APP_PORT + n, **settings) for n, name in enumerate(APP_HOSTS)
    ]
    with serving(started) as running:
        yield running


def urls(hosts: list[AppHost]) -> list[str]:
    return [host.url for host in hosts]


def test_a_thousand_buyers_at_three_hosts_buy_each_of_100_tickets_once(
    hosts: list[AppHost],
) -> None:
    orders = single_orders(1000)
    crowds = [Crowd(host.url, place, orders[place::3]) for place, host in enumerate(hosts)]
    history = hold_sale(api.Api(hosts[0].url), 100, crowds)
    told = Counter(a.status for a in history.attempts)
    assert told[SOLD] == 100
    assert set(told) <= {
        SOLD,
        SOLD_OUT,
        BUSY,
    }  # cold pools, half a second for the lock
    assert len({a.purchase_id for a in history.attempts if a.status == SOLD}) == 100
    checks = equalities([history], find_violations([history]))
    assert all(passed for passed, _ in checks), checks


def test_a_host_that_is_killed_in_mid_sale_takes_no_sale_along(
    hosts: list[AppHost], cluster: Cluster
) -> None:
    with Buyers(urls(hosts), STOCK) as buyers:
        buyers.wait_for_sales(SALES)
        hosts[1].kill()
        buyers.wait_for_sales(SALES // 3)
        wait_until(buyers.unclear, LIMIT_S, "nobody noticed")
        hosts[1] = hosts[1].start_another()
        buyers.wait_for_sales(SALES // 3, hosts[1].url)
    buyers.judge(cluster, "sale")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT], ids=["fast", "immediate"])
def test_all_hosts_go_on_selling_when_the_database_was_restarted_in_mid_sale(
    hosts: list[AppHost], cluster: Cluster, how: signal.Signals
) -> None:
    workers = [all_workers(host, WORKERS) for host in hosts]
    with Buyers(urls(hosts), STOCK) as buyers:
        buyers.wait_for_sales(SALES)
        cluster.restart(how)
        for host in hosts:
            buyers.wait_for_sales(SALES // 3, host.url)
    buyers.judge(cluster, "sale")
    assert [host.workers() for host in hosts] == workers


def test_a_host_that_is_cut_off_in_mid_sale_takes_no_sale_along(
    hosts: list[AppHost], network: Network, cluster: Cluster
) -> None:
    with Buyers(urls(hosts), STOCK) as buyers:
        buyers.wait_for_sales(SALES)
        network.cut_off(hosts[0].name)
        buyers.wait_for_sales(SALES // 3)
        wait_until(buyers.unclear, LIMIT_S, "no buyer was cut off")
        network.join(hosts[0].name)
        buyers.wait_for_sales(SALES // 3, hosts[0].url)
    buyers.judge(cluster, "sale")


@pytest.fixture
def slow_ways(network: Network, cluster: Cluster) -> Iterator[list[Proxy]]:
    """From each app host to the database."""
    with ExitStack() as stack:
        ways = []
        for name in APP_HOSTS:
            with network.inside(name):
                ways.append(stack.enter_context(Proxy(cluster.port, cluster.host, DELAY_S)))
        yield ways


def test_a_way_to_the_database_that_is_slow_and_cut_now_and_then_loses_no_sale(
    tmp_path_factory: pytest.TempPathFactory,
    network: Network,
    cluster: Cluster,
    slow_ways: list[Proxy],
) -> None:
    folder, started = tmp_path_factory.mktemp("slow"), []
    for place, (name, way) in enumerate(zip(APP_HOSTS, slow_ways, strict=True)):
        url = cluster.url("sale").replace(f"{cluster.host}:{cluster.port}", f"127.0.0.1:{way.port}")
        settings = SETTINGS | {"DATABASE_URL": url}
        started.append(AppHost(folder, network, name, SLOW_APP_PORT + place, **settings))
    with serving(started) as hosts:
        with Buyers(urls(hosts), STOCK) as buyers:
            for cut in range(CUTS):
                buyers.wait_for_sales(SALES // 3)
                slow_ways[cut % 3].cut()
            for host in hosts:
                buyers.wait_for_sales(SALES // 3, host.url)
        buyers.judge(cluster, "sale")
