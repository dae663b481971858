"""The limits of a run: time, and open files."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from proof.api import CannotJudge

OPEN_FILES_MORE = 400  # than buyers: readers, and the naive shop of the negative control


@contextmanager
def time_limit(limit_s: float) -> Iterator[None]:
    """Says it, and raises CannotJudge when it is over, where the system has such an alarm."""

    def is_over(*_: object) -> NoReturn:
        raise CannotJudge(f"not done within {limit_s} s: take fewer --buyers, or fewer --tests")

    print(f"This ends within {limit_s} s, judged or not")
    if not hasattr(signal, "setitimer"):
        yield
        return
    signal.signal(signal.SIGALRM, is_over)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def require_open_files(buyers: int) -> None:
    with suppress(ImportError):  # Windows knows no such limit
        import resource

        wanted = buyers + OPEN_FILES_MORE
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard != resource.RLIM_INFINITY and hard < wanted:
            advice = "raise it (ulimit -n) or take fewer --buyers"
            raise CannotJudge(f"{wanted} open files are needed, and the limit is {hard}: {advice}")
        if soft != resource.RLIM_INFINITY:
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
