"""The history checker: what clients were told, against what the ledger holds. Jepsen's manner, on one machine.

Every check is a pure function of (history, two looks at the ledger after quiesce) and says how many facts it
compared: an invariant that was checked nowhere has not held. The names are those of the design's invariants.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from db.states import TERMINAL, TRANSITIONS, JobStatus
from tasks.stream import RUN_STEP
from tests.faults.audit import Job, Ledger, Transition
from tests.faults.history import Record, prompt_of

MAX_ATTEMPTS = 3
SLACK_S = 0.5
"""For the harness's own scheduling."""
STARVED_SLACK_S = 1.5
"""More, while the machine had no CPU left, which the harness shares with what it breaks. What hangs is still late."""
UNAVAILABLE_S = 2.5
"""How soon a 503 must come, whatever was asked: a statement's patience and a bit. Where Postgres is back just before
that, the answer itself may take as long."""
_GIVEN_BACK = frozenset({"released", "claim_lost"})
"""Outcomes of attempts that do not count."""
_CLOCK_ROWS = frozenset({"F70"})
_INTERRUPTED = frozenset({"stream_interrupted", "conflict_state", "dependency_unavailable", "model_unavailable"})
"""How a stream may end early, as long as it says so and what it showed was right."""
_UNAVAILABLE = frozenset({"dependency_unavailable", "model_unavailable", "overloaded", "storage_full"})
_BUSY = frozenset({"queue_full", "rate_limit_exceeded"})


@dataclass(slots=True)
class Finding:
    """One invariant's verdict."""

    invariant: str
    checked: int = 0
    violations: list[str] = field(default_factory=list)
    note: str = ""

    def expect(self, holds: bool, what: str) -> None:
        """Count one comparison."""
        self.checked += 1
        if not holds:
            self.violations.append(what)

    def __str__(self) -> str:
        line = f"{self.invariant:<4} checked={self.checked:,} violations={len(self.violations):,}"
        return f"{line}  {self.note}" if self.note else line


@dataclass(frozen=True, slots=True)
class Run:
    """What a check may look at."""

    history: Sequence[Record]
    before: Ledger
    after: Ledger

    @property
    def accepted(self) -> dict[str, Record]:
        """Job id → the first answer that promised it."""
        found: dict[str, Record] = {}
        for record in self.history:
            is_promise = record.kind in ("submit", "ask", "cached", "stream") and record.status in (200, 202)
            if is_promise and record.job_id is not None and record.type != "invoke":
                found.setdefault(record.job_id, record)
        return found

    @property
    def answers(self) -> list[Record]:
        return [record for record in self.history if record.type != "invoke" and record.op]

    @property
    def retried(self) -> set[str]:
        return {record.job_id for record in self.history if record.kind == "retry" and record.job_id is not None}

    @property
    def moves(self) -> dict[str, list[Transition]]:
        found: dict[str, list[Transition]] = defaultdict(list)
        for move in self.after.transitions:
            found[move.job_id].append(move)
        return found


def accepted_is_durable(run: Run) -> Finding:
    """I1: what was promised exists, and has reached exactly one final state."""
    finding, moves, retried = Finding("I1"), run.moves, run.retried
    for job_id, record in run.accepted.items():
        job = run.after.jobs.get(job_id)
        if job is None:
            finding.expect(False, f"{job_id}: accepted by {record.kind} in {record.row}, lost")
            continue
        ends = sum(move.became in TERMINAL and move.was != move.became for move in moves[job_id])
        is_one = ends == 1 or (ends > 1 and job_id in retried)
        finding.expect(job.status in TERMINAL and is_one, f"{job_id}: {job.status} after {ends} ends, {record.row}")
    return finding


