"""The checker of the proof: what it names, and that it is right about every history."""

import random
from itertools import product
from math import inf
from typing import NamedTuple

import pytest

from proof.checker import Kind, check
from proof.history import Attempt, Audit, Reading
from proof.result import busy_s, in_flight_max, statistics_line

HISTORIES = 6000
AUDITED = 50  # when all is over


def bought(start, end, left, number=None, key=None, customer=None):
    number = 1000 - left if number is None else number
    return Attempt(0, 0, customer or f"c{left}", key, start, end, 200, left, number)


def refused(start, end, key=None, customer="late"):
    return Attempt(0, 0, customer, key, start, end, 410, 0)


def lost(start, end, key=None, customer="lost"):
    return Attempt(0, 0, customer, key, start, end, 0)


def busy(start, end, key=None):
    return Attempt(0, 0, "busy", key, start, end, 503)


def stranger(start, end, key="k", customer="stranger"):
    return Attempt(0, 0, customer, key, start, end, 422)


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


def test_one_key_that_sold_to_two_customers_is_named_with_both():
    attempts = [
        bought(0, 1, 0, key="k", customer="alice"),
        bought(2, 3, 0, key="k", customer="bob"),
    ]
    assert check(1, attempts, [], audit(0, 1)) == [
        (Kind.SHARED_KEY, "alice and bob were both told 200")
    ]


def test_one_purchase_id_for_two_purchases_of_one_customer_is_a_lost_purchase():
    attempts = [
        bought(0, 1, 1, number=1, key="k1", customer="alice"),
        bought(2, 3, 0, number=1, key="k2", customer="alice"),
    ]
    assert kinds(2, attempts, [], audit(0, 2)) == {Kind.LOST_PURCHASE}


def test_another_customer_with_a_key_that_was_sold_is_refused_and_nothing_is_wrong():
    attempts = [bought(0, 1, 0, key="k"), stranger(0.5, 3)]
    assert check(1, attempts, [], audit(0, 1)) == []


def test_a_422_that_ended_before_the_key_was_sold_is_not_linearizable():
    attempts = [stranger(0, 1), bought(2, 3, 0, key="k")]
    assert kinds(1, attempts, [], audit(0, 1)) == {Kind.NOT_LINEARIZABLE}


@pytest.mark.parametrize("more", [[], [stranger(3, 4, customer="other")], [refused(3, 4, "k")]])
def test_a_422_for_a_key_that_nobody_else_can_have_bought_with_is_unaccounted(more):
    assert Kind.UNACCOUNTED_ANSWER in kinds(1, [stranger(0, 1), *more], [], audit(1, 0))


def test_a_422_for_the_customer_who_bought_is_unaccounted():
    attempts = [bought(0, 1, 0, key="k", customer="c"), stranger(2, 3, customer="c")]
    assert kinds(1, attempts, [], audit(0, 1)) == {Kind.UNACCOUNTED_ANSWER}


def test_a_422_tells_that_an_unanswered_purchase_was_made():
    attempts = [lost(0, 1, key="k"), stranger(2, 3)]
    assert kinds(1, attempts, [], audit(0, 1)) == set()
    assert Kind.LOST_PURCHASE in kinds(1, attempts, [], audit(1, 0))


def test_an_unanswered_purchase_that_a_422_tells_of_comes_before_the_end_of_that():
    attempts = [lost(0, 1, key="k"), stranger(2, 3), lost(0, 1, key="other")]
    assert kinds(2, attempts, [Reading(4, 5, 1)], audit(0, 2)) == set()
    assert kinds(2, attempts, [Reading(4, 5, 2)], audit(0, 2)) == {Kind.NOT_LINEARIZABLE}


def test_more_purchases_that_422s_tell_of_than_units_are_left_are_oversold():
    attempts = [lost(0, 1, key="a"), refused(2, 3), lost(4, 5, key="b"), stranger(6, 7, key="b")]
    assert kinds(1, attempts, [], None) == {Kind.OVERSOLD}
    assert kinds(2, attempts[:1] + attempts[2:], [], None) == set()


