"""The endurance script: it passes the service as it is, and catches one that loses a purchase."""

import os
import random
from pathlib import Path

import pytest

from benchmarks import endure

TAKE_A_PURCHASE = """
import sys; from sqlite.engine import sqlite3
c = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=5)
c.execute("DELETE FROM purchases WHERE purchase_id = (SELECT max(purchase_id) FROM purchases)")
c.close()
"""


@pytest.fixture
def short_sales(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endure, "STOCK", 300)


@pytest.mark.usefixtures("short_sales")
def test_a_few_seconds_of_faults_break_no_promise(capsys: pytest.CaptureFixture[str]) -> None:
    assert endure.main(["--seconds", "8", "--seed", "7"]) == 0
    told = capsys.readouterr().out
    assert "no violation" in told
    assert sum(f"{fault.__name__} " in told for fault in endure.ON_SQLITE) >= 2


@pytest.mark.usefixtures("short_sales")
def test_a_purchase_that_is_lost_is_a_violation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lose(shop: endure.Shop, chance: random.Random) -> None:
        endure.others(TAKE_A_PURCHASE, shop.database)

    monkeypatch.setattr(endure, "ON_SQLITE", [lose])
    assert endure.main(["--seconds", "1"]) == 1
    told = capsys.readouterr().out
    assert "purchases acknowledged" in told
    history = Path(told.partition("history in ")[2].splitlines()[0])
    assert history.stat().st_size
    os.unlink(history)