def terminal_is_final(run: Run) -> Finding:
    """I2: two looks agree, every move is in the state machine, and nobody was told anything else."""
    finding, retried = Finding("I2"), run.retried
    for job_id, old in run.before.jobs.items():
        if old.status in TERMINAL and job_id not in retried:
            new = run.after.jobs.get(job_id)
            finding.expect(
                new is not None and _final(new) == _final(old), f"{job_id}: changed after it was {old.status}"
            )
    for move in run.after.transitions:
        if move.was is None:
            is_allowed = move.became == JobStatus.QUEUED
        elif move.job_id in retried and move.was in TERMINAL and move.became == JobStatus.QUEUED:
            is_allowed = True
        else:
            is_allowed = JobStatus(move.became) in TRANSITIONS[JobStatus(move.was)]
        finding.expect(is_allowed, f"{move.job_id}: {move.was} -> {move.became}")
    for record in run.answers:
        if record.state in TERMINAL and record.job_id is not None and record.job_id not in retried:
            job = run.after.jobs.get(record.job_id)
            is_same = job is not None and job.status == record.state
            finding.expect(is_same, f"{record.job_id}: a {record.kind} saw {record.state}, now {job and job.status}")
    return finding


def _final(job: Job) -> tuple[object, ...]:
    return job.status, job.sha256, job.code, job.usage, job.finished_at


def bytes_are_faithful(run: Run) -> Finding:
    """I3: a result is what its hash says, and every copy of it that was served is the same bytes."""
    finding = Finding("I3")
    for job in run.after.jobs.values():
        if job.sha256 is not None:
            finding.expect(job.sha256 == job.stored_sha256, f"{job.id}: stored bytes and stored hash differ")
    for record in run.answers:
        if record.kind in ("result", "ask", "cached") and record.status == 200 and record.job_id is not None:
            stored = _result_of(run.after, record.job_id)
            finding.expect(
                stored == record.sha256, f"{record.job_id}: {record.kind} served other bytes than are stored"
            )
    return finding


def _result_of(ledger: Ledger, job_id: str) -> str | None:
    """The hash of a job's answer; a follower's is its leader's."""
    job = ledger.jobs.get(job_id)
    if job is not None and job.sha256 is None and job.leader_id is not None:
        job = ledger.jobs.get(job.leader_id)
    return None if job is None else job.sha256


def tenants_are_apart(run: Run) -> Finding:
    """I4: rows belong to who asked, answers to their question, and a foreign job looks like none at all."""
    finding = Finding("I4")
    unknown = {
        record.nonce: record.sha256 for record in run.answers if record.kind == "unknown" and record.status == 404
    }
    for job_id, record in run.accepted.items():
        if (job := run.after.jobs.get(job_id)) is not None:
            finding.expect(job.tenant == record.tenant, f"{job_id}: {record.tenant}'s job is {job.tenant}'s")
    for record in run.answers:
        if record.kind == "foreign" and record.status is not None and record.status < 500 and record.status != 429:
            is_blind = record.status == 404 and record.sha256 == unknown.get(record.nonce, record.sha256)
            finding.expect(is_blind, f"{record.tenant} reached another tenant's job{record.nonce}: {record.status}")
        if record.kind in ("result", "ask", "cached") and record.text is not None:
            finding.expect(record.text == prompt_of(record.nonce), f"op {record.op}: an answer to another question")
    return finding


def one_completion(run: Run) -> Finding:
    """I5: one attempt's result is stored, once, by the worker that holds the job."""
    finding, retried = Finding("I5"), run.retried
    writes: dict[str, int] = defaultdict(int)
    for job_id, _ in run.after.writes:
        writes[job_id] += 1
    for job_id, moves in run.moves.items():
        successes = sum(move.became == JobStatus.SUCCEEDED for move in moves)
        is_one = successes <= 1 and writes[job_id] <= 1
        finding.expect(
            is_one or job_id in retried, f"{job_id}: stored {writes[job_id]} times, succeeded {successes} times"
        )
        holder: str | None = None
        for move in moves:
            if move.became == JobStatus.RUNNING:
                holder = move.role
            elif move.was == JobStatus.RUNNING and move.became == JobStatus.SUCCEEDED:
                finding.expect(move.role == holder, f"{job_id}: held by {holder}, finished by {move.role}")
    return finding


