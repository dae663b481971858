"""The checker of the proof: what it names, and that it says no exactly when no order explains a history."""

import random
from math import inf

import pytest

from proof_of_correctness import Attempt, Audit, Kind, Reading, check, in_flight_max

HISTORIES = 6000


def bought(start, end, left, number=None, key=None, customer=None):
    number = 1000 - left if number is None else number
    return Attempt(0, 0, customer or f"c{left}", key, start, end, 200, left, number)


def refused(start, end, key=None, customer="late"):
    return Attempt(0, 0, customer, key, start, end, 410, 0)


def lost(start, end, key=None, customer="lost"):
    return Attempt(0, 0, customer, key, start, end, 0)


def busy(start, end, key=None):
    return Attempt(0, 0, "busy", key, start, end, 503)


def kinds(*arguments):
    return {violation.kind for violation in check(*arguments)}


def audit(stock, records, at=100):
    return Audit(at, at + 1, stock, records)


# -- what it names


def test_a_correct_sale_has_no_violation():
    attempts = [bought(0, 3, 1), bought(0, 3, 0), refused(0, 4), busy(0, 1)]
    assert check(2, attempts, [Reading(-1, 0, 2), Reading(5, 6, 0)], audit(0, 2)) == []


def test_a_purchase_too_many_is_oversold():
    attempts = [bought(0, 3, 1), bought(0, 3, 0), bought(0, 3, -1)]
    assert Kind.OVERSOLD in kinds(2, attempts, [], audit(-1, 3))


def test_more_acknowledged_purchases_than_units_are_named_with_their_number():
    attempts = [bought(0, 3, 0, number=1), bought(0, 3, 0, number=2, customer="other")]
    assert (Kind.OVERSOLD, "2 purchases of 1 units were acknowledged") in check(
        1, attempts, [], None
    )


def test_a_level_below_zero_is_oversold_even_if_it_is_the_only_answer():
    assert kinds(1, [bought(0, 3, -1)], [], None) == {Kind.OVERSOLD}


def test_more_records_than_stock_explains_is_oversold():
    assert Kind.OVERSOLD in kinds(10, [bought(0, 1, 9)], [], audit(9, 2))


def test_a_negative_stock_is_oversold():
    assert Kind.OVERSOLD in kinds(1, [bought(0, 1, 0)], [Reading(2, 3, -1)], None)


def test_sold_out_while_units_are_left_is_undersold():
    assert Kind.UNDERSOLD in kinds(2, [bought(0, 1, 1), refused(2, 3)], [], audit(1, 1))


def test_a_unit_that_left_the_stock_without_a_record_is_undersold():
    assert Kind.UNDERSOLD in kinds(2, [bought(0, 1, 1)], [], audit(0, 1))


def test_two_buyers_told_the_same_level_is_a_duplicate_level():
    attempts = [bought(0, 3, 1, number=1), bought(0, 3, 1, number=2, customer="other")]
    (duplicate,) = [v for v in check(2, attempts, [], None) if v.kind is Kind.DUPLICATE_LEVEL]
    assert "c1" in duplicate.message
    assert "other" in duplicate.message


def test_an_acknowledged_purchase_without_a_record_is_lost():
    assert Kind.LOST_PURCHASE in kinds(2, [bought(0, 1, 1)], [], audit(2, 0))


def test_two_buyers_with_one_purchase_id_are_a_lost_purchase():
    attempts = [bought(0, 3, 1, number=7), bought(0, 3, 0, number=7)]
    assert kinds(2, attempts, [], audit(0, 2)) == {Kind.LOST_PURCHASE}


def test_a_record_that_nobody_was_told_of_is_a_phantom():
    assert Kind.PHANTOM_PURCHASE in kinds(2, [refused(0, 1)], [], audit(1, 1))


def test_a_record_that_an_unanswered_attempt_explains_is_no_phantom():
    assert kinds(2, [lost(0, 1)], [], audit(1, 1)) == set()


