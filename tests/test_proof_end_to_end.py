"""The proof as a command: it passes an honest server, fails each broken one, and says when it can't judge."""

import http.server
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
from contextlib import contextmanager
from pathlib import Path

import pytest
from broken_server import FAULTS

import proof_of_correctness as proof

ROOT = Path(__file__).parents[1]
RUN_TIMEOUT_S = 120
TRIES_MAX = 3  # some faults hit one sale in 200: a run may be lucky
CAUGHT_AS = {
    "no_lock": {"duplicate level"},
    "no_recheck": {"oversold"},
    "refill": {"oversold"},
    "unstored": {"lost purchase"},
    "unacknowledged": {
        "phantom purchase",
        "one key, different answers",
    },  # the latter if it had a key
    "same_level": {"duplicate level", "oversold"},  # the latter if it hit the first unit
    "after_sell_out": {"oversold"},
    "stale": {"not linearizable"},
    "sells_again": {"one key, different answers"},
}
ONLY_POSIX = pytest.mark.skipif(os.name != "posix", reason="gunicorn and SIGKILL are POSIX")


def command(folder, *arguments):
    return [
        sys.executable,
        "-u",
        str(folder / "proof_of_correctness.py"),
        "--seed",
        "7",
        *arguments,
    ]


def environment(**more):
    names = ("API_URL", "DATABASE_URL", "TOTAL_REQUESTS", "CONCURRENT_PROCESSES")
    return (
        {k: v for k, v in os.environ.items() if k not in names}
        | {"PYTHONIOENCODING": "utf-8"}
        | more
    )


def run(folder, *arguments, **more):
    done = subprocess.run(
        command(folder, *arguments),
        env=environment(**more),
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=RUN_TIMEOUT_S,
        check=False,
    )
    assert "Traceback" not in done.stdout + done.stderr
    return done


@pytest.fixture
def closed_url():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    return f"http://127.0.0.1:{port}"


@pytest.fixture
def folder(tmp_path):
    """The proof beside a broken server called app.py, which it starts and kills as it would the service."""
    shutil.copy(ROOT / "proof_of_correctness.py", tmp_path)
    shutil.copy(ROOT / "tests" / "broken_server.py", tmp_path / "app.py")
    return tmp_path