def attempts_are_bounded(run: Run) -> Finding:
    """I6: no job is started more than three times, beside the attempts that were given back."""
    finding = Finding("I6")
    for job_id, moves in run.moves.items():
        starts, most = 0, 0
        for move in moves:
            if move.became == JobStatus.RUNNING:
                starts, most = starts + 1, max(most, move.attempt)
            if move.was in TERMINAL and move.became == JobStatus.QUEUED:
                starts, most = 0, 0
        job = run.after.jobs.get(job_id)
        given_back = sum(outcome in _GIVEN_BACK for outcome in job.outcomes) if job is not None else 0
        is_bounded = most <= MAX_ATTEMPTS and starts - given_back <= MAX_ATTEMPTS
        finding.expect(is_bounded, f"{job_id}: {starts} starts, {given_back} given back, attempt {most}")
    return finding


def requests_make_one_job(run: Run) -> Finding:
    """I7: one job per Idempotency-Key and body; another body under it is refused; no request makes two jobs."""
    finding = Finding("I7")
    first: dict[tuple[str, str], Record] = {}
    originals: dict[tuple[str, str], int] = defaultdict(int)
    for record in run.answers:
        if record.key is None or record.status is None:
            continue
        known = first.get((record.tenant, record.key))
        originals[record.tenant, record.key] += record.type == "ok" and not record.is_replayed
        if known is None:
            if record.job_id is not None and record.type == "ok":
                first[record.tenant, record.key] = record
        elif record.request_sha256 == known.request_sha256:
            # Of a race, the answer that made the job need not be the first to arrive.
            is_same = record.job_id == known.job_id and originals[record.tenant, record.key] <= 1
            finding.expect(
                is_same or record.status in (409, 429, 503), f"key {record.key}: {known.job_id}, then {record.job_id}"
            )
        else:
            is_refused = record.status == 422 and record.code == "idempotency_key_reuse"
            finding.expect(is_refused or record.status in (429, 503), f"key {record.key}: reused, {record.status}")
    asked: dict[str, int] = defaultdict(int)
    for record in run.history:
        if record.type == "invoke" and record.kind in ("submit", "ask", "stream") and not record.after:
            text = prompt_of(record.nonce)
            asked[text] = 1 if record.key is not None else asked[text] + 1
    made: dict[str, int] = defaultdict(int)
    for job in run.after.jobs.values():
        if job.text in asked:
            made[job.text] += 1
    for text, count in made.items():
        finding.expect(count <= asked[text], f"{text!r}: {count} jobs of {asked[text]} requests")
    return finding


def answers_come_in_time(run: Run) -> Finding:
    """I9: every exchange ends inside its bound, except with a gateway that the harness itself froze."""
    finding = Finding("I9")
    frozen, starved = _spans(run.history, "frozen", "thawed"), _spans(run.history, "starved", "fed")
    severed = _spans(run.history, "severed", "joined")
    slowest: dict[str, float] = defaultdict(float)
    num_starved = num_behind = 0
    for record in run.answers:
        began = record.at - record.seconds
        if record.bound_s is None or any(
            url == record.url and start < record.at and began < end for url, start, end in frozen
        ):
            continue
        is_severed = any(start < record.at and began < end for _, start, end in severed)
        is_unavailable = record.status == 503 or is_severed
        bound_s = max(record.bound_s, UNAVAILABLE_S) if is_unavailable else record.bound_s
        slack_s = SLACK_S
        if record.seconds > bound_s + slack_s and any(start < record.at and began < end for _, start, end in starved):
            slack_s += STARVED_SLACK_S
            num_starved += 1
        if record.seconds > bound_s + slack_s >= record.seconds - record.behind_s:
            num_behind += 1
        slack_s += record.behind_s
        slowest[record.kind] = max(slowest[record.kind], record.seconds)
        what = f"{record.kind} took {record.seconds:.1f} s of {bound_s:.1f} in {record.row}"
        finding.expect(record.seconds <= bound_s + slack_s, f"{what} ({record.status or record.error})")
    longest = ", ".join(f"{kind} {seconds:.1f}" for kind, seconds in sorted(slowest.items()))
    finding.note = (
        f"slowest (s): {longest}; {num_starved:,} late ones while the machine had no CPU left, "
        f"{num_behind:,} that the harness was too busy to read in time"
    )
    return finding


