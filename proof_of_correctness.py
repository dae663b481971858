"""Proves that a running service sells every unit exactly once, or shows where it doesn't.

    python proof_of_correctness.py              starts its own server where none answers
    python proof_of_correctness.py --url URL    judges a server that was started with ALLOW_RESET=1

Crowds of buyers wait at a barrier, buy at one common moment, and write down a history: who asked
when, and what was answered when. A checker decides whether one counter that sells one unit at a
time could have given these answers within these intervals (linearizability), and whether the
database's records agree. First of all, that checker must catch a seller that takes no lock.

Exit status: 0 proven, 1 a violation was found, 2 it could not be judged. NOTES.md has the limits.
"""

import io
import math
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import NamedTuple

try:
    import click

    from proof.api import Api, CannotJudge
    from proof.buyers import hold_crowded_sale, hold_sale
    from proof.checker import Violation, find_violations
    from proof.history import History, Reading
    from proof.limits import require_open_files, stop_once, time_limit
    from proof.options import Options, with_options
    from proof.orders import KEYED_THREADS, Crowd, keyed_orders, repeating_rows, single_orders
    from proof.report import write_files
    from proof.result import (
        FAILED,
        INCONCLUSIVE,
        PASSED,
        SKIPPED,
        Result,
        equalities,
        in_one_line,
        print_result,
        sales_in,
        statistics_line,
    )
    from proof.sellers import CONTROL_BUYERS, OwnServer, choose_server, naive_shop
except ImportError as error:  # by itself this ends with 1, which says that a violation was found
    sys.stderr.write(f"NOT JUDGED: {error}: install requirements.txt\n")
    sys.exit(2)

LIMIT_S, LIMIT_PER_BUYER_S = 150, 0.05  # of all tests together
SALES_WITH_WAITS = 20  # more where a cache has to grow old
CONTROL_STOCK, CONTROL_SALES_MAX = 10, 20
RETRY_SALES = 10  # many small sales: a race for the last unit happens once in each
CRASH_BUYERS, CRASH_STOCK, CRASH_SALES_MAX = 900, 800, 20
KILLS_NEEDED, KILL_PAUSE_S = 10, (0.03, 0.15)
RULE = "=" * 60


class Setting(NamedTuple):
    api: Api
    server: OwnServer | None
    options: Options
    chance: random.Random


Test = tuple[str, Iterator[History] | None]  # title; None: there is nothing to test it on


# ---- The six tests


def run_tests(setting: Setting, numbers: Sequence[int]) -> Iterator[Result]:
    """Until one can't be judged: buyers who are still waiting would buy in the next sale."""
    with naive_shop() as shop:
        yield judge(0, *negative_control(shop))
    setting.api.require_this_api()
    for number in numbers:
        result = judge(number, *TESTS[number](setting))
        yield result
        if result.unjudged:
            return


def negative_control(shop: Api) -> Test:
    def until_caught() -> Iterator[History]:
        for _ in range(CONTROL_SALES_MAX):
            crowd = Crowd(shop.url, 0, single_orders(CONTROL_BUYERS))
            history = hold_sale(shop, CONTROL_STOCK, [crowd])
            yield history
            if find_violations([history]):
                return

    title = f"NEGATIVE CONTROL ({CONTROL_BUYERS} buyers, {CONTROL_STOCK} tickets, no lock)"
    return title, until_caught()


def basic_concurrency(setting: Setting) -> Test:
    stock = setting.options.stock
    few = min(stock, setting.options.buyers)
    crowd = Crowd(setting.api.url, 0, single_orders(few), progress_every=100)
    title = f"BASIC CONCURRENCY ({few} buyers, {stock} tickets)"
    return title, sales(setting.api, stock, [crowd])


def overselling_prevention(setting: Setting) -> Test:
    stock, buyers = setting.options.stock, setting.options.buyers
    crowd = Crowd(setting.api.url, 0, single_orders(buyers), progress_every=100)
    title = f"OVERSELLING PREVENTION ({buyers} buyers, {stock} tickets)"
    return title, sales(setting.api, stock, [crowd])