def test_an_unanswered_purchase_that_a_422_tells_of_was_made_before_what_came_later():
    attempts = [lost(0, 1, key="k"), stranger(2, 3), bought(4, 5, 1)]
    assert kinds(2, attempts, [Reading(4, 5, 1)], None) == {Kind.NOT_LINEARIZABLE}


@pytest.mark.parametrize(("initial", "sold"), [(None, None), (2, 1), (2, None), (None, 1)])
def test_initial_stock_and_purchases_that_agree_with_a_reading_or_are_missing_are_right(
    initial, sold
):
    assert check(2, [bought(0, 1, 1)], [Reading(2, 3, 1, initial, sold)], None) == []


@pytest.mark.parametrize(("initial", "sold"), [(3, 1), (2, 0), (2, 2)])
def test_initial_stock_or_purchases_that_belie_a_reading_are_wrong_figures(initial, sold):
    found = kinds(2, [bought(0, 1, 1)], [Reading(2, 3, 1, initial, sold)], None)
    assert found == {Kind.WRONG_FIGURES}


@pytest.mark.parametrize(("initial", "consistent"), [(3, True), (2, False), (2, "yes")])
def test_an_audit_that_belies_itself_has_wrong_figures(initial, consistent):
    wrong = Audit(5, 6, 1, 1, initial, consistent)
    assert kinds(2, [bought(0, 1, 1)], [], wrong) == {Kind.WRONG_FIGURES}


def test_readings_and_refusals_without_a_key_may_be_as_old_as_the_cache_allows():
    attempts = [bought(2, 3, 0), refused(3.5, 4), refused(0, 1)]
    stale = [Reading(3.5, 4, 1)]
    assert check(1, attempts[:2], stale, audit(0, 1), cache_age_s=1) == []
    assert check(1, attempts[:2], stale, audit(0, 1)) != []
    assert check(1, attempts[:2], stale, audit(0, 1), cache_age_s=0.4) != []
    assert check(1, attempts, stale, audit(0, 1), cache_age_s=1) != []  # from the future


def test_a_refusal_with_a_key_comes_from_no_cache():
    attempts = [refused(3.5, 4, key="k"), bought(3.6, 5, 0)]
    assert check(1, attempts, [], audit(0, 1), cache_age_s=1) == []
    assert kinds(1, [refused(3.5, 3.6, key="k"), bought(3.7, 5, 0)], [], None) == {
        Kind.NOT_LINEARIZABLE
    }


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


def test_the_time_of_a_test_is_that_in_which_something_was_in_flight():
    assert busy_s([lost(0, 3), lost(1, 2), lost(2.5, 4), lost(5, 6)]) == 5


def test_the_conclusion_says_what_the_number_of_sales_excludes():
    assert "1,900 sales" in statistics_line(1900)
    one_in = 635
    assert f"one sale in {one_in}" in statistics_line(1900)
    assert (1 - 1 / one_in) ** 1900 == pytest.approx(0.05, rel=0.01)
    assert statistics_line(0) == "No sale was judged."


# -- against a search through all orders


class Sale(NamedTuple):
    customer: str
    level: int
    number: int | None  # None: nobody was told yet


State = tuple[int, dict[str, Sale]]  # stock, sales by key


def explained(initial, attempts, readings, cache_age_s=0):
    """Whether one counter, asked in any order that real time allows, gives these answers."""
    steps = [(a.start, inf if a.status == 0 else a.end, a) for a in attempts]
    steps += [(r.start, r.end, r) for r in readings]
    steps = [
        (start - (cache_age_s if from_cache(what) else 0), end, what) for start, end, what in steps
    ]

    def search(stock, sales, left):
        must = [i for i in left if steps[i][1] < inf]
        if not must:
            return True
        first_end = min(steps[i][1] for i in must)
        for i in left:
            start, _, what = steps[i]
            if start > first_end:
                continue  # something else was over before this began
            for new_stock, new_sales in outcomes(stock, sales, i, what):
                if search(new_stock, new_sales, left - {i}):
                    return True
        return False

    return search(initial, {}, frozenset(range(len(steps))))


