"""The proof as a command: what it prints, its exit statuses, and that 1 is a violation only."""

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import pytest
from sellers import STOCK, AuditInText, Fast, KeysCut, Seller, Slow, WrongInitialStock, selling

PROJECT = Path(__file__).parents[1]
PROOF = str(PROJECT / "proof_of_correctness.py")
RUN_TIMEOUT_S = 120
OWN = ("API_URL", "DATABASE_URL", "TOTAL_REQUESTS", "CONCURRENT_PROCESSES", "ALLOW_RESET")
SMALL = ("--stock", "5", "--buyers", "20", "--processes", "2", "--tests", "1-2")


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in OWN}
    return kept | {"PYTHONIOENCODING": "utf-8"} | more


def run(
    *arguments: str, command: tuple[str, ...] = (PROOF,), stdout: Any = None, **more: str
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *command, *arguments],
        env=environment(**more),
        stdout=stdout or subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        timeout=RUN_TIMEOUT_S,
        check=False,
    )
    assert "Traceback" not in (done.stdout or "") + done.stderr
    return done


def patched(statements: str) -> tuple[str, ...]:
    """The command after `statements` have changed the program."""
    lines = f"import sys; sys.path.insert(0, {str(PROJECT)!r})\n{statements}"
    return ("-c", f"{lines}\nimport proof_of_correctness as p\nsys.exit(p.main())")


@pytest.fixture
def dead_url() -> str:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    return f"http://127.0.0.1:{port}"


# -- which server is judged


@pytest.mark.parametrize("how", ["option", "variable"])
def test_an_address_that_nobody_answers_at_is_not_judged(dead_url: str, how: str) -> None:
    done = run("--url", dead_url) if how == "option" else run(API_URL=dead_url)
    assert done.returncode == 2
    assert f"NOT JUDGED: GET {dead_url}/health: no answer" in done.stdout


def test_the_address_may_be_that_of_the_purchase_itself() -> None:
    with selling(Fast()) as url:
        done = run(*SMALL, API_URL=f"{url}/buy_ticket/")
    assert done.returncode == 0, done.stdout
    assert f"Judging the server at {url}: its purchases will be deleted" in done.stdout


def test_a_judged_server_is_left_with_the_configured_stock() -> None:
    seller = Fast()
    with selling(seller) as url:
        done = run("--url", url, *SMALL)
    assert f"The stock there is as configured again: {STOCK} units" in done.stdout
    assert (seller.stock, seller.purchases) == (STOCK, {})


def test_a_server_of_another_kind_is_not_judged() -> None:
    class Greeter(Seller):
        def answer(self, request: Any) -> Any:
            return super().answer(request)._replace(body={"hello": "world"})

    with selling(Greeter()) as url:
        done = run("--url", url)
    assert done.returncode == 2
    assert "is not this API" in done.stdout


# -- what is said


def test_the_environment_sets_defaults() -> None:
    with selling(Fast()) as url:
        done = run("--tests", "2-3", API_URL=url, TOTAL_REQUESTS="300", CONCURRENT_PROCESSES="2")
    assert done.returncode == 0, done.stdout
    assert "TEST 2: OVERSELLING PREVENTION (300 buyers, 100 tickets)" in done.stdout
    assert "TEST 3: MULTIPLE PROCESSES (2 processes, 150 attempts each" in done.stdout


def test_the_tests_that_were_left_out_are_named_and_the_control_is_not_one_of_them() -> None:
    with selling(Fast()) as url:
        done = run("--url", url, *SMALL)
    assert "TEST 0 PASSED: caught, as it must be" in done.stdout
    left_out = ", ".join(f"test {number} not run" for number in (3, 4, 5))
    assert f"PROVEN: every unit was sold exactly once ({left_out}) (seed " in done.stdout
    assert "10 sales were judged. With 95% confidence this excludes a fault" in done.stdout


def test_a_test_with_keys_tells_sales_from_replays() -> None:
    with selling(Fast()) as url:
        done = run("--url", url, "--tests", "4", "--seed", "7")
    assert done.returncode == 0, done.stdout
    counted = re.search(r"purchases: 800 sold, ([\d,]+) replayed, ([\d,]+) refused", done.stdout)
    assert counted
    assert all(int(number.replace(",", "")) > 100 for number in counted.groups())
    assert "Exactly 800 purchases succeeded" in done.stdout