def _spans(history: Iterable[Record], first: str, last: str) -> list[tuple[str, float, float]]:
    """(gateway, from, to) between two kinds of records."""
    spans, since = [], dict[str, float]()
    for record in history:
        if record.kind == first:
            since[record.url] = record.at
        elif record.kind == last:
            # What was caught in it may need a moment more.
            spans.append((record.url, since.pop(record.url), record.at + 1.0))
    return [*spans, *((url, start, float("inf")) for url, start in since.items())]


def errors_are_honest(run: Run) -> Finding:
    """I10: nobody is blamed for a fault of ours: 503 with Retry-After, and never a 500."""
    finding = Finding("I10")
    for record in run.answers:
        if record.status is None or (record.kind == "stream" and record.status == 200):
            continue
        what = f"{record.kind} in {record.row}: {record.status} {record.code}"
        if record.status == 503:
            finding.expect(record.code in _UNAVAILABLE and record.retry_after is not None, what)
        elif record.status == 429:
            finding.expect(record.code in _BUSY and record.retry_after is not None, what)
        else:
            finding.expect(record.status < 300 or record.status in record.allowed, what)
    return finding


def capacity_returns(run: Run) -> Finding:
    """I11: after every fault a burst of probes is answered in time."""
    finding = Finding("I11")
    for record in run.answers:
        if record.kind == "probe":
            finding.expect(record.type == "ok", f"after {record.row}: {record.error}")
    return finding


def streams_are_whole(run: Run) -> Finding:
    """I14: over all its connections a stream's ids count up by one, its text is the answer, and it ends once."""
    finding = Finding("I14")
    segments: dict[int, list[Record]] = defaultdict(list)
    for record in run.answers:
        if record.kind == "stream" and record.status == 200:
            segments[record.op].append(record)
    num_resumed = num_interrupted = 0
    for op, parts in segments.items():
        ids = [number for part in parts for number in part.ids]
        text = "".join(part.text or "" for part in parts)
        right = prompt_of(parts[0].nonce)
        where = f"stream {op} in {parts[0].row} ({len(parts)} connections)"
        num_resumed += len(parts) > 1
        # A run that starts anew where nobody has seen any of it yet counts from a step of its own.
        first = ids[0] if ids and ids[0] % RUN_STEP == 1 else 1
        finding.expect(ids == list(range(first, first + len(ids))), f"{where}: ids {_around_gap(ids)}")
        end = parts[-1].end
        if end == "done":
            finding.expect(text == right, f"{where}: {text!r}")
            job = run.after.jobs.get(parts[0].job_id or "")
            if job is not None and job.text is not None:
                finding.expect(job.text == text, f"{where}: the stored answer is another")
        else:
            num_interrupted += 1
            finding.expect(end in _INTERRUPTED and right.startswith(text), f"{where}: ended as {end} with {text!r}")
    finding.note = f"{len(segments)} streams, {num_resumed} resumed by their clients, {num_interrupted} interrupted"
    return finding


def _around_gap(ids: Sequence[int]) -> str:
    for position, number in enumerate(ids):
        if number != ids[0] + position:
            return f"... {', '.join(map(str, ids[max(0, position - 2) : position + 3]))} ..."
    return "none"