def from_cache(what):
    if isinstance(what, Reading):
        return what.start < AUDITED
    return what.status == 410 and what.key is None


def outcomes(stock, sales, number, what):
    """The states after this step, if the counter can answer like that."""
    if isinstance(what, Reading):
        return [(stock, sales)] if what.stock == stock else []
    key = what.key or f"#{number}"
    sale = sales.get(key)
    told = Sale(what.customer, what.remaining_stock, what.purchase_id)
    if what.status in (429, 503):
        return [(stock, sales)]
    if what.status == 410:
        return [(stock, sales)] if stock == 0 and sale is None else []
    if what.status == 422:
        return [(stock, sales)] if sale and sale.customer != what.customer else []
    if what.status == 0:
        hidden = Sale(what.customer, stock - 1, None)
        return [*([] if sale else sell(stock, sales, key, hidden)), (stock, sales)]
    if sale is None:
        return sell(stock, sales, key, told) if stock - 1 == what.remaining_stock else []
    if sale.number is None and told[:2] == sale[:2]:
        return sell(stock + 1, sales, key, told)  # sold before, and now its number is told
    return [(stock, sales)] if sale == told else []


def sell(stock, sales, key, sale):
    """Each sale has a number of its own."""
    numbers = {s.number for name, s in sales.items() if name != key and s.number is not None}
    return [(stock - 1, sales | {key: sale})] if stock >= 1 and sale.number not in numbers else []


def random_history(chance):
    """What an honest counter would answer, with some answers shifted in time or changed."""
    initial = chance.randrange(1, 5)
    stock, now, sales, attempts, readings = initial, 0, {}, [], []
    for number in range(chance.randrange(2, 8)):
        now += chance.randrange(3)
        start, end = now - chance.randrange(5), now + chance.randrange(5)
        key = chance.choice([None, None, "a", "b"])
        customer = chance.choice(["alice", "bob"])
        event = chance.random()
        if event < 0.2:
            readings.append(Reading(start, end, stock))
            continue
        if event < 0.3:
            attempts.append(busy(start, end, key))
            continue
        name = key or f"#{number}"
        if name not in sales and stock > 0 and (event < 0.85 or chance.random() < 0.5):
            stock -= 1
            sales[name] = Sale(customer, stock, initial - stock)
        if event >= 0.85:
            attempts.append(lost(start, end, key, customer=customer))
        elif name not in sales:
            attempts.append(refused(start, end, key, customer=customer))
        elif sales[name].customer == customer:
            attempts.append(bought(start, end, *sales[name][1:], key=key, customer=customer))
        else:
            attempts.append(stranger(start, end, key, customer=customer))
    final = Reading(AUDITED, AUDITED + 1, stock)
    if chance.random() < 0.5 and attempts:
        place = chance.randrange(len(attempts))
        attempts[place] = spoiled(chance, attempts[place], initial)
    if chance.random() < 0.25 and readings:
        place = chance.randrange(len(readings))
        readings[place] = readings[place]._replace(stock=chance.randrange(initial + 1))
    if chance.random() < 0.15:
        final = final._replace(stock=chance.randrange(initial + 1))
    return initial, attempts, readings, final