def test_the_limit_of_time_is_said_beforehand_and_kept() -> None:
    command = patched("import proof_of_correctness as p; p.LIMIT_S = -48")
    with selling(Slow()) as url:
        done = run("--url", url, command=command)
    assert "This ends within 32 s, judged or not" in done.stdout
    assert done.returncode == 2
    assert "NOT JUDGED: not done within 2 s: take fewer --buyers" in done.stdout


def test_a_console_that_knows_only_ascii_gets_question_marks() -> None:
    with selling(AuditInText()) as url:
        done = run("--url", url, PYTHONIOENCODING="ascii")
    assert "  ? The checker catches a seller without a lock" in done.stdout


def test_help_names_every_option_even_without_docstrings() -> None:
    done = run("--help", command=("-OO", PROOF))
    assert done.returncode == 0
    options = "url stock buyers processes tests own-server delete-purchases cache-age seed json"
    assert all(f"--{option} " in done.stdout for option in [*options.split(), "report"])
    assert "exactly once" in done.stdout or "each unit once" in done.stdout


# -- what makes no sense is refused before any sale is wiped


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("--buyers", "0"), "0 is not in the range 1<=x<=5000"),
        (("--buyers", "many"), "'many' is not a valid integer range"),
        (("--processes", "1000"), "1000 is not in the range 1<=x<=32"),
        (("--stock", "100", "--buyers", "100"), "test 2 needs more buyers than tickets: 100"),
        (("--tests", "1-9"), "has to be like 1-3 or 2,4"),
        (("--tests", "3-1"), "'3-1' names none of the tests"),
        (("--tests", "0"), "'0' names none of the tests"),
        (("--url", "127.0.0.1:8000"), "has to be the address of a service, like http://"),
        (("--cache-age", "-1"), "-1.0 is not in the range"),
        (("--report", "no/such/folder/page.html"), "there is no folder no/such/folder"),
        (("--report", "."), ". is a folder: name a file"),
        (("--json", "."), ". is a folder: name a file"),
    ],
)
def test_an_option_that_makes_no_sense_is_one_clear_line(
    arguments: tuple[str, ...], wanted: str
) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert wanted in " ".join(done.stderr.split())
    assert not done.stdout


def test_as_many_buyers_as_tickets_are_enough_without_test_2() -> None:
    with selling(Fast()) as url:
        done = run("--url", url, "--stock", "20", "--buyers", "20", "--tests", "1")
    assert done.returncode == 0, done.stdout


def test_too_few_open_files_are_named_with_the_command_that_raises_them() -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))

    with selling(Fast()) as url:
        done = subprocess.run(
            [sys.executable, PROOF, "--url", url, "--buyers", "500"],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=RUN_TIMEOUT_S,
            check=False,
            preexec_fn=limit,
        )
    assert done.returncode == 2
    assert "524 open files are needed, and the limit is 256: raise it (ulimit -n)" in done.stdout


# -- 1 is a violation, and nothing else is


def test_a_violation_stays_one_when_the_report_cant_be_written() -> None:
    with selling(WrongInitialStock()) as url:
        done = run("--url", url, *SMALL, "--report", "/dev/full")
    assert done.returncode == 1
    assert "NOT CORRECT: violations in test 1, test 2" in done.stdout
    assert done.stderr == "A file is not written: OSError: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("option", ["--report", "--json"])
def test_a_file_that_cant_be_written_is_not_a_proof(option: str) -> None:
    with selling(Fast()) as url:
        done = run("--url", url, *SMALL, option, "/dev/full")
    assert done.returncode == 2
    assert "NOT JUDGED: OSError: [Errno 28] No space left on device" in done.stdout
    assert "PROVEN" not in done.stdout


def test_a_full_disk_behind_the_output_is_named() -> None:
    with selling(Fast()) as url, open("/dev/full", "w") as full:
        done = run("--url", url, *SMALL, stdout=full)
    assert done.returncode == 2
    assert done.stderr == "NOT JUDGED: OSError: [Errno 28] No space left on device\n"


