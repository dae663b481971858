"""One run of each kind: wrk's load, a burst, a start, sales without HTTP; and what a run yields."""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from service import PROJECT, Service, purchase_request, send_at_once

from benchmarks import raw_sqlite
from benchmarks.servers import Running
from benchmarks.subjects import CUSTOMER

BURST_STOCK = 100  # units
BURST_LIMIT_S = 120.0
WRK_LIMIT_S = 60.0  # beyond its own seconds

# Percentiles come in microseconds; the last line is read back.
WRK_SCRIPT = """
wrk.method = "%s"
wrk.body = '%s'
wrk.headers["Content-Type"] = "application/json"
done = function(summary, latency)
  local e = summary.errors
  io.write(string.format("\\nfigures %%f %%f %%f %%f %%d %%d %%d\\n",
    summary.requests / summary.duration * 1e6,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, latency.max / 1e3,
    summary.requests, e.status, e.connect + e.read + e.write + e.timeout))
end
"""


class Run(NamedTuple):
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    worst_ms: float
    errors: int
    valid: bool  # the audit was consistent, and the answer the one that was to be measured


def load(running: Running, seconds: int, connections: int) -> Run:
    """Connections that ask again as soon as they are answered, for so many seconds."""
    subject = running.subject
    if subject.database_url and running.keeper:  # other subjects use that database too
        running.keeper.reset(subject.stock)
    method, path = subject.call.split()
    body = json.dumps({"customer_id": CUSTOMER}) if method == "POST" else ""
    script = running.folder / "wrk.lua"
    script.write_text(WRK_SCRIPT % (method, body))
    options = ["-t1", f"-c{connections}", f"-d{seconds}s", "-s", str(script)]
    wrk = subprocess.run(
        ["wrk", *options, running.server.url + path],
        capture_output=True,
        text=True,
        check=True,
        timeout=seconds + WRK_LIMIT_S,
    )
    figures = map(float, wrk.stdout.rpartition("figures ")[2].split())
    rate, p50_ms, p99_ms, worst_ms, requests, refused, broken = figures
    unexpected = refused if subject.status < 400 else requests - refused
    valid = running.is_consistent() and running.still_answers()
    return Run(rate, p50_ms, p99_ms, worst_ms, int(unexpected + broken), valid)


def burst(running: Running, buyers: int) -> Run:
    """All buyers at once, each on a connection of its own; the worst is the wall time."""
    sold = buyers
    if running.keeper:
        running.keeper.reset(BURST_STOCK)
        sold = min(BURST_STOCK, buyers)
    begin = time.perf_counter()
    answers = send_at_once(
        running.server.port, [purchase_request(CUSTOMER)] * buyers, BURST_LIMIT_S
    )
    times_ms = [1000 * (answer.ended_s - begin) for answer in answers]
    statuses = Counter(answer.status for answer in answers)
    as_expected = min(statuses[200], sold) + min(statuses[410], buyers - sold)
    wall_s = max(times_ms) / 1000
    return summary(times_ms, wall_s, buyers - as_expected, running.is_consistent())


def sell_raw(folder: Path, seconds: int) -> Run:
    """One open connection to a new SQLite file, without HTTP."""
    database = Path(tempfile.mkdtemp(dir=folder)) / "raw.db"
    times_ms, valid = raw_sqlite.sell(database, seconds)
    shutil.rmtree(database.parent)
    return summary(times_ms, sum(times_ms) / 1000, 0, valid)


def start_up(folder: Path) -> Run:
    """`python app.py` in a fresh folder, until the first purchase is answered."""
    fresh, begin = Path(tempfile.mkdtemp(dir=folder)), time.perf_counter()
    with Service(fresh, sys.executable, str(PROJECT / "app.py"), cwd=fresh) as demo:
        sold = demo.buy(CUSTOMER).status_code == 200
        took_s = time.perf_counter() - begin
        return summary([1000 * took_s], took_s, not sold, demo.get("/audit")["consistent"] is True)


def summary(times_ms: Sequence[float], wall_s: float, errors: int, valid: bool) -> Run:
    times_ms = sorted(times_ms)
    p99_ms = times_ms[len(times_ms) * 99 // 100]
    return Run(len(times_ms) / wall_s, median(times_ms), p99_ms, times_ms[-1], errors, valid)


def memory(service: Service) -> str:
    """Of the largest worker: Rss counts shared pages in full, Pss this process's share of them."""
    largest_kib = {"Rss": 0, "Pss": 0}
    for worker in service.workers():
        for line in Path(f"/proc/{worker}/smaps_rollup").read_text().splitlines()[1:]:
            kind, kib = line.replace(":", "").split()[:2]
            if kind in largest_kib:
                largest_kib[kind] = max(largest_kib[kind], int(kib))
    return ", ".join(f"{kind} {kib / 1024:.1f} MiB" for kind, kib in largest_kib.items())
