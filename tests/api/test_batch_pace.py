"""How many lines of a limited key are under way."""

import math

import pytest

from api.batch_pace import Pace


def has_room(pace: Pace, num_sent: int) -> bool:
    pace.num_sent = num_sent
    return pace.has_room


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("time.monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_nothing_is_held_back_before_a_refusal() -> None:
    pace = Pace(num_sent=10_000, num_accepted=10_000)
    pace.answered()
    assert (pace.has_room, pace.most) == (True, math.inf)


@pytest.mark.parametrize(("told_s", "waited_s"), [(0.0, 2.0), (1.0, 2.0), (17.5, 17.5), (86_400.0, 60.0)])
def test_with_nothing_under_way_one_line_asks_again_when_told(clock: Clock, told_s: float, waited_s: float) -> None:
    pace = Pace()
    pace.refused(told_s)
    clock.now += waited_s - 0.01
    assert not has_room(pace, 0)
    clock.now += 0.02
    assert [has_room(pace, num_sent) for num_sent in (0, 1)] == [True, False]


def test_room_that_its_own_lines_hold_is_waited_for_by_them() -> None:
    pace = Pace(num_sent=5, num_accepted=3)
    pace.refused(1.0)
    assert [has_room(pace, num_sent) for num_sent in (4, 3, 2)] == [False, False, True], "once one of them has ended"


def test_a_rate_is_waited_for_whatever_runs(clock: Clock) -> None:
    pace = Pace(num_sent=1, num_accepted=1)
    pace.refused(30.0)
    assert not has_room(pace, 0)
    clock.now += 31
    assert has_room(pace, 0)


def test_other_limits_are_tried_at_once() -> None:
    pace = Pace(num_sent=3)
    pace.refused(60.0)
    pace.start_anew()
    assert pace.has_room


@pytest.mark.parametrize("most", [1, 2, 7])
def test_a_round_of_answers_makes_room_for_about_one_more(most: int) -> None:
    pace = Pace(num_sent=most, num_accepted=most)
    pace.refused(1.0)
    for _ in range(most):
        pace.answered()
    assert most + 0.7 < pace.most <= most + 1
