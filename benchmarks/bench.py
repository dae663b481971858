"""Measure the service against a bare Flask route: python benchmarks/bench.py [--all]

Every subject runs under gunicorn with the service's own configuration file and as many workers. The
subjects take turns, round by round: a figure is the median of its rounds, a ratio the median of the
ratios within a round. A store has to pass its audit after each run, or its figure is void.
"""

import argparse
import json
import os
import selectors
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import db
from benchmarks.report import Result, Run, machine, picture, summary, table

BODY = json.dumps({"customer_id": "customer_12345"})
PLENTY = 1_000_000_000  # units
BURST_STOCK = 100  # units
BURST_LIMIT_S = 120.0
FEW, MANY = 100, 1_000_000  # purchases stored before a run
LONG_SALE_CONNECTIONS = 64
LONG_SALE_SLICE_S = 20
LONG_SALE_SLICES_MIN, LONG_SALE_SLICES_MAX = 3, 30
START_LIMIT_S = 20.0
STOP_LIMIT_S = 10.0
ANSWER_LIMIT_S = 60.0
SAMPLE_EVERY_S = 0.05
GROUPS = ("load", "burst", "start", "growth", "long")
DEFAULT_GROUPS = ("load", "burst", "start")

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


@dataclass(frozen=True)
class Subject:
    name: str
    target: str = "app:app"
    call: str = "POST /buy_ticket"
    stock: int = PLENTY
    status: int = 200
    stored: int = 0  # purchases in the file before the first run
    url: str = ""  # of a PostgreSQL server; none: an SQLite file of its own

    @property
    def is_store(self) -> bool:
        return self.target != BARE.target


@dataclass(frozen=True)
class Server:
    subject: Subject
    url: str
    pid: int
    folder: Path
    store_url: str  # who resets and audits: itself, or the service on the same PostgreSQL database

    def reset(self, stock: int) -> None:
        ask(self.store_url, "POST /reset", json.dumps({"stock": stock}))

    def is_consistent(self) -> bool:
        return (
            not self.subject.is_store
            or ask(self.store_url, "GET /audit")[1].get("consistent") is True
        )

    def still_answers(self) -> bool:
        """One more request: wrk doesn't tell one refusal from another."""
        call = self.subject.call
        return (
            ask(self.url, call, BODY if call.startswith("POST") else None)[0] == self.subject.status
        )


BARE = Subject("bare Flask route", "benchmarks.bare:app")
SELLING = Subject("selling")
SOLD_OUT = Subject("sold out", stock=0, status=410)
INVENTORY = Subject("GET /inventory", call="GET /inventory")
RAW = Subject("raw SQLite, no HTTP", target="")
SUBJECTS = {
    "bare": BARE,
    "selling": SELLING,
    "sold-out": SOLD_OUT,
    "inventory": INVENTORY,
    "raw": RAW,
}
GROWTH = [
    (replace(subject, name=f"{subject.name}, {few} stored", stored=few),
     replace(subject, name=f"{subject.name}, {MANY:,} stored", stored=MANY))
    for subject, few in ((SELLING, 0), (INVENTORY, FEW))
]  # fmt: skip


def ask(url: str, call: str, body: str | None = None) -> tuple[int, Any]:
    method, path = call.split()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(
        url + path, body.encode() if body else None, headers, method=method
    )
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_LIMIT_S) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