def test_a_sold_out_answer_that_ended_before_the_last_sale_began_is_not_linearizable():
    attempts = [refused(0, 1), bought(2, 3, 0)]
    assert kinds(1, attempts, [], audit(0, 1)) == {Kind.NOT_LINEARIZABLE}


def test_a_stale_reading_is_named_with_the_sale_that_it_missed():
    (violation,) = check(2, [bought(0, 1, 1)], [Reading(2, 3, 2)], None)
    assert violation.kind is Kind.NOT_LINEARIZABLE
    assert (
        "the sale to c1 that left 1 ended 1.000000 s before the reading of stock 2 began"
        in violation
    )


def test_a_key_that_bought_twice_is_named():
    attempts = [bought(0, 1, 1, key="k", customer="c"), bought(2, 3, 0, key="k", customer="c")]
    assert Kind.CHANGED_ANSWER in kinds(2, attempts, [], audit(0, 2))


def test_a_replayed_answer_is_no_second_sale():
    attempts = [bought(0, 1, 0, key="k"), bought(2, 3, 0, key="k")]
    assert kinds(1, attempts, [], audit(0, 1)) == set()


def test_a_replay_answered_before_its_level_could_be_reached_is_not_linearizable():
    attempts = [bought(0, 1, 0, key="k"), bought(0, 9, 0, key="k"), bought(5, 6, 1)]
    assert kinds(2, attempts, [], audit(0, 2)) == {Kind.NOT_LINEARIZABLE}


def test_sold_out_and_sold_under_one_key_are_different_answers():
    attempts = [bought(0, 3, 0, key="k"), refused(0, 3, key="k")]
    assert kinds(1, attempts, [], audit(0, 1)) == {Kind.CHANGED_ANSWER}


@pytest.mark.parametrize(
    "attempt",
    [
        Attempt(0, 0, "c", None, 0, 1, 500),
        Attempt(0, 0, "c", None, 0, 1, 200, None, 1),
        Attempt(0, 0, "c", None, 0, 1, 200, 1, None),
        Attempt(0, 0, "c", None, 0, 1, 410, 5),
        Attempt(0, 0, "c", None, 0, 1, 302),
    ],
)
def test_an_answer_that_is_none_of_the_three_is_unaccounted(attempt):
    assert Kind.UNACCOUNTED_ANSWER in kinds(2, [attempt], [], None)


def test_a_million_tickets_and_a_thousand_buyers_are_checked_without_going_through_every_pair():
    attempts = [bought(n, n + 1.5, 1_000_000 - 1 - n, number=n) for n in range(1000)]
    assert check(1_000_000, attempts, [Reading(0, 2000, 999_500)], None) == []
    assert kinds(1_000_000, attempts, [Reading(2000, 2001, 0)], None) == {Kind.NOT_LINEARIZABLE}


def test_in_flight_counts_the_overlap_of_attempts():
    assert in_flight_max([lost(0, 3), lost(1, 2), lost(2.5, 4), lost(5, 6)]) == 2


# -- against a search through all orders


def explained(initial, attempts, readings):
    """Whether one counter, asked in any order that real time allows, gives these answers."""
    steps = [(a.start, inf if a.status == 0 else a.end, a) for a in attempts]
    steps += [(r.start, r.end, r) for r in readings]

    def search(stock, bought_keys, left):
        must = [i for i in left if steps[i][1] < inf]
        if not must:
            return True
        first_end = min(steps[i][1] for i in must)
        for i in left:
            start, _, what = steps[i]
            if start > first_end:
                continue  # something else was over before this began
            for new_stock, new_keys in outcomes(stock, bought_keys, i, what):
                if search(new_stock, new_keys, left - {i}):
                    return True
        return False

    return search(initial, frozenset(), frozenset(range(len(steps))))