class Seller(http.server.BaseHTTPRequestHandler):
    """An honest seller in memory, for the cases that need no process of their own."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "{}")
        with self.server.lock:
            status, answer = self.server.answer(self.path, body, self.headers["Idempotency-Key"])
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST

    def log_message(self, *_):
        pass


class Shop(http.server.ThreadingHTTPServer):
    request_queue_size = 500
    daemon_threads = True

    def __init__(self, overrides):
        super().__init__(("127.0.0.1", 0), Seller)
        self.lock, self.overrides, self.sold, self.stock = threading.Lock(), overrides, {}, 0
        self.wait = threading.Event()

    def answer(self, path, body, key):
        if path in self.overrides:
            return self.overrides[path]
        if path == "/reset":
            self.stock, self.sold = body["stock"], {}
        elif path == "/buy_ticket" and (key or len(self.sold)) not in self.sold:
            self.wait.wait(self.overrides.get("delay_s", 0))
            if self.stock == 0:
                return 410, {"remaining_stock": 0}
            self.stock -= 1
            answer = 200, {"remaining_stock": self.stock, "purchase_id": len(self.sold)}
            self.sold[key or len(self.sold)] = answer
            return answer
        elif path == "/buy_ticket":
            return self.sold[key]
        return 200, {
            "status": "ok",
            "current_stock": self.stock,
            "purchase_records": len(self.sold),
        }


@contextmanager
def shop(**overrides):
    paths = {name if name == "delay_s" else f"/{name}": value for name, value in overrides.items()}
    with Shop(paths) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


SMALL = ("--stock", "5", "--buyers", "20", "--processes", "2")


@ONLY_POSIX
def test_an_honest_server_is_proven_with_the_figures_and_the_page_that_were_asked_for(
    folder, closed_url
):
    figures, page = folder / "figures.json", folder / "page.html"
    done = run(folder, "--url", closed_url, "--json", str(figures), "--report", str(page))
    assert done.returncode == 0, done.stdout
    assert f"Nobody answers at {closed_url}" in done.stdout
    told = json.loads(figures.read_text())
    assert [test["verdict"] for test in told["tests"]] == ["PASSED"] * 6
    assert told["seed"] == 7
    assert told["tests"][5]["figures"]["kills_in_mid_sale"] >= 10
    assert told["tests"][2]["figures"]["in_flight_max"] >= 100
    html = page.read_text(encoding="utf-8")
    assert html.count('<svg viewBox="0 0 960') == 18
    assert not re.search(r"<script|https?://", html)
    look = re.search(TEST_2_LOOK, done.stdout)
    assert look, done.stdout
    progress = sorted(map(int, re.findall(r"Progress: (\d+)/1000", look[0])))
    assert progress == list(range(100, 1001, 100))


TEST_2_LOOK = (
    r"={60}\nTEST 2: OVERSELLING PREVENTION \(1000 buyers, 100 tickets\)\n={60}\n"
    r"Inventory reset to 100 units\nLaunching 1000 concurrent purchase attempts...\n"
    r"(Progress: \d+00/1000\n){10}"
    r"RESULTS:\n  Total time: \d+\.\d\ds\n  Throughput: \d+\.\d\d requests/second\n"
    r"  Successful purchases: 100\n  Sold out responses: 900\n  Server busy responses: 0\n  Errors: 0\n"
    r"  Response times: average [\d.]+ms  min [\d.]+ms  p50 [\d.]+ms  p99 [\d.]+ms  max [\d.]+ms\n"
    r"(  .*\n)*\nVERIFICATION:\n  ✓ Exactly 100 purchases succeeded\n  ✓ All 1000 requests accounted for\n"
    r"  ✓ Final inventory is 0 \(not negative!\)\n  ✓ Database has exactly 100 purchase records\n"
    r"  ✓ History is linearizable\nTEST 2 PASSED! No race conditions detected!\n"
)


@ONLY_POSIX
@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault not in ("none", "refill")])
def test_a_broken_server_is_caught_with_a_violation_that_names_what_happened(
    folder, closed_url, fault
):
    figures = folder / "figures.json"
    with broken_server(folder, closed_url, fault):
        for _ in range(TRIES_MAX):
            done = run(ROOT, "--url", closed_url, "--buyers", "500", "--json", str(figures))
            if done.returncode == 1:
                break
    assert done.returncode == 1, done.stdout
    assert CAUGHT_AS[fault] & kinds_in(figures)
    assert "NOT CORRECT" in done.stdout


@ONLY_POSIX
def test_a_stock_that_is_refilled_when_a_worker_starts_is_caught_by_killing_workers(
    folder, closed_url
):
    figures = folder / "figures.json"
    done = run(
        folder,
        "--url",
        closed_url,
        "--buyers",
        "100",
        "--json",
        str(figures),
        BROKEN_FAULT="refill",
    )
    assert done.returncode == 1, done.stdout
    assert CAUGHT_AS["refill"] & kinds_in(figures)


def kinds_in(figures):
    return {
        v["kind"]
        for test in json.loads(figures.read_text())["tests"][1:]
        for v in test["violations"]
    }


@contextmanager
def broken_server(folder, url, fault="none"):
    port, database = url.rpartition(":")[2], f"sqlite:///{folder}/sale.db"
    env = environment(PORT=port, DATABASE_URL=database, BROKEN_FAULT=fault)
    with (folder / "log").open("w") as log:
        app = [sys.executable, str(folder / "app.py")]
        server = subprocess.Popen(app, env=env, start_new_session=True, stderr=log)
    try:
        proof.wait_until_healthy(proof.Api(url), server)
        yield server
    finally:
        proof.stop(server)


def test_a_slow_server_is_proven_and_the_crash_test_skipped_as_it_was_started_by_hand():
    with shop(delay_s=0.01) as url:
        done = run(ROOT, "--url", url, *SMALL)
    assert done.returncode == 0, done.stdout
    assert "TEST 5 SKIPPED" in done.stdout


def test_a_server_that_forbids_reset_is_not_judged_and_the_output_says_what_to_switch_on():
    with shop(reset=(403, {"message": "no"})) as url:
        done = run(ROOT, "--url", url, *SMALL)
    assert done.returncode == 2
    assert "ALLOW_RESET=1" in done.stdout


def test_a_console_that_knows_only_ascii_gets_question_marks():
    with shop(reset=(403, {"message": "no"})) as url:
        done = run(ROOT, "--url", url, *SMALL, PYTHONIOENCODING="ascii")
    assert "  ? The checker catches a seller without a lock" in done.stdout


@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [
        ("--buyers", "0", "a whole number from 1 to"),
        ("--processes", "1000", "a whole number from 1 to"),
        ("--report", "no/such/folder/page.html", "there is no folder"),
    ],
)
def test_an_option_that_makes_no_sense_is_one_clear_line(option, value, wanted):
    done = run(ROOT, option, value)
    assert done.returncode == 2
    assert wanted in done.stderr


def test_something_else_that_answers_is_not_judged():
    with shop(health=(200, {"hello": "world"})) as url:
        done = run(ROOT, "--url", url, *SMALL)
    assert done.returncode == 2
    assert "is not this API" in done.stdout


def test_a_server_that_is_always_busy_proves_nothing():
    with shop(buy_ticket=(503, {"message": "busy"})) as url:
        crowd = proof.Crowd(url, 0, proof.single_orders(20))
        result = proof.judge(2, "BUSY", proof.sales(proof.Api(url), 5, [crowd]))
    assert result.violations == []
    assert (result.verdict, result.checks[0][0]) == (proof.INCONCLUSIVE, False)


def test_what_was_found_before_the_server_died_stays_found():
    def sales():
        yield history([proof.Attempt(0, 0, "c", None, 0, 1, 200, -1, 1)])
        raise proof.NoAnswer("it died")

    assert proof.judge(5, "DIED", sales()).verdict == proof.FAILED
    with pytest.raises(proof.NoAnswer):
        proof.judge(5, "DIED", proof.sales(proof.Api("http://127.0.0.1:1"), 1, []))


def test_an_answer_that_the_api_does_not_know_is_a_violation():
    with shop(buy_ticket=(500, {"message": "oops"})) as url:
        done = run(ROOT, "--url", url, *SMALL)
    assert done.returncode == 1
    assert "unaccounted answer" in done.stdout


@contextmanager
def judging(folder, *arguments):
    """The proof while it runs, one that ends with this block."""
    with subprocess.Popen(
        command(folder, *arguments),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


@ONLY_POSIX
def test_a_server_that_dies_in_mid_test_is_not_judged(folder, closed_url):
    lines = []
    with broken_server(folder, closed_url) as server, judging(ROOT, "--url", closed_url) as judge:
        for line in judge.stdout:
            lines.append(line)
            if line.startswith("Progress: 300/1000"):
                os.killpg(server.pid, signal.SIGKILL)
        assert judge.wait(RUN_TIMEOUT_S) == 2, "".join(lines)
    assert re.search("TEST [23] INCONCLUSIVE", "".join(lines))  # 3, if the line was read late
    assert "Traceback" not in "".join(lines)


@ONLY_POSIX
def test_a_proof_that_is_told_to_stop_leaves_no_server_behind(folder, closed_url):
    lines = []
    with judging(folder, "--url", closed_url) as judge:
        for line in judge.stdout:
            lines.append(line)
            if line.startswith("Progress: 100/1000"):
                judge.terminate()
        assert judge.wait(RUN_TIMEOUT_S) == 2, "".join(lines)
    assert "interrupted" in lines[-1]
    port = re.search(r"of our own at http://127.0.0.1:(\d+)", "".join(lines))[1]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(port)), timeout=5)


def history(attempts, stock=100):
    sold = sum(a.status == 200 for a in attempts)
    readings = [proof.Reading(9e6, 9e6, stock - sold)]
    return proof.History(stock, attempts, readings, proof.Audit(9e6, 9e6, stock - sold, sold), 0.1)


def test_a_thousand_buyers_one_after_the_other_prove_nothing():
    attempts = [
        proof.Attempt(0, n, f"c{n}", None, n, n + 0.5, *((200, 99 - n, n) if n < 100 else (410, 0)))
        for n in range(1000)
    ]
    result = proof.judge(2, "IN A ROW", iter([history(attempts)]))
    assert result.violations == []
    assert result.verdict == proof.INCONCLUSIVE


def test_a_negative_control_that_is_not_caught_proves_nothing():
    attempts = [proof.Attempt(0, 0, "c", None, 0, 1, 200, 99, 1)]
    result = proof.judge(0, "HONEST AFTER ALL", iter([history(attempts)]))
    assert result.verdict == proof.INCONCLUSIVE


def test_the_negative_control_is_caught():
    with proof.naive_shop() as api:
        assert proof.judge(0, "NEGATIVE CONTROL", proof.until_caught(api)).verdict == proof.PASSED


def test_the_same_seed_gives_the_same_orders():
    def plan(seed):
        return proof.repeating_rows("k", 100, random.Random(seed))

    assert plan("7") == plan("7") != plan("8")
