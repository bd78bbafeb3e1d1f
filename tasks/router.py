"""The prompt router: from a call to a Decision, in one function.

A candidate is a (model, backend) pair. Each is dropped for a reason or scored with the milliseconds in
which it is expected to finish the call; the lowest score wins. The whole Decision is kept on the job.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from backends.base import Capabilities
from backends.registry import backend_class
from catalog import BackendSpec, Catalog, ModelSpec
from db.job_views import Depth
from db.workers import Life
from tasks.call import Call
from tasks.fair_share import Level

_UNKNOWN_TOKEN_MS = 40.0
_UNKNOWN_RUN_MS = 200.0
"""Assumed of a model that has not finished a job yet."""
_UNKNOWN_TOKENS = 128.0
_FEWEST_RUNS = 16
"""Measured runs below which no deadline is called unmeetable."""
_Z90 = 1.2816
"""The normal distribution's 90th percentile, in standard deviations."""


@dataclass(frozen=True, slots=True)
class Load:
    """A backend as it stands: its workers and its queue. Refreshed twice a second, read by every call."""

    lives: tuple[Life, ...] = ()
    depth: Depth = Depth(0, 0, 0, 0.0)
    is_ready: bool = False
    is_loading: bool = False
    slots: int = 0
    """Of the workers that are ready."""
    service: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Each model's measured times, averaged over the ready workers that have any."""

    @classmethod
    def of(cls, lives: Iterable[Life], depth: Depth) -> "Load":
        lives = tuple(lives)
        ready = [life for life in lives if life.state == "ready"]
        measured = [life.stats.get("service", {}) for life in ready]
        return cls(
            lives=lives,
            depth=depth,
            is_ready=bool(ready),
            is_loading=any(life.state == "loading" for life in lives),
            slots=sum(life.slots for life in ready),
            service={model: _mean([one[model] for one in measured if model in one])
                     for model in {name: None for one in measured for name in one}},
        )  # fmt: skip

    def with_one_more(self, prompt_tokens: int) -> "Load":
        """With one more job in its queue."""
        # By position, because every call comes by here and `dataclasses.replace` looks at each field by its name.
        was = self.depth
        depth = Depth(was.num_queued + 1, was.num_running, was.queued_tokens + prompt_tokens, was.oldest_queued_s)
        return Load(self.lives, depth, self.is_ready, self.is_loading, self.slots, self.service)


def _mean(times: Sequence[Mapping[str, float]]) -> dict[str, float]:
    # A worker of another version may report less.
    names = set.intersection(*[set(one) for one in times])
    return {name: sum(one[name] for one in times) / len(times) for name in times[0] if name in names}


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to serve the call: its score, or why it was dropped."""

    model: str
    backend: str
    score_ms: float | None = None
    dropped: str | None = None
    param: str | None = None
    """The parameter that the backend cannot honour."""
    facts: dict[str, float] = field(default_factory=dict)
    """What the score was made of."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a call goes and why. `chosen` is None where nobody can take it."""

    requested_model: str
    chosen: Candidate | None
    reason: str
    candidates: tuple[Candidate, ...]
    level: Level = Level.WITHIN_SHARE
    """Of the backend's queue, where the job waits."""


def models_for(catalog: Catalog, call: Call) -> list[ModelSpec]:
    """The models that may answer, the first choice first, then its fallbacks. Empty: unknown model."""
    if call.model == "auto":
        return [model for model in catalog.models.values() if model.entry.auto and call.task in model.tasks]
    model = catalog.model(call.model)
    if model is None:
        return []
    return [model, *(catalog.models[name] for name in model.entry.fallback)]


def choose(
    catalog: Catalog,
    call: Call,
    tokenised: Mapping[str, Call | str],
    loads: Mapping[str, Load],
    *,
    can_wait: bool,
    crowded: Collection[str] = (),
    within_ms: float | None = None,
    levels: Mapping[str, Level] | None = None,
) -> Decision:
    """Choose model and backend.

    `tokenised` has the call as each candidate model would run it, or the reason why that model cannot
    take it. `can_wait` lets a job queue for a backend whose workers are away. `crowded` names the backends whose
    queues have no room for more of this tenant. `within_ms` is how long its deadline leaves it, `levels` has in which
    level of each backend's queue it would wait: within its share nobody goes before it, otherwise all. A fallback
    model is considered only when the models before it have no candidate left.
    """
    limits = _Limits(crowded, levels or {}, within_ms)
    candidates: list[Candidate] = []
    for model in models_for(catalog, call):
        ready = tokenised.get(model.name, "unknown_model")
        new = [_candidate(call, model, backend, ready, loads, limits) for backend in catalog.serving(model)]
        candidates += new
        if call.model != "auto" and any(one.dropped is None for one in new):
            break
    alive = [one for one in candidates if one.dropped is None]
    if alive:
        best = min(alive, key=lambda one: one.score_ms or 0.0)
        level = limits.levels.get(best.backend, Level.WITHIN_SHARE)
        return Decision(call.model, best, _reason(call, best, alive, catalog), tuple(candidates), level)
    held = [one for one in candidates if one.dropped in ("no_worker", "loading")]
    if held and can_wait:
        level = limits.levels.get(held[0].backend, Level.WITHIN_SHARE)
        return Decision(call.model, held[0], "no worker is up: held in its queue", tuple(candidates), level)
    return Decision(call.model, None, "no candidate is left", tuple(candidates))


