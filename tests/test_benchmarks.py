"""The benchmark measures each subject, believes no figure whose audit fails, and cleans up."""

import json
import re
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from service import need

from benchmarks import bench
from benchmarks.report import Run

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
    picture = tmp_path / "picture.svg"
    status, figures = measure(tmp_path, "--groups", "load", "--picture", str(picture))
    assert status == 0
    assert set(figures) == {subject.name for subject in bench.SUBJECTS.values()}
    for name, figure in figures.items():
        assert figure["requests_per_s"] > 0, name
        assert 0 < figure["p50_ms"] <= figure["p99_ms"] <= figure["worst_ms"], name
        assert figure["errors"] == 0, name
    assert figures["bare Flask route"]["ratio"] == 1
    assert "sold out" in picture.read_text()


def test_a_burst_sells_the_stock_and_refuses_everybody_else(tmp_path: Path) -> None:
    status, figures = measure(tmp_path, "--groups", "burst", "--bursts", "150")
    assert status == 0
    assert figures["burst of 150, selling"]["errors"] == 0
    assert figures["burst of 150, bare Flask route"]["errors"] == 0


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
    assert re.search(r"largest WAL meanwhile: (?!0\.0)[\d.]+ MiB", printed)


def test_growth_is_measured_on_a_file_that_passes_the_audit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "GROWTH", [[replace(bench.INVENTORY, name="stored", stored=1000)]])
    status, figures = measure(tmp_path, "--groups", "growth")
    assert (status, figures["stored"]["errors"]) == (0, 0)


def test_a_failing_audit_voids_the_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lose_a_unit(server: bench.Server, *arguments: Any) -> Run:
        with closing(sqlite3.connect(server.folder / "bench.db")) as connection, connection:
            connection.execute("UPDATE inventory SET stock = stock - 1")
        return load(server, *arguments)

    load = bench.load
    monkeypatch.setattr(bench, "load", lose_a_unit)
    status, figures = measure(tmp_path, "--groups", "load", "--subjects", "selling")
    assert status == 1
    assert figures["selling"]["valid"] is False
    assert re.search(r"\| selling \| void \|", capsys.readouterr().out)


def test_another_answer_than_the_one_to_be_measured_voids_the_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(bench.SUBJECTS, "sold-out", replace(bench.SOLD_OUT, stock=1_000_000))
    status, figures = measure(tmp_path, "--groups", "load", "--subjects", "sold-out")
    assert (status, figures["sold out"]["valid"]) == (1, False)


def test_without_wrk_one_sentence_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert bench.main(QUICK) == 2
    assert capsys.readouterr().err == "wrk is missing - get it with: apt-get install wrk\n"