@contextmanager
def running(command: Sequence[str], **options: Any) -> Iterator["subprocess.Popen[bytes]"]:
    """A process of its own session: Ctrl-C reaches only this program, which then ends the others."""
    process = subprocess.Popen(command, start_new_session=True, **options)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def started(
    command: Sequence[str], folder: Path, call: str, **environment: str
) -> Iterator[tuple[str, int]]:
    """The URL and process id of a server on a free port, once it answers `call`."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    url, give_up = f"http://127.0.0.1:{port}", time.monotonic() + START_LIMIT_S
    env = {**os.environ, "HOST": "127.0.0.1", "PORT": str(port), **environment}
    with (
        open(folder / "log", "wb") as log,
        running(command, env=env, stdout=log, stderr=log) as process,
    ):
        while time.monotonic() < give_up and process.poll() is None:
            with suppress(OSError):
                if ask(url, call, BODY if call.startswith("POST") else None)[0] < 500:
                    yield url, process.pid
                    return
            time.sleep(0.01)
        raise RuntimeError(f"{command[-1]} did not start:\n{(folder / 'log').read_text()}")


@contextmanager
def serving(subject: Subject, folder: Path, workers: int, store_url: str = "") -> Iterator[Server]:
    own = Path(tempfile.mkdtemp(dir=folder))
    if subject.stored:
        fill(own / "bench.db", subject.stored)
    environment = {
        "DATABASE_URL": subject.url or f"sqlite:///{own}/bench.db",
        "INITIAL_STOCK": str(subject.stock),
        "ALLOW_RESET": "1",
        "WEB_CONCURRENCY": str(workers),
    }
    conf = str(ROOT / "gunicorn.conf.py")
    command = [
        sys.executable,
        "-m",
        "gunicorn",
        "--chdir",
        str(ROOT),
        "--config",
        conf,
        subject.target,
    ]
    call = "GET /health" if subject.target == SELLING.target else "POST /buy_ticket"
    with started(command, own, call, PYTHONPATH=str(ROOT), **environment) as (url, pid):
        yield Server(subject, url, pid, own, store_url or url)


def fill(database: Path, purchases: int) -> None:
    """Put purchases on record as if they had been sold one by one."""
    db.open_store(f"sqlite:///{database}", "Item A", PLENTY, ANSWER_LIMIT_S).create()
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("UPDATE inventory SET stock = stock - ?", (purchases,))
        connection.execute(
            "WITH RECURSIVE sale (number) AS"
            " (SELECT 1 UNION ALL SELECT number + 1 FROM sale WHERE number < ?)"
            " INSERT INTO purchases (item_id, customer_id, remaining_stock)"
            " SELECT 1, 'customer_' || number, ? - number FROM sale",
            (purchases, PLENTY),
        )


def load(
    server: Server, seconds: int, connections: int, sample: Callable[[], object] = bool
) -> Run:
    """One run of wrk; `sample` is called again and again meanwhile."""
    if server.subject.url:  # subjects that share a database
        server.reset(server.subject.stock)
    method, path = server.subject.call.split()
    script = server.folder / "wrk.lua"
    script.write_text(WRK_SCRIPT % (method, BODY if method == "POST" else ""))
    command = [
        "wrk",
        "-t1",
        f"-c{connections}",
        f"-d{seconds}s",
        "-s",
        str(script),
        server.url + path,
    ]
    output = server.folder / "wrk.out"
    with open(output, "wb") as file, running(command, stdout=file) as wrk:
        while wrk.poll() is None:
            sample()
            time.sleep(SAMPLE_EVERY_S)
    figures = map(float, output.read_text().rpartition("figures ")[2].split())
    rate, p50_ms, p99_ms, worst_ms, requests, refused, broken = figures
    unexpected = refused if server.subject.status < 400 else requests - refused
    valid = server.is_consistent() and server.still_answers()
    return Run(rate, p50_ms, p99_ms, worst_ms, int(unexpected + broken), valid)


def sell_raw(database: Path, seconds: int) -> Run:
    """The same transaction on one open connection, flushed by COMMIT, with the service's checkpoints."""
    db.open_store(f"sqlite:///{database}", "Item A", PLENTY, ANSWER_LIMIT_S).create()
    times_ms: list[float] = []
    with closing(sqlite3.connect(database, isolation_level=None)) as connection:
        for pragma in ("foreign_keys = ON", "wal_autocheckpoint = 0", "synchronous = FULL"):
            connection.execute(f"PRAGMA {pragma}")
        begin = now = time.perf_counter()
        while now < begin + seconds:
            connection.execute("BEGIN IMMEDIATE")
            (stock,) = connection.execute(db.FIND_STOCK).fetchone()
            connection.execute(db.TAKE_UNIT)
            connection.execute(db.RECORD_PURCHASE, ("customer_12345", None, stock - 1))
            connection.execute("COMMIT")
            if len(times_ms) % db.CHECKPOINT_EVERY == 0:
                connection.execute("PRAGMA wal_checkpoint(RESTART)")
            before, now = now, time.perf_counter()
            times_ms.append(1000 * (now - before))
        initial, stock, records = connection.execute(db.COUNT_PURCHASES).fetchone()
    return summary(times_ms, now - begin, 0, stock + records == initial)