def cancel_is_final(run: Run) -> Finding:
    """I17: who was told that a job is cancelled never sees it succeed."""
    finding, all_moves = Finding("I17"), run.moves
    for record in run.answers:
        if record.kind == "cancel" and record.status == 200 and record.job_id is not None:
            job = run.after.jobs.get(record.job_id)
            finding.expect(job is not None and job.status == "cancelled", f"{record.job_id}: {job and job.status}")
            moves = [move for move in all_moves.get(record.job_id, ()) if move.became == JobStatus.SUCCEEDED]
            finding.expect(not moves, f"{record.job_id}: succeeded on its way")
    return finding


def clocks_do_not_matter(run: Run) -> Finding:
    """I18: with processes' clocks an hour apart every job is run once, and succeeds."""
    finding, moves = Finding("I18"), run.moves
    for job_id, record in run.accepted.items():
        if record.row in _CLOCK_ROWS and (job := run.after.jobs.get(job_id)) is not None:
            starts = sum(move.became == JobStatus.RUNNING for move in moves[job_id])
            is_plain = job.status == "succeeded" and starts <= 1
            finding.expect(is_plain or job.status == "cancelled", f"{job_id}: {job.status} after {starts} starts")
    return finding


def books_balance(run: Run) -> Finding:
    """I19: what was recorded is what there is, and none of it is still on its way."""
    finding, moves = Finding("I19"), run.moves
    recorded = {move.job_id for move in run.after.transitions if move.was is None}
    for job_id in recorded | run.after.jobs.keys():
        job = run.after.jobs.get(job_id)
        finding.expect(
            job is not None and job_id in recorded, f"{job_id}: {'vanished' if job is None else 'from nowhere'}"
        )
        if job is not None:
            last = moves[job_id][-1].became if job_id in moves else None
            finding.expect(
                job.status in TERMINAL and job.status == last, f"{job_id}: {job.status}, last moved to {last}"
            )
    return finding


def reruns_give_the_same(run: Run) -> Finding:
    """I21: the answer of a job that was started more than once is the right one."""
    finding = Finding("I21")
    asked = {job_id: prompt_of(record.nonce) for job_id, record in run.accepted.items()}
    for job_id, moves in run.moves.items():
        starts = sum(move.became == JobStatus.RUNNING for move in moves)
        job = run.after.jobs.get(job_id)
        if starts > 1 and job is not None and job.status == "succeeded" and job_id in asked:
            finding.expect(job.text == asked[job_id], f"{job_id}: {job.text!r}")
    return finding


def messages_follow_rows(run: Run) -> Finding:
    """M1: no message is sent for a job whose row is not committed."""
    finding = Finding("M1")
    for record in run.answers:
        if record.kind == "peek":
            finding.expect(record.num_messages == 0, f"{record.num_messages} messages of a row that was not committed")
    return finding


CHECKS: dict[str, Callable[[Run], Finding]] = {
    "I1": accepted_is_durable,
    "I2": terminal_is_final,
    "I3": bytes_are_faithful,
    "I4": tenants_are_apart,
    "I5": one_completion,
    "I6": attempts_are_bounded,
    "I7": requests_make_one_job,
    "I9": answers_come_in_time,
    "I10": errors_are_honest,
    "I11": capacity_returns,
    "I14": streams_are_whole,
    "I17": cancel_is_final,
    "I18": clocks_do_not_matter,
    "I19": books_balance,
    "I21": reruns_give_the_same,
    "M1": messages_follow_rows,
}


def check(run: Run) -> list[Finding]:
    """Every invariant's finding. `Run.moves` and the like are worked out once per check: runs are small."""
    return [look(run) for look in CHECKS.values()]


def failed(findings: Iterable[Finding], demanded: Iterable[str]) -> list[str]:
    """The invariants that were violated, or demanded and checked nowhere."""
    wanted = set(demanded)
    return [f.invariant for f in findings if f.violations or (f.invariant in wanted and not f.checked)]
