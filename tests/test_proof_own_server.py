"""The proof on a service of several processes: it starts, kills, restarts and stops it."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from broken_service import FAULTS
from service import PROJECT, free_port
from test_proof_command import RUN_TIMEOUT_S, environment, judging, read_until, run

from proof import workers
from proof.api import Api, CannotJudge
from proof.buyers import hold_crowded_sale, hold_sale
from proof.history import Attempt, Audit, History, Reading
from proof.orders import Crowd, keyed_orders, repeating_rows
from proof.result import FAILED, INCONCLUSIVE, PASSED
from proof.sellers import OwnServer, naive_shop
from proof_of_correctness import judge, negative_control

TRIES_MAX = 3  # some faults hit one sale in 200: a run may be lucky
CAUGHT_AS = {  # the tests in which it shows, and how it may be named
    "no_lock": ("1", {"duplicate level"}),
    "no_recheck": ("2", {"oversold"}),
    "unstored": ("1,4", {"lost purchase"}),
    "unacknowledged": ("1,4", {"phantom purchase", "one key, different answers"}),
    "same_level": ("1,4", {"duplicate level", "oversold"}),  # the latter for the first unit
    "after_sell_out": ("2", {"oversold"}),
    "stale": ("2,4", {"not linearizable"}),
    "sells_again": ("4", {"one key, different answers"}),
    "refill": ("5", {"oversold"}),
    "forgets_keys": ("5", {"one key, different answers"}),
    "refill_at_start": ("5", {"oversold"}),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The proof beside a broken service called app.py, which it treats as it would the service."""
    shutil.copy(PROJECT / "proof_of_correctness.py", tmp_path)
    shutil.copytree(PROJECT / "proof", tmp_path / "proof")
    shutil.copy(PROJECT / "tests" / "broken_service.py", tmp_path / "app.py")
    return tmp_path


