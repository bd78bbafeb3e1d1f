"""How long jobs take here: what a worker measures and the router's estimates start from."""

import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import Any

_WEIGHT = 0.2
"""Of the newest job in the moving average: about the last ten jobs count."""
_RECENT = 128
"""Runs from which the quantiles are taken."""


@dataclass(slots=True)
class ServiceTime:
    """Moving averages and quantiles per model of one worker, with the load they were measured under included."""

    models: dict[str, dict[str, float]] = field(default_factory=dict)
    recent: dict[str, deque[float]] = field(default_factory=dict)
    """The last runs of each model, in milliseconds."""
    dispatches: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))
    """From a job's creation to its claim, where it had not to wait for a slot, in milliseconds."""

    def observe_dispatch(self, dispatch_ms: float) -> None:
        """Count a job that found a free slot."""
        self.dispatches.append(dispatch_ms)

    def observe(self, model: str, run_s: float, stored_s: float, ttft_s: float, completion_tokens: int) -> None:
        """Count one finished job. From its claim on: its answer came after `run_s` and was stored after `stored_s`, for
        so long it held its slot."""
        self.recent.setdefault(model, deque(maxlen=_RECENT)).append(stored_s * 1000)
        token_ms = (run_s - ttft_s) * 1000 / max(completion_tokens - 1, 1)
        seen = {
            "run_ms": stored_s * 1000,
            "ttft_ms": ttft_s * 1000,
            "token_ms": token_ms,
            "tokens": float(completion_tokens),
        }
        average = self.models.get(model)
        if average is None:
            self.models[model] = seen
            return
        for name, value in seen.items():
            average[name] += _WEIGHT * (value - average[name])

    def stats(self) -> dict[str, Any]:
        """As the heartbeat reports it. `run_ms` and its quantiles last until the answer was stored, while the slot was
        held; a job's own `run_ms` ends with the answer."""
        return {
            model: {name: round(value, 3) for name, value in (average | self._spread(model)).items()}
            # A copy: another thread reports while the event loop observes.
            for model, average in list(self.models.items())
        }

    def _spread(self, model: str) -> dict[str, float]:
        runs = list(self.recent[model])
        tenths = statistics.quantiles(runs, n=10, method="inclusive") if len(runs) > 1 else runs * 9
        return {
            "dispatch_ms": statistics.median(list(self.dispatches) or [0.0]),
            "run_p10_ms": tenths[0],
            "run_p50_ms": tenths[4],
            "run_p90_ms": tenths[8],
            "run_std_ms": statistics.pstdev(runs),
            "num_runs": float(len(runs)),
        }