def test_a_closed_pipe_is_named() -> None:
    with selling(Fast()) as url:
        command = [sys.executable, PROOF, "--url", url, *SMALL]
        with subprocess.Popen(
            command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as judge:
            assert judge.stdout
            assert judge.stderr
            judge.stdout.readline()
            judge.stdout.close()
            told = judge.stderr.read()
            assert judge.wait(RUN_TIMEOUT_S) == 2
    assert told == "NOT JUDGED: BrokenPipeError: [Errno 32] Broken pipe\n"


def test_a_machine_without_a_temporary_folder_is_named() -> None:
    broken = "import tempfile; tempfile._candidate_tempdir_list = lambda: ['/nowhere']"
    done = run("--own-server", command=patched(broken))
    assert done.returncode == 2
    assert "NOT JUDGED: FileNotFoundError: [Errno 2] No usable temporary directory" in done.stdout


def test_an_exception_that_nobody_foresaw_is_not_a_violation() -> None:
    broken = "import proof.report; proof.report.page = lambda *_: 1 / 0"
    with selling(Fast()) as url:
        done = run("--url", url, *SMALL, "--report", os.devnull, command=patched(broken))
    assert done.returncode == 2
    assert "NOT JUDGED: ZeroDivisionError: division by zero" in done.stdout


def test_an_exception_in_the_checker_is_not_a_violation() -> None:
    broken = "import proof.checker; proof.checker.check = lambda *_: 1 / 0"
    with selling(Fast()) as url:
        done = run("--url", url, *SMALL, command=patched(broken))
    assert done.returncode == 2
    assert "NOT JUDGED: ZeroDivisionError: division by zero" in done.stdout


def test_a_python_without_the_packages_is_told_what_to_install() -> None:
    done = run(command=("-S", PROOF))
    assert done.returncode == 2
    assert "NOT JUDGED: No module named 'click': install requirements.txt" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_interrupts_and_the_stock_is_left_as_configured(number: signal.Signals) -> None:
    seller = Slow()
    with selling(seller) as url, judging("--url", url) as judge:
        lines = read_until(judge, "Launching 100 ")
        judge.send_signal(number)
        lines += judge.stdout or []
        assert judge.wait(RUN_TIMEOUT_S) == 2, "".join(lines)
    assert lines[-1].startswith("NOT JUDGED: interrupted")
    assert seller.initial == STOCK


@contextmanager
def judging(*arguments: str, **more: str) -> Iterator[subprocess.Popen[str]]:
    """The proof while it runs, one that ends with this block."""
    with subprocess.Popen(
        [sys.executable, "-u", PROOF, *arguments],
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    ) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                process.kill()


def read_until(process: subprocess.Popen[str], start: str) -> list[str]:
    lines: list[str] = []
    output: IO[str] | None = process.stdout
    assert output
    for line in output:
        lines.append(line)
        if line.startswith(start):
            return lines
    raise AssertionError("".join(lines))


def test_all_figures_and_a_page_with_pictures_are_written(tmp_path: Path) -> None:
    figures, page = tmp_path / "figures.json", tmp_path / "page.html"
    with selling(KeysCut()) as url:
        files = ("--json", str(figures), "--report", str(page))
        done = run("--url", url, "--tests", "2,4", "--seed", "7", *files)
    assert done.returncode == 1
    told = json.loads(figures.read_text())
    assert [(t["number"], t["verdict"]) for t in told["tests"]] == [
        (0, "PASSED"),
        (2, "PASSED"),
        (4, "FAILED"),
    ]
    assert told["seed"] == 7
    assert told["conclusion"] == "NOT CORRECT: violations in test 4 (seed 7)"
    assert told["tests"][1]["figures"]["in_flight_max"] >= 100
    assert "unaccounted answer" in {v["kind"] for v in told["tests"][2]["violations"]}
    html = page.read_text(encoding="utf-8")
    assert html.count('<svg viewBox="0 0 960') == 9
    assert not re.search(r"<script|https?://", html)
    assert "<p>NOT CORRECT: violations in test 4 (seed 7)</p>" in html
    assert "unaccounted answer: customer_" in html