def prove(folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    proof = str(folder / "proof_of_correctness.py")
    return run("--own-server", *arguments, command=(proof,), **more)


def test_every_fault_is_one_that_has_to_be_caught() -> None:
    assert set(CAUGHT_AS) == set(FAULTS) - {"none", "two_children"}


TEST_2_LOOK = (
    r"={60}\nTEST 2: OVERSELLING PREVENTION \(1000 buyers, 100 tickets\)\n={60}\n"
    r"Inventory reset to 100 units\nLaunching 1000 concurrent purchase attempts...\n"
    r"(Progress: \d+00/1000\n){10}"
    r"RESULTS:\n  Total time: \d+\.\d\ds\n  Throughput: \d+\.\d\d requests/second\n"
    r"  Successful purchases: 100\n  Sold out responses: 900\n"
    r"  Server busy responses: 0\n  Errors: 0\n"
    r"  Response times: average [\d.]+ms  min [\d.]+ms  p50 [\d.]+ms  p99 [\d.]+ms  max [\d.]+ms\n"
    r"  In flight at once: \d+\n\nVERIFICATION:\n"
    r"  ✓ Exactly 100 purchases succeeded\n  ✓ All 1000 requests accounted for\n"
    r"  ✓ Final inventory is 0 \(not negative!\)\n"
    r"  ✓ Database has exactly 100 purchase records\n  ✓ History is linearizable\n"
    r"TEST 2 PASSED! No race conditions detected!\n"
)


def test_an_honest_service_is_proven_by_one_command(folder: Path) -> None:
    figures = folder / "figures.json"
    dead_url = f"http://127.0.0.1:{free_port()}"
    done = prove(folder, "--json", str(figures), API_URL=dead_url)
    assert done.returncode == 0, done.stdout
    assert "--own-server: judging a server of our own at http://127.0.0.1:" in done.stdout
    tests = json.loads(figures.read_text())["tests"]
    assert [test["verdict"] for test in tests] == ["PASSED"] * 6
    assert tests[5]["figures"]["kills_in_mid_sale"] >= 10
    assert tests[2]["figures"]["in_flight_max"] >= 100
    look = re.search(TEST_2_LOOK, done.stdout)
    assert look, done.stdout
    progress = sorted(map(int, re.findall(r"Progress: (\d+)/1000", look[0])))
    assert progress == list(range(100, 1001, 100))
    sales = re.search(r"\n([\d,]+) sales were judged", done.stdout)
    assert sales
    assert int(sales[1].replace(",", "")) >= 1900


@pytest.mark.parametrize("fault", CAUGHT_AS)
def test_a_broken_service_is_caught_with_a_violation_that_names_what_happened(
    folder: Path, fault: str
) -> None:
    figures = folder / "figures.json"
    tests, kinds = CAUGHT_AS[fault]
    for _ in range(TRIES_MAX):
        arguments = ("--tests", tests, "--json", str(figures))
        done = prove(folder, *arguments, BROKEN_FAULT=fault)
        if done.returncode == 1:
            break
    assert done.returncode == 1, done.stdout
    assert "NOT CORRECT" in done.stdout
    named = json.loads(figures.read_text())["tests"][1:]
    assert kinds & {v["kind"] for test in named for v in test["violations"]}, done.stdout


# -- workers


def test_a_child_that_holds_the_listening_socket_but_answers_nobody_is_no_worker(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    children = folder / "children"
    monkeypatch.setattr("proof.sellers.APP", folder / "app.py")
    monkeypatch.setenv("BROKEN_FAULT", "two_children")
    monkeypatch.setenv("CHILD_FILE", str(children))
    seen: set[int] = set()
    server = OwnServer(folder)
    server.start()
    try:
        child = int(children.read_text())

        def look(over: threading.Event, _: Sequence[Reading]) -> None:
            while not over.wait(0.01):
                seen.update(server.busy_workers())

        rows = keyed_orders("look", 400, 16)
        crowds = [Crowd(server.url, n, rows[n::2]) for n in range(2)]
        hold_sale(Api(server.url), 400, crowds, meanwhile=look)
        assert server.process
        below = set(workers.descendants(server.process.pid))
        listening = workers.open_sockets(child)
        assert any(listening & workers.open_sockets(pid) for pid in seen)  # they share it
    finally:
        server.stop()
    assert child in below
    assert seen == below - {child}
    assert len(seen) == 4


def test_workers_are_killed_until_enough_kills_count_and_a_child_of_another_kind_is_spared(
    folder: Path,
) -> None:
    children = folder / "children"
    more = {"BROKEN_FAULT": "two_children", "CHILD_FILE": str(children)}
    done = prove(folder, "--tests", "5", **more)
    assert done.returncode == 0, done.stdout
    assert "10 workers killed in mid-sale (10 needed), the service restarted" in done.stdout
    started = children.read_text().split()
    assert len(started) == done.stdout.count("Inventory reset to 800") + 1  # one for each start


# -- the environment


def test_nothing_of_an_env_file_reaches_the_proofs_own_server(tmp_path: Path) -> None:
    kept = shutil.ignore_patterns(".*", "tests", "benchmarks", "deploy", "__pycache__")
    copy = shutil.copytree(PROJECT, tmp_path / "copy", ignore=kept)
    lines = [
        f"DATABASE_URL=sqlite:///{tmp_path}/leak.db",
        "SALE_STARTS_AT=2999-01-01T00:00:00Z",
        "LOCK_TIMEOUT=0",
        "ALLOW_RESET=0",
        "PORT=1",
        "HOST=192.0.2.1",
        "INITIAL_STOCK=3",
        f"METRICS_PORT={free_port()}",
        "GUNICORN_CMD_ARGS=--threads 4",
    ]
    (copy / ".env").write_text("\n".join(lines))
    done = prove(copy, "--tests", "1", "--stock", "20", "--buyers", "20")
    assert done.returncode == 0, done.stdout
    assert not (tmp_path / "leak.db").exists()


def test_a_service_that_does_not_start_is_named_with_its_last_words(folder: Path) -> None:
    (folder / "app.py").write_text("raise SystemExit('Cannot start: no such luck')")
    done = prove(folder)
    assert done.returncode == 2
    assert "NOT JUDGED: app.py did not start: Cannot start: no such luck" in done.stdout


# -- interruptions


@contextmanager
def service_at(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    env = environment(PORT=str(port), DATABASE_URL=f"sqlite:///{folder}/sale.db")
    server = subprocess.Popen(
        [sys.executable, "app.py"], cwd=folder, env=env, start_new_session=True
    )
    try:
        yield server
    finally:
        server.terminate()
        server.wait(RUN_TIMEOUT_S)


def test_a_service_that_dies_in_mid_test_is_not_judged(folder: Path) -> None:
    port = free_port()
    with service_at(folder, port) as server:
        wait_for(port)
        with judging("--url", f"http://127.0.0.1:{port}") as proof:
            lines = read_until(proof, "Progress: 300/1000")
            os.killpg(server.pid, signal.SIGKILL)
            lines += proof.stdout or []
            assert proof.wait(RUN_TIMEOUT_S) == 2, "".join(lines)
    assert re.search("TEST [23] INCONCLUSIVE: ", "".join(lines))  # 3, if the line was read late
    assert lines[-1].startswith("NOT JUDGED: ")
    assert "Traceback" not in "".join(lines)


def wait_for(port: int) -> None:
    while True:
        try:
            return Api(f"http://127.0.0.1:{port}").require_healthy()
        except CannotJudge:
            continue


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_proof_that_is_told_to_stop_leaves_no_server_behind(number: signal.Signals) -> None:
    with judging("--own-server") as proof:
        lines = read_until(proof, "Progress: 100/1000")
        proof.send_signal(number)
        proof.send_signal(signal.SIGTERM)  # the impatient second one changes nothing
        lines += proof.stdout or []
        assert proof.wait(RUN_TIMEOUT_S) == 2, "".join(lines)
    assert "interrupted" in lines[-1]
    port = re.search(r"of our own at http://127.0.0.1:(\d+)", "".join(lines))
    assert port
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(port[1])), timeout=5)


# -- verdicts


def history(attempts: list[Attempt], stock: int = 100, unjudged: str = "") -> History:
    sold = sum(a.status == 200 for a in attempts)
    readings = [Reading(9e6, 9e6, stock - sold)]
    audit = Audit(9e6, 9e6, stock - sold, sold)
    return History(stock, attempts, readings, audit, unjudged, buyers=len(attempts))


def in_a_row(buyers: int) -> list[Attempt]:
    sold = [(200, 99 - n, n) for n in range(100)]
    answers = [*sold, *[(410, 0, None)] * (buyers - 100)]
    return [Attempt(0, n, f"c{n}", None, n, n + 0.5, *answer) for n, answer in enumerate(answers)]


def in_a_crowd(buyers: int) -> list[Attempt]:
    return [a._replace(start=0, end=5000) for a in in_a_row(buyers)]


def test_a_thousand_buyers_one_after_the_other_prove_nothing() -> None:
    result = judge(2, "IN A ROW", iter([history(in_a_row(1000))]))
    assert result.violations == []
    assert result.verdict == INCONCLUSIVE
    assert (False, "100 attempts were in flight at once: only 1 were") in result.checks


@pytest.mark.parametrize(
    ("sales", "wanted"),
    [
        ([in_a_row(1000), in_a_row(1000)], 2),
        ([in_a_row(1000), in_a_crowd(1000)], 2),
        ([in_a_crowd(1000)], 1),
        (
            [[Attempt(0, 0, "c", None, 0, 1, 200, -1, 1)] * 1000],
            1,
        ),  # a violation is not tried again
    ],
)
def test_a_sale_that_was_not_crowded_enough_is_held_once_more(
    monkeypatch: pytest.MonkeyPatch, sales: list[list[Attempt]], wanted: int
) -> None:
    held: list[History] = []

    def hold_next_sale(*_: object) -> History:
        held.append(history(sales[len(held)]))
        return held[-1]

    monkeypatch.setattr("proof.buyers.hold_sale", hold_next_sale)
    assert hold_crowded_sale(Api("http://127.0.0.1:1"), 100, []) is held[-1]
    assert len(held) == wanted


def test_a_violation_stays_found_when_the_sale_cant_be_judged() -> None:
    wrong = history([Attempt(0, 0, "c", None, 0, 1, 200, -1, 1)], unjudged="it was slow")
    result = judge(1, "SLOW AND WRONG", iter([wrong]))
    assert (result.verdict, result.unjudged) == (FAILED, "it was slow")


def test_what_was_found_before_the_server_died_stays_found() -> None:
    def sales() -> Iterator[History]:
        yield history([Attempt(0, 0, "c", None, 0, 1, 200, -1, 1)])
        raise CannotJudge("it died")

    result = judge(5, "DIED", sales())
    assert (result.verdict, result.unjudged) == (FAILED, "it died")


def test_no_sale_is_held_after_one_that_cant_be_judged() -> None:
    def sales() -> Iterator[History]:
        yield history(in_a_row(100), unjudged="buyers are still waiting")
        raise AssertionError("the next sale would be sold to them")

    assert judge(4, "SLOW", sales()).verdict == INCONCLUSIVE


def test_a_negative_control_that_is_not_caught_proves_nothing() -> None:
    result = judge(0, "HONEST AFTER ALL", iter([history(in_a_row(100))]))
    assert result.verdict == INCONCLUSIVE


def test_the_negative_control_is_caught() -> None:
    with naive_shop() as shop:
        assert judge(0, *negative_control(shop)).verdict == PASSED


def test_the_same_seed_gives_the_same_orders() -> None:
    def plan(seed: int) -> object:
        return repeating_rows("k", 100, random.Random(seed))

    assert plan(7) == plan(7) != plan(8)


def test_keys_are_long_and_come_in_pairs_that_differ_in_the_case_of_their_last_letters() -> None:
    keys = [str(key) for row in keyed_orders("crash-19", 900, 32) for _, key in row]
    assert len(set(keys)) == 900
    assert len({key.lower() for key in keys}) == 450
    assert {len(key) > 200 for key in keys} == {True}
    assert max(map(len, keys)) <= 255
