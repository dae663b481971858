"""Orders: which customer buys with which key, in which thread. One seed gives one plan."""

import random
from collections.abc import Sequence
from typing import NamedTuple

Order = tuple[str, str | None]  # customer, idempotency key
SHARED_NAME_EVERY = 10  # a tenth of the buyers has one name: each of them buys all the same
KEYED_THREADS = 32
STRANGERS_SHARE = 0.1  # of the orders with a key are followed by another customer with that key


class Crowd(NamedTuple):
    """The buyers of one process: a thread for each row of orders, sent one after the other."""

    url: str
    process: int
    rows: Sequence[Sequence[Order]]
    progress_every: int = 0
    all_ask_first: bool = False  # before one of them reads an answer


def single_orders(buyers: int, suffix: str = "") -> list[list[Order]]:
    numbers = (n if n % SHARED_NAME_EVERY else 0 for n in range(buyers))
    return [[(f"customer_{n}{suffix if n else ''}", None)] for n in numbers]


def keyed_orders(name: str, buyers: int, threads: int) -> list[list[Order]]:
    """Long keys, in pairs that differ only in the case of their last letters."""
    orders: list[Order] = [
        (f"customer_{n}", f"{name}-{n // 2:0>200}-{'key' if n % 2 else 'KEY'}")
        for n in range(buyers)
    ]
    return [orders[thread::threads] for thread in range(min(threads, buyers))]


def repeating_rows(name: str, buyers: int, chance: random.Random) -> list[list[Order]]:
    """Two threads send each row at once. Orders are repeated, some by another customer."""
    rows = keyed_orders(name, buyers, KEYED_THREADS // 2)
    for row in rows:
        for place in range(len(row), 0, -1):
            again = chance.choices(row[:place], k=chance.randrange(2))
            if chance.random() < STRANGERS_SHARE:
                customer, key = chance.choice(row[:place])
                again.append((f"stranger_with_the_key_of_{customer}", key))
            row[place:place] = again
    return rows + rows
