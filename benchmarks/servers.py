"""A subject as a running server: started, asked, audited, stopped."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import requests
from service import Service

from benchmarks.raw_sqlite import create_filled
from benchmarks.subjects import CUSTOMER, SERVICE, Subject


@dataclass(frozen=True)
class Running:
    """A subject that serves; `keeper` is the service that resets and audits, if there is any."""

    subject: Subject
    folder: Path
    server: Service
    keeper: Service | None

    def is_consistent(self) -> bool:
        return self.keeper is None or self.keeper.get("/audit")["consistent"] is True

    def still_answers(self) -> bool:
        """One more request, since wrk can't tell one refusal from another."""
        method, path = self.subject.call.split()
        body = {"customer_id": CUSTOMER} if method == "POST" else None
        answer = requests.request(method, self.server.url + path, json=body, timeout=60)
        return answer.status_code == self.subject.status


@contextmanager
def started(
    subject: Subject, folder: Path, workers: int, others: Sequence[Running] = ()
) -> Iterator[Running]:
    """The subject under gunicorn, in a folder of its own; `others` run already."""
    database = folder / "bench.db"
    if subject.stored:
        create_filled(database, subject.stored).close()
    # The service as its users start it. Gunicorn finds any other seller in this folder.
    path = ("--pythonpath", str(Path(__file__).parent))
    command = ("-m", "gunicorn", *path, subject.target)
    with Service(
        folder,
        *(() if subject.target == SERVICE else (sys.executable, *command)),
        cwd=subject.checkout,
        DATABASE_URL=subject.database_url or f"sqlite:///{database}",
        INITIAL_STOCK=str(subject.stock),
        WEB_CONCURRENCY=str(workers),
    ) as server:
        yield Running(subject, folder, server, _keeper(subject, server, others))


def _keeper(subject: Subject, server: Service, others: Sequence[Running]) -> Service | None:
    if subject.target == SERVICE:
        return server
    url = subject.database_url
    return next((one.keeper for one in others if url and one.subject.database_url == url), None)
