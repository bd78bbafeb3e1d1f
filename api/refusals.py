"""Why nobody can take a call, as an error for its caller."""

from api import errors
from db.budgets import Refused
from tasks.router import Decision


def _drain_s(decision: Decision) -> float:
    """When the shortest of the full queues is expected to be worked off, between 1 s and a minute."""
    waits = [one.facts["wait_ms"] for one in decision.candidates if one.dropped == "queue_full"]
    return min(max(min(waits) / 1000, 1.0), 60.0)


def _deadline(decision: Decision) -> errors.APIError:
    """Later the queue may be shorter; where the run alone takes too long, that does not help."""
    late = [one.facts for one in decision.candidates if one.dropped == "deadline_unmeetable"]
    wait_ms = min(one["wait_ms"] for one in late)
    return errors.DeadlineUnmeetable(retry_after_s=min(max(wait_ms / 1000, 1.0), 60.0), is_permanent=wait_ms == 0)


def of(decision: Decision, mistakes: dict[str, errors.APIError]) -> errors.APIError:
    """Why nobody can take the call: the caller's own mistakes first, then what time will mend."""
    dropped = {candidate.dropped: candidate for candidate in reversed(decision.candidates)}
    for code in ("queue_full", "deadline_unmeetable", "loading", "no_worker"):
        if code in dropped and not mistakes:
            if code == "queue_full":
                return errors.QueueFull(retry_after_s=_drain_s(decision))
            if code == "deadline_unmeetable":
                return _deadline(decision)
            state = "still loading" if code == "loading" else "not up"
            return errors.ModelUnavailable(f"The model is {state}; try again soon.")
    if mistakes:
        return next(iter(mistakes.values()))
    if (candidate := dropped.get("unsupported_parameter")) is not None:
        return errors.UnsupportedParameter(f"This model does not support {candidate.param}.", param=candidate.param)
    return errors.ModelNotFound("The model exists, but does not do this task.", param="model")


def of_budget(refused: Refused) -> errors.APIError:
    """Why a key's or tenant's limits do not hold a call. Where jobs that are under way may give back what they
    hold, trying again soon makes sense; where the day's budget is spent, it does not."""
    owner = "API key" if refused.of == "key" else "tenant"
    if refused.limit == "max_concurrent":
        return errors.RateLimited(f"The {owner} has as many jobs under way as it may have at a time.")
    unit = "tokens" if refused.limit == "daily_tokens" else "cost"
    if refused.is_spent:
        left = f"What is left of the {owner}'s daily budget of {unit} does not hold this request."
        return errors.InsufficientQuota(left, retry_after_s=refused.renewed_in_s)
    held = f"Jobs that are under way hold what is left of the {owner}'s daily budget of {unit}."
    return errors.InsufficientQuota(held, retry_after_s=1.0, is_permanent=False)
