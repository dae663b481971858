"""The limits of a run: time, open files, interruptions, and threads that can't outlive it."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from proof.api import CannotJudge

ENDING_S = 30  # for what is to be stopped then
OPEN_FILES_MORE = 24  # than buyers
OPEN_FILES_MIN = 400  # for the naive shop of the negative control


@contextmanager
def time_limit(limit_s: float) -> Iterator[None]:
    """Says it, and raises CannotJudge when it is over, where the system has such an alarm."""

    def is_over(*_: object) -> NoReturn:
        raise CannotJudge(f"not done within {limit_s:.0f} s: take fewer --buyers, or fewer --tests")

    print(f"This ends within {limit_s + ENDING_S:.0f} s, judged or not")
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

        wanted = max(buyers + OPEN_FILES_MORE, OPEN_FILES_MIN)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard != resource.RLIM_INFINITY and hard < wanted:
            advice = "raise it (ulimit -n) or take fewer --buyers"
            raise CannotJudge(f"{wanted} open files are needed, and the limit is {hard}: {advice}")
        if soft != resource.RLIM_INFINITY:
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def stop_once() -> None:
    """The first signal interrupts; later ones don't disturb what has to be ended then."""
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [getattr(signal, name) for name in names]
    heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]

    def ignore(*_: object) -> None:
        pass

    def interrupt(*_: object) -> NoReturn:
        for number in heard:
            signal.signal(number, ignore)
        raise KeyboardInterrupt

    for number in heard:
        signal.signal(number, interrupt)


class Job(threading.Thread):
    """A thread that was started. As a daemon it can't keep the proof from ending in time."""

    def __init__(self, work: Callable[..., Any], *arguments: Any) -> None:
        super().__init__(daemon=True)
        self.work, self.arguments = work, arguments
        self.value: Any = None
        self.error: BaseException | None = None
        self.over = threading.Event()  # join() may fail when a signal interrupts it
        self.start()

    def run(self) -> None:
        try:
            self.value = self.work(*self.arguments)
        except BaseException as error:
            self.error = error
        finally:
            self.over.set()

    def result(self) -> Any:
        self.over.wait()
        if self.error:
            raise self.error
        return self.value