def burst(server: Server, connections: int) -> Run:
    """All buyers at once, each on a connection of its own; the worst is the wall time."""
    sold = connections
    if server.subject.is_store:
        server.reset(BURST_STOCK)
        sold = min(BURST_STOCK, connections)
    begin = time.perf_counter()
    ends_s, statuses = crowd(int(server.url.rpartition(":")[2]), connections)
    times_ms = [1000 * (end - begin) for end in ends_s] or [1000 * BURST_LIMIT_S]
    as_expected = min(statuses[b"200"], sold) + min(statuses[b"410"], connections - sold)
    return summary(
        times_ms, max(times_ms) / 1000, connections - as_expected, server.is_consistent()
    )


def crowd(port: int, connections: int) -> tuple[list[float], "Counter[bytes]"]:
    """When each connection ended, and how often each status was given (b"": none)."""
    head = (
        f"POST /buy_ticket HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    )
    request = f"{head}Content-Length: {len(BODY)}\r\n\r\n{BODY}".encode()
    ends_s, statuses, give_up = [], Counter[bytes](), time.monotonic() + BURST_LIMIT_S
    buyers: dict[int, socket.socket] = {}
    with selectors.DefaultSelector() as selector, ExitStack() as sockets:
        for _ in range(connections):
            buyer = sockets.enter_context(socket.socket())
            buyers[buyer.fileno()] = buyer
            buyer.setblocking(False)
            buyer.connect_ex(("127.0.0.1", port))
            selector.register(buyer, selectors.EVENT_WRITE, b"")
        while selector.get_map() and time.monotonic() < give_up:
            for key, _ in selector.select(1):
                received = talk(key, request)
                if received is None:
                    selector.unregister(key.fileobj)
                    buyers[
                        key.fd
                    ].close()  # gunicorn waits for that before its worker serves the next
                    ends_s.append(time.perf_counter())
                    statuses[key.data[9:12]] += 1
                else:
                    selector.modify(key.fileobj, selectors.EVENT_READ, received)
    return ends_s, statuses


def talk(key: selectors.SelectorKey, request: bytes) -> bytes | None:
    """Send the request once connected, then read; returns what was received so far, None at the end."""
    buyer: Any = key.fileobj
    with suppress(OSError):
        if key.events == selectors.EVENT_WRITE:
            buyer.send(request)
            return b""
        if received := buyer.recv(65536):
            return bytes(key.data + received)
    return None


def start_up(folder: Path) -> Run:
    """`python app.py` in a fresh folder, until the first purchase is answered."""
    fresh, begin = Path(tempfile.mkdtemp(dir=folder)), time.perf_counter()
    command = [sys.executable, str(ROOT / "app.py")]
    with started(
        command, fresh, "POST /buy_ticket", DATABASE_URL=f"sqlite:///{fresh}/bench.db"
    ) as (url, _):
        took_s = time.perf_counter() - begin
        return summary([1000 * took_s], took_s, 0, ask(url, "GET /audit")[1]["consistent"] is True)


def long_sale(folder: Path, options: argparse.Namespace) -> tuple[list[Result], dict[str, str]]:
    """Sell for a minute and 100,000 purchases: the slowest request, memory, how far the WAL grows."""
    runs: list[Run] = []
    wal_bytes = [0]
    with serving(SELLING, folder, options.workers) as server:
        wal = server.folder / "bench.db-wal"
        server.still_answers()
        before = memory(server.pid)
        while len(runs) < LONG_SALE_SLICES_MAX:
            sample = lambda: wal_bytes.append(max(wal_bytes.pop(), wal.stat().st_size))
            runs.append(load(server, options.slice, LONG_SALE_CONNECTIONS, sample))
            sold = ask(server.url, "GET /audit")[1]["purchase_records"]
            if sold >= options.purchases and len(runs) >= LONG_SALE_SLICES_MIN:
                break
        facts = {
            "largest worker at the start": before,
            f"largest worker after {sold:,} purchases": memory(server.pid),
            "largest WAL meanwhile": f"{wal_bytes[0] / 2**20:.1f} MiB",
            "slowest request meanwhile": f"{max(run.worst_ms for run in runs):.0f} ms",
        }
    name = f"long sale, {LONG_SALE_CONNECTIONS} connections"
    return [Result(name, runs, runs)], facts


def memory(pid: int) -> str:
    """Of the largest worker: Rss counts shared pages in full, Pss this process's share of them."""
    largest_kib = {"Rss": 0, "Pss": 0}
    for worker in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        for line in Path(f"/proc/{worker}/smaps_rollup").read_text().splitlines()[1:]:
            kind, kib = line.replace(":", "").split()[:2]
            if kind in largest_kib:
                largest_kib[kind] = max(largest_kib[kind], int(kib))
    return ", ".join(f"{kind} {kib / 1024:.1f} MiB" for kind, kib in largest_kib.items())


def take_turns(
    subjects: Sequence[Subject],
    folder: Path,
    options: argparse.Namespace,
    measure: Callable[[Server], Run],
) -> list[Result]:
    """Start all subjects, then measure one after another, round by round; compared with the first."""
    runs: dict[str, list[Run]] = {subject.name: [] for subject in subjects}
    with ExitStack() as stack:
        servers: list[Server] = []
        for subject in [one for one in subjects if one.target]:
            same = [
                server.store_url
                for server in servers
                if subject.url and server.subject.url == subject.url
            ]
            servers.append(
                stack.enter_context(serving(subject, folder, options.workers, *same[:1]))
            )
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}: {'; '.join(runs)}", file=sys.stderr)
            for server in servers:
                runs[server.subject.name].append(measure(server))
            if RAW in subjects:
                database = Path(tempfile.mkdtemp(dir=folder)) / "raw.db"
                runs[RAW.name].append(sell_raw(database, options.seconds))
    return [Result(name, runs[name], runs[subjects[0].name]) for name in runs]