def _candidate(
    call: Call,
    model: ModelSpec,
    backend: BackendSpec,
    ready: Call | str,
    loads: Mapping[str, Load],
    limits: "_Limits",
) -> Candidate:
    capabilities = backend_class(backend.runtime).capabilities
    if call.task not in model.tasks or call.task not in capabilities.tasks:
        return Candidate(model.name, backend.name, dropped="wrong_task")
    param = unsupported_parameter(call, capabilities, backend.runtime)
    if param is not None:
        return Candidate(model.name, backend.name, dropped="unsupported_parameter", param=param)
    if isinstance(ready, str):
        return Candidate(model.name, backend.name, dropped=ready)
    load = loads.get(backend.name, Load())
    if not load.is_ready:
        return Candidate(model.name, backend.name, dropped="loading" if load.is_loading else "no_worker")
    score, facts = _score(ready, model, load)
    is_next = limits.levels.get(backend.name) is Level.WITHIN_SHARE
    facts |= expected(ready, model, load, 0 if is_next else load.depth.num_queued)
    is_full = load.depth.num_queued >= backend.entry.max_queued or backend.name in limits.crowded
    if is_full or load.depth.queued_tokens >= backend.entry.max_queued_tokens:
        return Candidate(model.name, backend.name, dropped="queue_full", facts=facts)
    if limits.within_ms is not None and facts.get("soonest_ms", 0.0) > limits.within_ms:
        return Candidate(model.name, backend.name, dropped="deadline_unmeetable", facts=facts)
    return Candidate(model.name, backend.name, score_ms=round(score, 2), facts=facts)


@dataclass(frozen=True, slots=True)
class _Limits:
    """What of the caller, beside its call, decides where the call may go."""

    crowded: Collection[str]
    levels: Mapping[str, Level]
    within_ms: float | None


def expected(call: Call | None, model: ModelSpec, load: Load, ahead: int) -> dict[str, float]:
    """From measured runs, when a job with so many queued before it will have its answer, in milliseconds: `eta_p50_ms`,
    `eta_p90_ms`, and `soonest_ms`, before which nothing may be hoped for. Empty before there are enough runs, and where
    no worker is ready.

    A job that finds a free slot takes its way to the worker and its run. The wait for a slot is a sum of `ahead` runs
    shared by the slots: its spread grows with their root (central limit theorem).
    """
    seen = load.service.get(model.name, {})
    if seen.get("num_runs", 0.0) < _FEWEST_RUNS or not load.slots:
        return {}
    run = {name: seen[f"run_{name}_ms"] for name in ("p10", "p50", "p90")}
    if call is not None and call.task == "generate":
        # A short answer takes less than the runs seen.
        longest = seen["ttft_ms"] + (call.max_tokens or seen["tokens"]) * seen["token_ms"]
        run["p10"], run["p50"] = min(run["p10"], longest), min(run["p50"], longest)
    waiting = max(ahead + load.depth.num_running + 1 - load.slots, 0)
    wait_ms = waiting * seen["run_ms"] / load.slots
    dispatch_ms = seen.get("dispatch_ms", 0.0)
    spread_ms = _Z90 * seen["run_std_ms"] * waiting**0.5 / load.slots
    # Half of the wait: what is ahead may be shorter than what was seen.
    return {
        "num_ahead": float(ahead),
        "soonest_ms": round(wait_ms / 2 + run["p10"], 2),
        "eta_p50_ms": round(dispatch_ms + wait_ms + run["p50"], 2),
        "eta_p90_ms": round(dispatch_ms + wait_ms + spread_ms + run["p90"], 2),
    }


def unsupported_parameter(call: Call, capabilities: Capabilities, runtime: str) -> str | None:
    """The first parameter of the call that such a backend cannot honour."""
    if call.options and runtime != "echo":
        return "options"
    for name in call.params:
        if name == "logprobs":
            if call.params[name] > capabilities.max_logprobs or not capabilities.max_logprobs:
                return "logprobs"
        elif name not in capabilities.parameters:
            return call.constrained_by if name == "grammar" else name
    return None


def _score(call: Call, model: ModelSpec, load: Load) -> tuple[float, dict[str, float]]:
    """Expected milliseconds until the answer: the wait for a slot, then the run."""
    seen = load.service.get(model.name)
    sequences = max(len(call.token_ids), 1) * call.n if call.task == "generate" else 1
    if call.task == "generate":
        seen = seen or {"ttft_ms": _UNKNOWN_RUN_MS, "token_ms": _UNKNOWN_TOKEN_MS, "tokens": _UNKNOWN_TOKENS}
        tokens = min(float(call.max_tokens or _UNKNOWN_TOKENS), max(seen["tokens"], 1.0) * 2)
        run_ms = seen["ttft_ms"] + tokens * seen["token_ms"]
        mean_ms = seen.get("run_ms", run_ms)
    else:
        run_ms = mean_ms = (seen or {"run_ms": _UNKNOWN_RUN_MS})["run_ms"]
        tokens = 0.0
    ahead = load.depth.num_queued + load.depth.num_running + sequences - load.slots
    wait_ms = max(ahead, 0) / max(load.slots, 1) * mean_ms
    facts = {
        "wait_ms": round(wait_ms, 2),
        "run_ms": round(run_ms, 2),
        "tokens": tokens,
        "num_queued": load.depth.num_queued,
        "num_running": load.depth.num_running,
        "slots": load.slots,
        "is_measured": float(model.name in load.service),
    }
    return wait_ms + run_ms, facts


def _reason(call: Call, best: Candidate, alive: Sequence[Candidate], catalog: Catalog) -> str:
    first = catalog.model(call.model)
    if first is not None and best.model != first.name:
        return f"fallback: no worker of {first.name} is up"
    if len(alive) == 1:
        return "the only candidate left"
    return "lowest expected completion time"
