"""The endurance script: it passes the service as it is, and catches one that loses a purchase."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from postgres_cluster import Cluster, reason_to_skip
from service import need

from benchmarks import endure

TAKE_A_PURCHASE = """
import sys; from sqlite.engine import sqlite3
c = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=5)
c.execute("DELETE FROM purchases WHERE purchase_id = (SELECT max(purchase_id) FROM purchases)")
print(c.execute("SELECT changes()").fetchone()[0] or ""); c.close()
"""


@pytest.fixture
def short_sales(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endure, "STOCK", 300)
    monkeypatch.setattr(endure, "LOCK_TIMEOUT_S", 0.3)
    monkeypatch.setattr(endure, "FAULT_PAUSE_S", (0.0, 0.1))


def without_effect(faults: list[endure.Fault], told: str) -> set[str]:
    return {fault.__name__ for fault in faults if f"{fault.__name__} " not in told}


@pytest.mark.usefixtures("short_sales")
def test_every_fault_has_an_effect_and_breaks_no_promise(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert endure.main(["--seconds", "1", "--seed", "7"]) == 0
    told = capsys.readouterr().out
    assert "no violation" in told
    assert without_effect(endure.ON_SQLITE, told) == set()


@pytest.mark.usefixtures("short_sales")
def test_nor_does_any_on_postgresql(capsys: pytest.CaptureFixture[str]) -> None:
    need(not reason_to_skip(), reason_to_skip())
    with Cluster() as cluster:
        url = cluster.create_database("sale")
        assert endure.main(["--seconds", "1", "--seed", "7", "--postgresql", url]) == 0
    told = capsys.readouterr().out
    assert "no violation" in told
    assert without_effect(endure.ON_POSTGRESQL, told) == set()


def kept(told: str) -> list[Any]:
    """The history that the script has written into a file."""
    history = Path(re.findall(r"history in ([^\n)]+)", told)[0])
    contents = history.read_text(encoding="utf-8")
    history.unlink()
    return list(json.loads(contents))


def lose(shop: endure.Shop, chance: random.Random) -> bool:
    return bool(endure.others(TAKE_A_PURCHASE, shop.database))


def lose_in_a_restocked_sale(shop: endure.Shop, chance: random.Random) -> bool:
    return shop.records > 0 and lose(shop, chance)


def lose_and_copy(shop: endure.Shop, chance: random.Random) -> bool:
    return lose(shop, chance) and endure.copy(shop, chance)


@pytest.mark.usefixtures("short_sales")
@pytest.mark.parametrize(
    ("fault", "violation"),
    [
        (lose, "purchases acknowledged"),
        (lose_in_a_restocked_sale, "purchases acknowledged"),
        (lose_and_copy, "a copy is ok, with"),
    ],
)
def test_a_purchase_that_is_lost_is_a_violation(
    fault: endure.Fault,
    violation: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(endure, "ON_SQLITE", [fault])
    monkeypatch.setattr(endure, "RESTOCKED", 1.0)
    assert endure.main(["--seconds", "1"]) == 1
    told = capsys.readouterr().out
    assert violation in told
    assert "phantom purchase" not in told  # what earlier sales left is none
    attempts, _, log = kept(told)
    assert len(attempts) > 10
    assert log


@pytest.mark.usefixtures("short_sales")
def test_a_sale_that_could_not_be_judged_is_no_violation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(shop: endure.Shop, chance: random.Random) -> bool:
        raise TimeoutError("no second master came up\nat all")

    monkeypatch.setattr(endure, "ON_SQLITE", [fail])
    assert endure.main(["--seconds", "1"]) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("could not be judged: TimeoutError: no second master came up (seed 1")
    assert len(kept(line)) == 3
