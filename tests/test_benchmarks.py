"""The benchmark measures each subject, believes no figure whose audit fails, and cleans up."""

import json
import re
import shutil
import sqlite3
import sys
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from postgres_cluster import Cluster, reason_to_skip
from service import PROJECT, need, run_to_end

from benchmarks import bench
from benchmarks.measures import Run, load
from benchmarks.report import Report
from benchmarks.servers import Running
from benchmarks.subjects import SOLD_OUT, SUBJECTS

QUICK = ["--rounds", "1", "--seconds", "1", "--connections", "4", "--workers", "2"]


def measure(folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit status and the figures."""
    need(shutil.which("wrk"), "wrk is missing")
    scratch, file = folder / "scratch", folder / "figures.json"
    scratch.mkdir()
    status = bench.main([*QUICK, "--folder", str(scratch), "--json", str(file), *arguments])
    assert list(scratch.iterdir()) == []  # nothing is left behind
    return status, json.loads(file.read_text())["figures"]


def test_every_subject_yields_figures_without_errors(tmp_path: Path) -> None:
    status, figures = measure(tmp_path, "--groups", "load")
    assert status == 0
    assert set(figures) == {one.name for one in SUBJECTS.values()} | {"raw SQLite, no HTTP"}
    for name, figure in figures.items():
        assert figure["requests_per_s"] > 0, name
        assert 0 < figure["p50_ms"] <= figure["p99_ms"] <= figure["worst_ms"], name
        assert figure["errors"] == 0, name
    assert figures["bare Flask route"]["ratio"] == 1


@pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip())
def test_sellers_on_postgresql_share_a_database_and_its_audit(tmp_path: Path) -> None:
    with Cluster() as cluster:
        url = cluster.create_database("bench")
        arguments = ("--groups", "load", "--subjects", "bare", "--postgresql", url)
        status, figures = measure(tmp_path, *arguments)
    assert status == 0
    names = ["selling", "sold out", "SELECT FOR UPDATE"]
    assert list(figures) == ["bare Flask route", *(f"{name}, PostgreSQL" for name in names)]
    assert [figure["errors"] for figure in figures.values()] == [0, 0, 0, 0]


def test_a_burst_sells_the_stock_and_refuses_everybody_else(tmp_path: Path) -> None:
    status, figures = measure(tmp_path, "--groups", "burst", "--bursts", "150")
    assert status == 0
    for name in ("selling", "bare Flask route"):
        figure = figures[f"burst of 150, {name}"]
        assert figure["errors"] == 0
        assert 0 < figure["p50_ms"] < figure["worst_ms"]  # each buyer has a time of its own


def test_a_start_and_a_long_sale_are_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, figures = measure(
        tmp_path, "--groups", "start", "long", "--slice", "1", "--purchases", "1"
    )
    assert status == 0
    assert figures["python app.py to the first purchase"]["worst_ms"] > 0
    printed = capsys.readouterr().out
    assert re.search(
        r"largest worker after [\d,]+ purchases: Rss [\d.]+ MiB, Pss [\d.]+ MiB", printed
    )
    assert re.search(r"WAL, which never shrinks while one serves: (?!0\.0)[\d.]+ MiB", printed)


def test_growth_is_measured_on_files_that_pass_the_audit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "MANY", 1000)
    status, figures = measure(tmp_path, "--groups", "growth")
    assert status == 0
    compared = {name: figure["compared_with"] for name, figure in figures.items()}
    assert compared["selling, 1,000 stored"] == "selling, 0 stored"
    assert compared["GET /inventory, 1,000 stored"] == "GET /inventory, 100 stored"
    assert [figure["errors"] for figure in figures.values()] == [0, 0, 0, 0]


OTHER_CHECKOUT = """
import os, time
from flask import Flask
app, sold_out = Flask(__name__), os.environ["INITIAL_STOCK"] == "0"
@app.post("/buy_ticket")
def buy_ticket():
    time.sleep(0.02)
    return {}, 410 if sold_out else 200
@app.get("/audit")
def audit():
    return {"consistent": True}
"""


def test_another_checkout_is_started_in_its_folder_and_compared_in_pairs(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "app.py").write_text(OTHER_CHECKOUT)
    (other / "gunicorn.conf.py").write_text("import os; bind = f'127.0.0.1:{os.environ[\"PORT\"]}'")
    status, figures = measure(tmp_path, "--against", str(other))
    assert status == 0
    for name in ("selling", "sold out", "bare Flask route"):
        assert figures[name]["compared_with"] == f"{name}, before"
        assert figures[name]["errors"] == figures[f"{name}, before"]["errors"] == 0
    assert figures["selling, before"]["requests_per_s"] <= 100  # two workers, 20 ms each
    assert figures["selling"]["ratio"] > 1
    assert figures["sold out"]["ratio"] > 1


def test_the_order_of_a_round_is_turned_around_in_the_next() -> None:
    order: list[str] = []
    run = Run(1, 1, 1, 1, 0, valid=True)

    def measure_in_turn(name: str) -> Run:
        order.append(name)
        return run

    measures = {name: partial(measure_in_turn, name) for name in "ab"}
    assert bench.take_turns(measures, rounds=3) == {"a": [run] * 3, "b": [run] * 3}
    assert order == ["a", "b", "b", "a", "a", "b"]


def test_a_ratio_is_the_median_of_the_ratios_within_a_round(tmp_path: Path) -> None:
    def rates(*per_s: float) -> list[Run]:
        return [Run(rate, 1, 1, 1, 0, valid=True) for rate in per_s]

    report = Report(tmp_path, {})
    report.add({"before": rates(20, 30, 20), "now": rates(10, 30, 40)})
    assert report.results[1].ratios() == [0.5, 1, 2]
    assert report.results[1].figures()["ratio"] == 1  # that of the medians would be 1.5
    assert "| now | before | 30 | 1.00 |" in report.table()


def test_a_failing_audit_voids_the_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lose_a_unit(running: Running, *arguments: Any) -> Run:
        with closing(sqlite3.connect(running.folder / "bench.db")) as connection, connection:
            connection.execute("UPDATE inventory SET stock = stock - 1")
        return load(running, *arguments)

    monkeypatch.setattr(bench, "load", lose_a_unit)
    status, figures = measure(tmp_path, "--groups", "load", "--subjects", "selling")
    assert status == 1
    assert figures["selling"]["valid"] is False
    assert re.search(r"\| selling \| - \| void \|", capsys.readouterr().out)


def test_another_answer_than_the_one_to_be_measured_voids_the_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SUBJECTS, "sold-out", replace(SOLD_OUT, stock=1_000_000))
    status, figures = measure(tmp_path, "--groups", "load", "--subjects", "sold-out")
    assert (status, figures["sold out"]["valid"]) == (1, False)


def test_what_cannot_be_measured_ends_with_its_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    need(shutil.which("wrk"), "wrk is missing")
    (tmp_path / "app.py").write_text("raise SystemExit('no shop here')")
    (tmp_path / "gunicorn.conf.py").write_text("preload_app = True")  # so it ends at once
    assert bench.main([*QUICK, "--against", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("Cannot measure: the service did not start")
    assert "no shop here" in told


def test_the_command_line_says_what_it_needs(tmp_path: Path) -> None:
    command = (sys.executable, str(PROJECT / "benchmarks/bench.py"))
    for arguments, reason in (
        (("--rounds", "0"), "a whole number above 0 is needed, not '0'"),
        (("--against", str(tmp_path)), f"there is no {tmp_path}/app.py"),
        (("--folder", "/nowhere"), "there is no /nowhere"),
    ):
        done = run_to_end((*command, *arguments), cwd=tmp_path)
        assert done.returncode == 2
        assert reason in done.stderr


def test_without_wrk_one_sentence_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert bench.main(QUICK) == 2
    assert capsys.readouterr().err == "wrk is missing - get it with: apt-get install wrk\n"
