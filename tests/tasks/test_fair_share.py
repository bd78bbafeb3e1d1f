"""Who goes first, decided from backlogs alone."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from db.job_views import Backlog
from tasks.fair_share import FairShare, Level, Priority


def shares(**tenants: tuple[int, int]) -> FairShare:
    made = FairShare()
    made.update(Backlog("echo", tenant, *of) for tenant, of in tenants.items())
    return made


def level(made: FairShare, tenant: str, priority: Priority = Priority.DEFAULT, slots: int = 8) -> Level:
    return made.level("echo", tenant, priority, slots)


def test_a_newcomer_goes_before_every_backlog() -> None:
    made = shares(flood=(500, 50_000))
    assert level(made, "flood") is Level.DEFAULT
    assert level(made, "late") is Level.WITHIN_SHARE
    assert level(made, "late", Priority.PRIORITY) is Level.WITHIN_SHARE


def test_priorities_order_what_is_beyond_its_share() -> None:
    made = shares(flood=(500, 50_000))
    steps = [level(made, "flood", priority).step for priority in Priority]
    assert steps == sorted(steps)
    assert 0 not in steps


@pytest.mark.parametrize("priority", [Priority.FLEX, Priority.BATCH])
def test_flexible_work_never_counts_as_within_a_share(priority: Priority) -> None:
    assert level(FairShare(), "anybody", priority).step > Level.DEFAULT.step


def test_a_small_backlog_is_within_a_share_beside_a_large_one() -> None:
    made = shares(flood=(500, 50_000), modest=(40, 4_000))
    assert level(made, "modest") is Level.WITHIN_SHARE, "less than a quarter of the mean"
    assert level(shares(one=(200, 20_000), two=(200, 20_000)), "one") is Level.DEFAULT


def test_what_has_ended_no_longer_counts() -> None:
    made = FairShare()
    for number in range(8):
        made.add(f"job {number}", "echo", "t", 100)
    assert level(made, "t") is Level.DEFAULT
    made.ended(["job 3", "of another gateway"])
    assert level(made, "t") is Level.WITHIN_SHARE
    made.update([Backlog("echo", "t", 8, 800)])
    made.ended(["job 4"])
    assert level(made, "t") is Level.DEFAULT, "the ledger's word already knows of it"
    made.ended(f"job {number}" for number in range(8))


def test_a_backlog_is_measured_in_average_calls() -> None:
    made = shares(large=(4, 4_000), small=(36, 360))
    assert level(made, "small", slots=8) is Level.WITHIN_SHARE, "36 calls, as much work as 3.3 average ones"
    assert level(made, "large", slots=8) is Level.DEFAULT, "4 calls, as much work as 37 average ones"


def test_a_weight_multiplies_what_a_tenant_may_queue_and_its_share() -> None:
    made = shares(one=(100, 10_000), two=(100, 10_000))
    assert not made.may_queue("echo", "one", 212)
    assert made.may_queue("echo", "one", 212, weight=2.0)
    assert made.level("echo", "one", Priority.DEFAULT, 60) is Level.DEFAULT
    assert made.level("echo", "one", Priority.DEFAULT, 60, weight=2.0) is Level.WITHIN_SHARE


def test_what_this_process_adds_counts_at_once() -> None:
    made = FairShare()
    levels = []
    for number in range(10):
        levels.append(level(made, "t", slots=4))
        made.add(str(number), "echo", "t", 100)
    assert levels == [Level.WITHIN_SHARE] * 4 + [Level.DEFAULT] * 6


def test_one_tenant_leaves_room_and_several_share_evenly() -> None:
    alone = _fill(["a"])
    assert 80 <= alone["a"] < 100
    both = _fill(["a", "b"])
    assert abs(both["a"] - both["b"]) <= 1
    assert sum(both.values()) < 100
    made = FairShare()
    for tenant, num in both.items():
        for number in range(num):
            made.add(f"{tenant} {number}", "echo", tenant, 10)
    assert made.may_queue("echo", "late", 100)


@given(st.integers(1, 12), st.integers(1, 2_000))
def test_thresholds_never_overfill(num_tenants: int, max_queued: int) -> None:
    filled = _fill([str(number) for number in range(num_tenants)], max_queued)
    assert sum(filled.values()) <= max_queued + num_tenants
    assert max(filled.values()) - min(filled.values()) <= 1


def _fill(tenants: list[str], max_queued: int = 100) -> dict[str, int]:
    """Every tenant queues in turn until all are refused."""
    made, queued = FairShare(), dict.fromkeys(tenants, 0)
    refused: set[str] = set()
    for tenant in itertools.cycle(tenants):
        if len(refused) == len(tenants):
            return queued
        if made.may_queue("echo", tenant, max_queued):
            made.add(f"{tenant} {queued[tenant]}", "echo", tenant, 10)
            queued[tenant] += 1
        else:
            refused.add(tenant)
    raise AssertionError