def on_postgresql(url: str) -> list[Subject]:
    subjects = [
        replace(one, name=f"{one.name}, PostgreSQL", url=url) for one in (SELLING, SOLD_OUT)
    ]
    if (ROOT / "benchmarks/select_for_update.py").exists():
        target = "benchmarks.select_for_update:app"
        subjects.append(
            replace(SELLING, name="SELECT FOR UPDATE, PostgreSQL", target=target, url=url)
        )
    return subjects


def measure(folder: Path, options: argparse.Namespace) -> tuple[list[Result], dict[str, str]]:
    results: list[Result] = []
    facts: dict[str, str] = {}

    def under_load(server: Server) -> Run:
        return load(server, options.seconds, options.connections)

    if "load" in options.groups:
        subjects = [SUBJECTS[name] for name in options.subjects]
        results += take_turns(subjects + (on_postgresql(options.postgresql) if options.postgresql else []),
                              folder, options, under_load)  # fmt: skip
    for size in options.bursts if "burst" in options.groups else ():
        bursts = take_turns([BARE, SELLING], folder, options, partial(burst, connections=size))
        results += [replace(one, name=f"burst of {size:,}, {one.name}") for one in bursts]
    for pair in GROWTH if "growth" in options.groups else ():
        results += take_turns(pair, folder, options, under_load)
    if "start" in options.groups:
        runs = [start_up(folder) for _ in range(options.rounds)]
        results.append(Result("python app.py to the first purchase", runs, runs))
    if "long" in options.groups:
        long, facts = long_sale(folder, options)
        results += long
    return results, facts


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--rounds", type=int, default=3)
    add("--seconds", type=int, default=4, help="of one run of wrk (default 4)")
    add("--connections", type=int, default=32)
    add("--workers", type=int, default=4)
    add("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS), help="of the group load")
    add("--groups", nargs="+", choices=GROUPS, default=DEFAULT_GROUPS)
    add(
        "--all",
        dest="groups",
        action="store_const",
        const=GROUPS,
        help="all groups, about ten minutes",
    )
    add("--bursts", nargs="+", type=int, default=[1_000, 10_000], help="connections at once")
    add("--purchases", type=int, default=100_000, help="of the group long, at least")
    add(
        "--slice",
        type=int,
        default=LONG_SALE_SLICE_S,
        help="seconds between the audits of the group long",
    )
    add(
        "--postgresql",
        metavar="URL",
        help="postgresql://...: measure on that server too; it is emptied",
    )
    add("--folder", type=Path, help="where the databases are put (default: the temporary folder)")
    add("--json", type=Path, metavar="FILE", help="all figures, of each round")
    add("--picture", type=Path, metavar="FILE.svg")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """0: measured, 1: a figure is void, 2: it can't be measured here."""
    options = parse(arguments)
    if shutil.which("wrk") is None:
        print("wrk is missing - get it with: apt-get install wrk", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        facts = machine(Path(folder), options.workers, options.connections)
        results, more = measure(Path(folder), options)
    facts |= more
    print(table(results, facts))
    if options.json:
        figures = {one.name: one.figures() for one in results}
        options.json.write_text(json.dumps({"facts": facts, "figures": figures}, indent=2) + "\n")
    if options.picture:
        options.picture.write_text(picture(results), encoding="utf-8")
    return 0 if all(one.valid for one in results) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as after Ctrl-C
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