def uncertain_history(chance):
    """Few answers, and three keys that two customers share: the most that is left to guess."""
    initial = chance.randrange(1, 5)
    stock, now, sales, attempts, readings = initial, 0, {}, [], []
    for _ in range(chance.randrange(3, 9)):
        now += chance.randrange(3)
        when = {"start": now - chance.randrange(5), "end": now + chance.randrange(5)}
        who = {"key": chance.choice("abc"), "customer": chance.choice(["alice", "bob"])}
        event = chance.random()
        if event < 0.15:
            readings.append(Reading(**when, stock=stock))
            continue
        if who["key"] not in sales and stock > 0 and chance.random() < 0.7:
            stock -= 1
            sales[who["key"]] = Sale(who["customer"], stock, initial - stock)
        sale = sales.get(who["key"])
        if event < 0.55 or (sale is None and stock > 0):
            attempts.append(lost(**when, **who))
        elif sale is None:
            attempts.append(refused(**when, **who))
        elif sale.customer == who["customer"]:
            attempts.append(bought(**when, left=sale.level, number=sale.number, **who))
        else:
            attempts.append(stranger(**when, **who))
    if chance.random() < 0.3 and attempts:
        place = chance.randrange(len(attempts))
        attempts[place] = spoiled(chance, attempts[place], initial)
    return initial, attempts, readings, Reading(AUDITED, AUDITED + 1, stock)


def spoiled(chance, attempt, initial):
    what = chance.randrange(5)
    when = {"start": attempt.start, "end": attempt.end}
    who = {"key": attempt.key, "customer": attempt.customer}
    if what == 0:
        shift = chance.randrange(-4, 5)
        return attempt._replace(start=attempt.start + shift, end=attempt.end + shift)
    if what == 1:
        level = chance.randrange(initial)
        return bought(**when, left=level, number=initial - level, **who)
    if what == 2:
        return bought(**when, left=chance.randrange(initial), number=chance.randrange(1, 5), **who)
    if what == 3:
        return stranger(**when, **who)
    return refused(**when, **who)


@pytest.mark.parametrize("cache_age_s", [0, 2])
@pytest.mark.parametrize("make_history", [random_history, uncertain_history])
def test_the_checker_agrees_with_a_search_through_all_orders_on_thousands_of_random_histories(
    make_history, cache_age_s
):
    chance = random.Random(20)
    verdicts, unclear, strangers = ({True: 0, False: 0} for _ in range(3))
    for _ in range(HISTORIES):
        initial, attempts, readings, final = make_history(chance)
        count = Audit(*final[:3], records=initial - final.stock)
        if chance.random() < 0.3:  # the server is gone
            count, last = None, []
        else:
            last = [final]
        expected = explained(initial, attempts, [*readings, *last], cache_age_s)
        found = check(initial, attempts, readings, count, cache_age_s)
        assert (found == []) is expected, (initial, attempts, readings, final, found)
        verdicts[expected] += 1
        unclear[expected] += any(a.status == 0 for a in attempts)
        strangers[expected] += any(a.status == 422 for a in attempts)
    assert min(verdicts.values()) > HISTORIES / 7, verdicts
    assert min(unclear.values()) > HISTORIES / 20, unclear
    assert min(strangers.values()) > HISTORIES / 40, strangers


def test_the_checker_agrees_with_that_search_in_every_history_of_two_attempts_and_a_reading():
    """Two keys or one, two customers or one, in all orders: 2 units, then what /audit may say."""
    answers = [
        (200, 1, 1),
        (200, 0, 2),
        (200, 0, 1),
        (200, 1, 2),
        (410, 0, None),
        (422, None, None),
    ]
    answers += [(0, None, None), (503, None, None)]
    times, names = [(0, 1), (2, 3), (0, 3)], [("a", "alice"), ("b", "alice"), ("a", "bob")]
    agreed = {True: 0, False: 0}
    first = [Attempt(0, 0, "alice", "a", 0, 1, *answer) for answer in answers]
    second = [
        Attempt(0, 0, customer, key, *when, *answer)
        for (key, customer), when, answer in product(names, times, answers)
    ]
    for one, other, stock in product(first, second, range(3)):
        count = Audit(AUDITED, AUDITED + 1, stock, 2 - stock)
        expected = explained(2, [one, other], [Reading(*count[:3])])
        found = check(2, [one, other], [], count)
        assert (found == []) is expected, (one, other, stock, found)
        agreed[expected] += 1
    assert min(agreed.values()) > 100, agreed
