"""One function from a call to a Decision."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import catalog
from api import errors, refusals
from backends.registry import backend_class
from catalog import Catalog
from db.job_views import Depth
from db.workers import Life
from tasks import router
from tasks.call import Call
from tasks.fair_share import Level
from tasks.router import Load

CONFIG = """
backends:
  fast: {runtime: echo, max_queued: 10}
  slow: {runtime: echo}
  gpt: {runtime: gpt}
models:
  both: {path: echo, backends: [slow, fast], fallback: [spare]}
  spare: {path: echo, backends: [slow], auto: false}
"""


@pytest.fixture
def served(tmp_path: Path) -> Catalog:
    file = tmp_path / "switchyard.yaml"
    file.write_text(CONFIG)
    return catalog.load(file, tmp_path)


def life(backend: str, token_ms: float | None = None, state: str = "ready", slots: int = 4) -> Life:
    times = {"run_ms": 1000.0, "ttft_ms": 10.0, "token_ms": token_ms, "tokens": 50.0}
    stats: dict[str, Any] = {"service": {"both": times}} if token_ms is not None else {}
    return Life(1, f"{backend}0", backend, state, slots, {}, stats, 1, 0.0)


def load(*lives: Life, queued: int = 0, running: int = 0) -> Load:
    return Load.of(lives, Depth(queued, running, 0, 0.0))


def call(model: str = "both", **fields: Any) -> Call:
    return Call(endpoint="/v1/completions", task="generate", model=model, token_ids=[[1, 2]], max_tokens=20, **fields)


def choose(served: Catalog, one: Call, loads: dict[str, Load], **fields: Any) -> router.Decision:
    tokenised = dict.fromkeys(served.models, one) | fields.pop("tokenised", {})
    return router.choose(served, one, tokenised, loads, **{"can_wait": False, **fields})


def dropped(decision: router.Decision) -> dict[tuple[str, str], str | None]:
    return {(one.model, one.backend): one.dropped for one in decision.candidates}


def test_the_measured_faster_backend_wins(served: Catalog) -> None:
    decision = choose(served, call(), {"slow": load(life("slow", 30.0)), "fast": load(life("fast", 5.0))})
    assert decision.chosen is not None
    assert decision.chosen.backend == "fast"
    assert decision.chosen.score_ms == 10 + 20 * 5
    assert decision.reason == "lowest expected completion time"
    assert [one.score_ms for one in decision.candidates] == [610.0, 110.0]


def test_a_queue_makes_the_slower_backend_faster(served: Catalog) -> None:
    loads = {"slow": load(life("slow", 30.0)), "fast": load(life("fast", 5.0), queued=6, running=4)}
    decision = choose(served, call(), loads)
    assert decision.chosen is not None
    assert decision.chosen.backend == "slow"
    assert decision.candidates[1].facts["wait_ms"] == 7 / 4 * 1000


def test_backends_without_a_ready_worker_are_dropped_with_the_reason(served: Catalog) -> None:
    loads = {"slow": load(life("slow", 30.0)), "fast": load(life("fast", 5.0, state="loading"))}
    assert dropped(choose(served, call(), loads)) == {("both", "slow"): None, ("both", "fast"): "loading"}
    assert dropped(choose(served, call(), {"slow": loads["slow"]}))[("both", "fast")] == "no_worker"


def test_a_full_queue_is_dropped(served: Catalog) -> None:
    decision = choose(served, call(), {"fast": load(life("fast", 5.0), queued=10)})
    assert decision.chosen is None
    assert dropped(decision)[("both", "fast")] == "queue_full"


def test_the_fallback_is_considered_only_when_the_model_is_down(served: Catalog) -> None:
    loads = {"slow": load(life("slow")), "fast": load(life("fast"))}
    assert ("spare", "slow") not in dropped(choose(served, call(), loads))
    loads = {"slow": load(life("slow"))}
    one = call()
    decision = choose(served, one, loads, tokenised={"both": "context_length_exceeded"})
    assert decision.chosen is not None
    assert decision.chosen.model == "spare"
    assert decision.reason == "fallback: no worker of both is up"


def test_who_can_wait_is_held_in_the_first_queue(served: Catalog) -> None:
    assert choose(served, call(), {}).chosen is None
    held = choose(served, call(), {}, can_wait=True)
    assert held.chosen is not None
    assert held.chosen.backend == "slow"


def test_auto_considers_every_model_that_allows_it(served: Catalog) -> None:
    loads = {"slow": load(life("slow", 30.0)), "fast": load(life("fast", 5.0))}
    decision = choose(served, call("auto"), loads)
    assert set(dropped(decision)) == {("both", "slow"), ("both", "fast")}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"params": {"logprobs": 1}}, "logprobs"),
        ({"params": {"min_p": 0.1}}, "min_p"),
        ({"params": {"logit_bias": {"1": 2}}}, "logit_bias"),
    ],
)
def test_what_a_backend_cannot_honour_is_named(served: Catalog, fields: dict[str, Any], param: str) -> None:
    decision = choose(served, call(**fields), {"fast": load(life("fast"))})
    assert decision.chosen is None
    assert {one.param for one in decision.candidates if one.dropped == "unsupported_parameter"} == {param}


def test_echos_options_need_echo(served: Catalog) -> None:
    capabilities = backend_class("gpt").capabilities
    assert router.unsupported_parameter(call(options={"token_ms": 1}), capabilities, "gpt") == "options"
    assert router.unsupported_parameter(call(params={"logprobs": 20}), capabilities, "gpt") is None
    assert router.unsupported_parameter(call(params={"logprobs": 21}), capabilities, "gpt") == "logprobs"
    constrained = call(params={"grammar": 'start: "a"'}, format={"constrained_by": "response_format"})
    assert router.unsupported_parameter(constrained, capabilities, "gpt") is None
    echo = backend_class("echo").capabilities
    assert router.unsupported_parameter(constrained, echo, "echo") == "response_format"


def test_a_longer_answer_scores_worse(served: Catalog) -> None:
    loads = {"fast": load(life("fast", 5.0))}
    short, long = (choose(served, replace(call(), max_tokens=n), loads).chosen for n in (10, 90))
    assert short is not None
    assert long is not None
    assert (short.score_ms or 0) < (long.score_ms or 0)


def measured(backend: str, num_runs: float = 100.0, slots: int = 4, dispatch_ms: float = 0.0) -> Life:
    """Ten milliseconds to the first token, ten a token; runs of 0.2 s, give or take."""
    times = {"run_ms": 200.0, "ttft_ms": 10.0, "token_ms": 10.0, "tokens": 19.0, "run_p10_ms": 150.0, "run_p50_ms": 200.0,
             "run_p90_ms": 300.0, "run_std_ms": 50.0, "num_runs": num_runs, "dispatch_ms": dispatch_ms}  # fmt: skip
    return Life(1, f"{backend}0", backend, "ready", slots, {}, {"service": {"both": times, "spare": times}}, 1, 0.0)


def test_the_expected_time_is_what_waits_ahead_and_the_run(served: Catalog) -> None:
    model = served.models["both"]
    idle = router.expected(None, model, load(measured("slow")), 0)
    assert (idle["soonest_ms"], idle["eta_p50_ms"], idle["eta_p90_ms"]) == (150.0, 200.0, 300.0)
    busy = router.expected(None, model, load(measured("slow"), queued=13, running=4), 13)
    assert busy["eta_p50_ms"] == 14 * 200 / 4 + 200
    assert busy["eta_p90_ms"] == pytest.approx(14 * 200 / 4 + 1.2816 * 50 * 14**0.5 / 4 + 300, abs=0.01)
    short = router.expected(replace(call(), max_tokens=1), model, load(measured("slow")), 0)
    assert short["eta_p50_ms"] == 20.0
    far = router.expected(None, model, load(measured("slow", dispatch_ms=5.0)), 0)
    assert (far["soonest_ms"], far["eta_p50_ms"], far["eta_p90_ms"]) == (150.0, 205.0, 305.0)
    assert router.expected(None, model, load(measured("slow", num_runs=15)), 0) == {}
    assert router.expected(None, model, load(life("slow", 30.0)), 0) == {}


def test_a_deadline_that_cannot_be_met_drops_the_candidate(served: Catalog) -> None:
    loads = {"slow": load(measured("slow"), queued=40, running=4), "fast": load(measured("fast"))}
    late = choose(served, call(), loads, within_ms=500.0)
    assert dropped(late) == {("both", "slow"): "deadline_unmeetable", ("both", "fast"): None}
    assert late.chosen is not None
    assert late.chosen.backend == "fast"
    # Before whom nobody waits: within its share.
    assert dropped(choose(served, call(), loads, within_ms=500.0, levels={"slow": Level.WITHIN_SHARE})) == {
        ("both", "slow"): None, ("both", "fast"): None,
    }  # fmt: skip
    nobody = choose(served, call(), {"slow": loads["slow"]}, within_ms=100.0)
    refused = refusals.of(nobody, {})
    assert isinstance(refused, errors.DeadlineUnmeetable)
    assert refused.retry_after_s is not None
    assert 1 <= refused.retry_after_s <= 60
    assert not refused.is_permanent
    hopeless = choose(served, call(), {"slow": load(measured("slow"))}, within_ms=100.0)
    assert refusals.of(hopeless, {}).is_permanent


def test_what_was_not_measured_is_never_called_late(served: Catalog) -> None:
    decision = choose(served, call(), {"slow": load(life("slow", 5000.0), queued=50)}, within_ms=1.0)
    assert decision.chosen is not None


def test_workers_of_two_versions_are_averaged_over_what_both_report(served: Catalog) -> None:
    both = load(measured("slow"), life("slow", 30.0))
    assert both.service["both"].keys() == {"run_ms", "ttft_ms", "token_ms", "tokens"}
