"""The model of a sale: no promise breaks with every rule, and some does without any of them."""

from collections.abc import Iterator
from pathlib import Path

import model
import pytest
from service import PROJECT, patched
from test_durability import Call, calls, traced

BROKEN = {
    "one sale at a time": "3 of 2 units are sold",
    "look again under the lock": "3 of 2 units are sold",
    "a 200 is flushed": "A was told 200, which is gone after a power cut",
    "a replayed 200 is flushed": "A was told 200, which is gone after a power cut",
    "a 410 is flushed": "SOLD OUT was told, which is gone after a power cut",
    "checkpoints hold the write lock": "after a power cut 2 purchases, and 3 units sold",
    "a checkpoint flushes first as a sale does": "after a power cut 1 purchases, and 0 units sold",
    "the database is flushed before the WAL restarts": "after a power cut 1 purchases, and 0 units",
    "a failed flush stops all answers": "A was told 200, which is gone after a power cut",
    "a failed flush stops checkpoints": "after a power cut 1 purchases, and 0 units sold",
    "a 200 waits for the barrier": "A was told 200, which is gone after a crash",
    "a 410 waits for the barrier": "SOLD OUT was told, which is gone after a crash",
    "the barrier writes": "A was told 200, which is gone after a crash",
    "the barrier waits for the standby": "A was told 200, which is gone after a failover",
    "a wait that was cut short is no 200": "A was told 200, which is gone after a failover",
}
BROKEN_BY_A_FAILED_FLUSH = {
    "a checkpoint flushes first as a sale does",
    "a failed flush stops all answers",
    "a failed flush stops checkpoints",
}


def test_with_every_rule_nothing_that_was_told_is_taken_back() -> None:
    states, broken = model.search()
    assert broken is None, broken
    assert states > 50_000  # or not everything was looked at


@pytest.mark.parametrize("rule", [*model.SQLITE_RULES, *model.POSTGRES_RULES])
def test_without_a_rule_a_promise_breaks(rule: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert model.main(["--without", rule]) == 1
    *path, promise = capsys.readouterr().out.splitlines()
    assert promise.startswith(f"=> {BROKEN[rule]}")
    assert 3 <= len(path) <= 25  # short enough to be read
    assert any("a flush fails" in event for event in path) == (rule in BROKEN_BY_A_FAILED_FLUSH)


@pytest.mark.parametrize(
    ("rules", "page"),
    [(model.SQLITE_RULES, "NOTES.md"), (model.POSTGRES_RULES, "postgres/README.md")],
)
def test_each_rule_is_named_where_it_is_explained(rules: dict[str, str], page: str) -> None:
    if not (PROJECT / page).exists():
        pytest.skip("postgres/ was deleted: SQLite only")
    words = " ".join((PROJECT / page).read_text(encoding="utf-8").split())
    assert [rule for rule in rules if f"*{rule}*" not in words] == []


def seen(trace: Path) -> Iterator[str]:
    """What the model sees of a sale, in the words of the model."""
    last = ""
    for call in calls(trace):
        event = event_of(call)
        if event and not (event == last and event in ("write", "copy")):  # one for each page
            yield event
        last = event or last


def event_of(call: Call) -> str:
    is_wal, is_database = call.path.endswith("-wal"), call.path.endswith(".db")
    if call.name == "sendto" and not call.ended and '"HTTP/1.1 ' in call.plain:
        return f"tell {call.plain.partition('HTTP/1.1 ')[2][:3]}"
    if not call.succeeded:
        return ""
    if call.name == "pwrite64" and (is_wal or is_database):
        return "write" if is_wal else "copy"
    if call.name in ("fdatasync", "fsync") and (is_wal or is_database):
        return "flush" if is_wal else "flush database"
    if call.name == "fcntl" and call.path.endswith("-shm") and "l_start=120," in call.text:
        return "unlock" if "F_UNLCK" in call.text else ""
    return ""


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What one worker does: two sales, a checkpoint right after the second, and two refusals."""
    folder = tmp_path_factory.mktemp("trace")
    checkpoint = patched("import db; db.CHECKPOINT_EVERY = 3")
    with traced(folder, *checkpoint, stock=3, workers=1) as (service, trace):
        service.buy("alice")  # opens what stays open
        before = service.get("/inventory")["total_purchases"]
        buyers = ("bob", "carol", "dan", "eve")
        assert [service.buy(name).status_code for name in buyers] == [200, 200, 410, 410]
    told = list(seen(trace))
    last = [number for number, event in enumerate(told) if event.startswith("tell")][-5:]
    assert before == 1
    return told[last[0] + 1 : last[-1] + 1]


SALE = ["write", "unlock", "flush"]
REAL = [
    *(*SALE, "tell 200"),
    *(*SALE, "flush", "flush", "copy", "flush database", "unlock", "tell 200"),
    *("flush", "tell 410", "tell 410"),
]


def accepted(events: list[str]) -> bool:
    return model.accepts(events, model.sqlite_start(2, 1))


def test_what_the_service_does_is_a_path_of_the_model(events: list[str]) -> None:
    assert events == REAL
    assert accepted(events)


SWAPPED = [n for n in range(len(REAL) - 1) if REAL[n] != REAL[n + 1]]


@pytest.mark.parametrize("at", SWAPPED, ids=lambda n: f"{REAL[n + 1]} before {REAL[n]}, {n}")
def test_another_order_is_none(at: int) -> None:
    first, second = REAL[at : at + 2]
    assert not accepted([*REAL[:at], second, first, *REAL[at + 2 :]])


@pytest.mark.parametrize("missing", [n for n, event in enumerate(REAL) if "flush" in event])
def test_without_a_flush_it_is_none(missing: int) -> None:
    assert not accepted([*REAL[:missing], *REAL[missing + 1 :]])