def outcomes(stock, keys, number, what):
    """The states after this step, if the counter can answer like that."""
    if isinstance(what, Reading):
        return [(stock, keys)] if what.stock == stock else []
    key = what.key or f"#{number}"
    level = dict(keys).get(key)
    if what.status == 503:
        return [(stock, keys)]
    if what.status == 410:
        return [(stock, keys)] if stock == 0 and level is None else []
    if what.status == 200:
        if level is not None:
            return [(stock, keys)] if level == what.remaining_stock else []
        return sell(stock, keys, key) if stock - 1 == what.remaining_stock else []
    sold = sell(stock, keys, key) if level is None else []
    return [*sold, (stock, keys)]


def sell(stock, keys, key):
    return [(stock - 1, keys | {(key, stock - 1)})] if stock >= 1 else []


def random_history(chance):
    """What an honest counter would answer, with some answers shifted in time or changed."""
    initial = chance.randrange(1, 5)
    stock, now, levels, attempts, readings = initial, 0, {}, [], []
    for number in range(chance.randrange(2, 8)):
        now += chance.randrange(3)
        start, end = now - chance.randrange(5), now + chance.randrange(5)
        key = chance.choice([None, None, "a", "b"])
        event = chance.random()
        if event < 0.2:
            readings.append(Reading(start, end, stock))
            continue
        if event < 0.3:
            attempts.append(busy(start, end, key))
            continue
        name = key or f"#{number}"
        if name not in levels and stock > 0 and (event < 0.85 or chance.random() < 0.5):
            stock -= 1
            levels[name] = stock
        if event >= 0.85:
            attempts.append(lost(start, end, key, customer=name))
        elif name in levels:
            attempts.append(bought(start, end, levels[name], key=key, customer=name))
        else:
            attempts.append(refused(start, end, key, customer=name))
    final = Reading(50, 51, stock)
    if chance.random() < 0.5 and attempts:
        place = chance.randrange(len(attempts))
        attempts[place] = spoiled(chance, attempts[place], initial)
    if chance.random() < 0.25 and readings:
        place = chance.randrange(len(readings))
        readings[place] = readings[place]._replace(stock=chance.randrange(initial + 1))
    if chance.random() < 0.15:
        final = final._replace(stock=chance.randrange(initial + 1))
    return initial, attempts, readings, final


def spoiled(chance, attempt, initial):
    what = chance.randrange(3)
    if what == 0:
        shift = chance.randrange(-4, 5)
        return attempt._replace(start=attempt.start + shift, end=attempt.end + shift)
    if what == 1:
        level = chance.randrange(initial)
        return bought(attempt.start, attempt.end, level, key=attempt.key, customer=attempt.customer)
    return refused(attempt.start, attempt.end, attempt.key, customer=attempt.customer)


def with_ids(attempts):
    """Every sale its own purchase_id: one for each level that a buyer was told."""
    ids = {}
    for number, a in enumerate(attempts):
        who = (a.key or number, a.remaining_stock)
        yield a._replace(purchase_id=ids.setdefault(who, len(ids) + 1)) if a.status == 200 else a


def test_the_checker_agrees_with_a_search_through_all_orders_on_thousands_of_random_histories():
    chance = random.Random(20)
    verdicts = {True: 0, False: 0}
    unclear = {True: 0, False: 0}
    for _ in range(HISTORIES):
        initial, attempts, readings, final = random_history(chance)
        attempts = list(with_ids(attempts))
        count = Audit(*final, records=initial - final.stock)
        expected = explained(initial, attempts, [*readings, final])
        found = check(initial, attempts, readings, count)
        assert (found == []) is expected, (initial, attempts, readings, final, found)
        verdicts[expected] += 1
        unclear[expected] += any(a.status == 0 for a in attempts)
    assert min(verdicts.values()) > HISTORIES / 5, verdicts
    assert min(unclear.values()) > HISTORIES / 20, unclear
