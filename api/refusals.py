"""Why nobody can take a call, as an error for its caller."""

from api import errors
from tasks.router import Decision


def _drain_s(decision: Decision) -> float:
    """When the shortest of the full queues is expected to be worked off, between 1 s and a minute."""
    waits = [one.facts["wait_ms"] for one in decision.candidates if one.dropped == "queue_full"]
    return min(max(min(waits) / 1000, 1.0), 60.0)


def of(decision: Decision, mistakes: dict[str, errors.APIError]) -> errors.APIError:
    """Why nobody can take the call: the caller's own mistakes first, then what time will mend."""
    dropped = {candidate.dropped: candidate for candidate in reversed(decision.candidates)}
    for code in ("queue_full", "loading", "no_worker"):
        if code in dropped and not mistakes:
            if code == "queue_full":
                return errors.QueueFull(retry_after_s=_drain_s(decision))
            state = "still loading" if code == "loading" else "not up"
            return errors.ModelUnavailable(f"The model is {state}; try again soon.")
    if mistakes:
        return next(iter(mistakes.values()))
    if (candidate := dropped.get("unsupported_parameter")) is not None:
        return errors.UnsupportedParameter(f"This model does not support {candidate.param}.", param=candidate.param)
    return errors.ModelNotFound("The model exists, but does not do this task.", param="model")
