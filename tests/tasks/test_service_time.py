"""What a worker reports of its runs."""

from tasks.service_time import ServiceTime


def test_quantiles_are_of_the_last_128_runs_of_each_model() -> None:
    times = ServiceTime()
    for _ in range(500):
        times.observe("m", 9.0, 9.0, 1.0, 5)
    for number in range(128):
        times.observe("m", 0.0, number / 127, 0.0, 5)
    times.observe("other", 2.0, 2.0, 1.0, 0)
    m = times.stats()["m"]
    assert (m["run_p10_ms"], m["run_p50_ms"], m["run_p90_ms"], m["num_runs"]) == (100.0, 500.0, 900.0, 128.0)
    other = times.stats()["other"]
    assert (other["run_p10_ms"], other["run_p90_ms"], other["run_std_ms"]) == (2000.0, 2000.0, 0.0)


def test_the_way_to_the_worker_is_the_median_of_those_who_did_not_wait() -> None:
    times = ServiceTime()
    times.observe("m", 9.0, 9.0, 1.0, 5)
    assert times.stats()["m"]["dispatch_ms"] == 0.0
    for dispatch_ms in (2.0, 3.0, 400.0):
        times.observe_dispatch(dispatch_ms)
    assert times.stats()["m"]["dispatch_ms"] == 3.0


def test_storing_the_answer_holds_the_slot_and_slows_no_token() -> None:
    times = ServiceTime()
    times.observe("m", 1.0, 5.0, 0.5, 2)
    seen = times.stats()["m"]
    assert (seen["run_ms"], seen["token_ms"]) == (5000.0, 500.0)