def multiple_processes(setting: Setting) -> Test:
    stock, processes = setting.options.stock, setting.options.processes
    each = max(1, setting.options.buyers // processes)
    crowds = [
        Crowd(setting.api.url, n, single_orders(each, f"_of_process_{n}"), all_ask_first=True)
        for n in range(processes)
    ]
    title = f"MULTIPLE PROCESSES ({processes} processes, {each} attempts each, {stock} tickets)"
    return title, sales(setting.api, stock, crowds)


def retries(setting: Setting) -> Test:
    each = max(1, setting.options.buyers // RETRY_SALES)
    few = max(1, each * 4 // 5)
    plans = [
        [Crowd(setting.api.url, 0, repeating_rows(f"retry-{sale}", each, setting.chance))]
        for sale in range(RETRY_SALES)
    ]
    title = f"RETRIES WITH A KEY ({RETRY_SALES} sales, {each} buyers and {few} tickets each)"
    return title, sales(setting.api, few, *plans)


def crash(setting: Setting) -> Test:
    title = f"CRASH (sales with {CRASH_BUYERS} buyers and {CRASH_STOCK} tickets, workers killed)"
    if setting.server is None or not setting.server.has_workers():
        return title, None
    return title, crash_sales(setting.api, setting.server, setting.chance)


def crash_sales(api: Api, server: OwnServer, chance: random.Random) -> Iterator[History]:
    """Workers are killed at random moments, until enough kills hit a sale in progress.

    Then the whole service is stopped and started, and every order is sent once more.
    """
    landed = 0
    kills: list[float] = []

    def kill_workers(over: threading.Event, readings: Sequence[Reading]) -> None:
        kills.clear()
        while len(kills) < KILLS_NEEDED and not over.wait(chance.uniform(*KILL_PAUSE_S)):
            if readings and 0 < readings[-1].stock < CRASH_STOCK:
                with suppress(IndexError, ProcessLookupError):  # none is busy, or it just ended
                    os.kill(chance.choice(server.busy_workers()), signal.SIGKILL)
                    kills.append(time.monotonic())

    for number in range(CRASH_SALES_MAX):
        rows = keyed_orders(f"crash-{number}", CRASH_BUYERS, KEYED_THREADS)
        # The buyers have processes of their own, so that the one who kills isn't slowed by them.
        crowds = [Crowd(api.url, process, rows[process::2]) for process in range(2)]
        history = hold_sale(
            api, CRASH_STOCK, crowds, crowds, meanwhile=kill_workers, between=server.restart
        )
        history.kills = [kill for kill in kills if history.is_selling_at(kill)]
        landed += len(history.kills)
        yield history
        if landed >= KILLS_NEEDED:
            return


TESTS: dict[int, Callable[[Setting], Test]] = {
    1: basic_concurrency,
    2: overselling_prevention,
    3: multiple_processes,
    4: retries,
    5: crash,
}


def sales(api: Api, stock: int, *plans: Sequence[Crowd]) -> Iterator[History]:
    for crowds in plans:
        yield hold_crowded_sale(api, stock, crowds)


# ---- The verdict


def judge(number: int, title: str, sales_of_test: Iterator[History] | None) -> Result:
    """Hold the sales of one test, and check their histories."""
    if sales_of_test is None:
        reason = "no server of its own, or no workers to kill"
        return Result(number, title, SKIPPED, [(False, reason)])
    print(f"\n{RULE}\nTEST {number}: {title}\n{RULE}")
    histories, unjudged = hold(sales_of_test)
    violations = find_violations(histories)
    checks = checks_of(number, histories, violations)
    verdict = INCONCLUSIVE
    if violations and number:
        verdict = FAILED
    elif not unjudged and all(ok for ok, _ in checks):
        verdict = PASSED
    return Result(number, title, verdict, checks, violations, histories, unjudged)


def hold(sales_of_test: Iterator[History]) -> tuple[list[History], str]:
    """The histories, and why it ended early; "" if it didn't."""
    histories = []
    try:
        for history in sales_of_test:
            histories.append(history)
            if history.unjudged:
                return histories, history.unjudged
    except CannotJudge as error:
        return histories, str(error)
    return histories, ""


def checks_of(
    number: int, histories: Sequence[History], violations: Sequence[Violation]
) -> list[tuple[bool, str]]:
    """What the verdict rests on, each with its line. The negative control has to be caught."""
    if number == 0:
        kinds = ", ".join(sorted({v.kind for v in violations})) or "it did not"
        return [(bool(violations), f"The checker catches a seller without a lock: {kinds}")]
    if not histories:
        return []
    checks = equalities(histories, violations)
    return [*checks, kills_in(histories)] if number == 5 else checks


def kills_in(histories: Iterable[History]) -> tuple[bool, str]:
    kills = sum(len(h.kills) for h in histories)
    line = f"{kills} workers killed in mid-sale ({KILLS_NEEDED} needed), the service restarted"
    return kills >= KILLS_NEEDED, line


def verdict(results: Sequence[Result], numbers: Sequence[int], reason: str) -> tuple[int, str]:
    """Exit status and conclusion."""
    failed = [f"test {r.number}" for r in results if r.verdict == FAILED]
    unsure = [f"test {r.number} inconclusive" for r in results if r.verdict == INCONCLUSIVE]
    reason = reason or next((r.unjudged for r in results if r.unjudged), "")
    if failed:
        return 1, f"NOT CORRECT: violations in {', '.join(failed)}"
    if reason or unsure:
        return 2, f"NOT JUDGED: {reason or ', '.join(unsure)}"
    left_out = [f"test {r.number} skipped" for r in results if r.verdict == SKIPPED]
    left_out += [f"test {number} not run" for number in TESTS if number not in numbers]
    but = f" ({', '.join(left_out)})" if left_out else ""
    return 0, f"PROVEN: every unit was sold exactly once{but}"


# ---- The command


@click.command(help="Proves that a service sells each unit once, or shows where it doesn't.")
@with_options
def command(options: Options) -> int:
    """The exit status."""
    results: list[Result] = []
    reason = ""
    try:
        with ExitStack() as undo:
            for result in run_tests(prepare(options, undo), options.tests):
                results.append(result)
                print_result(result)
    except KeyboardInterrupt:
        reason = "interrupted"
    except Exception as error:
        reason = in_one_line(error)
    return conclude(options, results, reason)


def prepare(options: Options, undo: ExitStack) -> Setting:
    require_open_files(options.buyers)
    api, server = choose_server(options, undo)
    waits_s = SALES_WITH_WAITS * 2 * api.cache_age_s
    limit_s = math.ceil(LIMIT_S + LIMIT_PER_BUYER_S * options.buyers + waits_s)
    undo.enter_context(time_limit(limit_s))
    chance = random.Random(options.seed)  # noqa: S311 (no secret)
    return Setting(api, server, options, chance)


def conclude(options: Options, results: Sequence[Result], reason: str) -> int:
    """Write what was asked for, say the conclusion, and return the exit status."""
    status, conclusion = verdict(results, options.tests, reason)
    judged = sum(sales_in(h) for r in results if r.number for h in r.histories)
    try:
        write_files(options, results, f"{conclusion} (seed {options.seed})", judged)
    except Exception as error:
        status, conclusion = verdict(results, options.tests, in_one_line(error))
        if status == 1:  # else this is the conclusion
            print(f"A file is not written: {in_one_line(error)}", file=sys.stderr)
    print(f"\n{RULE}\n{conclusion} (seed {options.seed})")
    if status == 0:
        print(statistics_line(judged), flush=True)
    return status


def main() -> int:
    """Without click's own main(), which ends with 1 at a closed pipe: here 1 is a violation."""
    stop_once()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # not every console can show a check mark
    try:
        with command.make_context("proof_of_correctness.py", sys.argv[1:]) as context:
            status = int(command.invoke(context))
        print(end="", flush=True)
        return status
    except click.exceptions.Exit as end:  # after --help
        return end.exit_code
    except click.ClickException as error:
        error.show()
    except BaseException as error:
        with suppress(OSError):
            print(f"NOT JUDGED: {in_one_line(error)}", file=sys.stderr)
        with suppress(OSError, AttributeError, ValueError):  # what is unwritten can't fail the exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 2


if __name__ == "__main__":
    sys.exit(main())
