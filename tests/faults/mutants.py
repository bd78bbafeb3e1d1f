"""Twelve ways to be wrong, and the invariant that must notice each: the checker's own test.

A mutant of the data tampers with what a real run left behind. A mutant of the code runs one process of a lab with a
patch in front of its program, and does just enough for the mistake to show.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from tests.faults.audit import Ledger
from tests.faults.check import Run
from tests.faults.lab import Lab
from tests.faults.proxy import Mode


@dataclass(frozen=True, slots=True)
class DataMutant:
    """A wrong history or a wrong ledger."""

    name: str
    caught_by: str
    tamper: Callable[[Run], Run]


@dataclass(frozen=True, slots=True)
class CodeMutant:
    """A wrong program."""

    name: str
    caught_by: str
    process: str
    patch: str
    expose: Callable[[Lab], None]
    row: str = ""
    """What the history calls it; the checker has rules for clock rows."""


def _lost_row(run: Run) -> Run:
    victim = next(job_id for job_id in run.accepted if run.after.jobs[job_id].status == "succeeded")
    return Run(run.history, _without(run.before, victim), _without(run.after, victim))


def _without(ledger: Ledger, job_id: str) -> Ledger:
    return replace(ledger, jobs={known: job for known, job in ledger.jobs.items() if known != job_id})


def _flipped_byte(run: Run) -> Run:
    victim = next(job for job in run.after.jobs.values() if job.sha256 is not None)
    assert victim.sha256 is not None
    flipped = replace(victim, sha256=f"{int(victim.sha256[0], 16) ^ 1:x}{victim.sha256[1:]}")
    return Run(run.history, run.before, replace(run.after, jobs=run.after.jobs | {victim.id: flipped}))


def _crossed_tenants(run: Run) -> Run:
    results = {record.tenant: record for record in run.history if record.kind == "result" and record.status == 200}
    mine, yours = results["default"], results["other"]
    crossed = {
        id(mine): replace(mine, text=yours.text, sha256=yours.sha256, job_id=yours.job_id),
        id(yours): replace(yours, text=mine.text, sha256=mine.sha256, job_id=mine.job_id),
    }
    return Run([crossed.get(id(record), record) for record in run.history], run.before, run.after)


def _reused_event_id(run: Run) -> Run:
    victim = next(record for record in run.history if record.kind == "stream" and len(record.ids) > 3)
    tampered = replace(victim, ids=[*victim.ids[:2], victim.ids[1], *victim.ids[3:]])
    return Run([tampered if record is victim else record for record in run.history], run.before, run.after)


def _uncompared_key(run: Run) -> Run:
    first = next(record for record in run.history if record.kind == "submit" and record.status == 202)
    again = replace(first, op=first.op + 10**6, request_sha256="another body", is_replayed=True)
    keyed = [replace(first, key="k"), replace(again, key="k")]
    return Run([*[record for record in run.history if record is not first], *keyed], run.before, run.after)


DATA = (
    DataMutant("drop one row", "I1", _lost_row),
    DataMutant("flip one byte of a result", "I3", _flipped_byte),
    DataMutant("cross two tenants", "I4", _crossed_tenants),
    DataMutant("reuse an SSE id", "I14", _reused_event_id),
    DataMutant("skip the idempotency compare", "I7", _uncompared_key),
)

_REWRITE = """
import inspect
def rewrite(module, name, *changes):
    source = inspect.getsource(getattr(module, name))
    for old, new in changes:
        assert old in source, f"{name} no longer has {old!r}: this mutant is not one any more"
        source = source.replace(old, new)
    exec(compile(source, module.__file__, "exec"), module.__dict__)
def late(function, status):
    # Not before another worker has brought one of the jobs to that status.
    sql = "SELECT 1 FROM jobs WHERE id = ANY(%s) AND status = %s AND worker_id <> %s"
    def wait_first(cursor, items):
        print("storing late", flush=True)
        for _ in range(200):
            cursor.execute(sql, ([item.id for item in items], status, items[0].worker_id))
            if cursor.fetchone():
                break
            time.sleep(0.05)
        return function(cursor, items)
    wait_first.__name__ = function.__name__
    return wait_first
import time, db.jobs
"""
_FENCE = "{_OWNS}\n            ORDER"

_UNFENCED = f"""{_REWRITE}
rewrite(db.jobs, "finish", ({_FENCE!r}, "j.status = 'running'\\n            ORDER"))
db.jobs.finish = late(db.jobs.finish, "running")
"""

_COMPLETED_AGAIN = f"""{_REWRITE}
rewrite(db.jobs, "finish", ({_FENCE!r}, "j.status IN ('running', 'succeeded')\\n            ORDER"),
        ("sha256, events FROM done)", "sha256, events FROM done ON CONFLICT (job_id) DO UPDATE SET body = excluded.body)"))
db.jobs.finish = late(db.jobs.finish, "succeeded")
"""

_UNCAPPED = """
import db.recovery
rescue = db.recovery.rescue
db.recovery.rescue = lambda cursor, workers, most: rescue(cursor, workers, 99)
"""

_BLAMED = """
import api.auth
verify = api.auth.Keys.verify
async def blame(self, authorization):
    try:
        return await verify(self, authorization)
    except api.auth.LaneDown:
        return None
api.auth.Keys.verify = blame
"""

_EARLY_MESSAGE = """
import api.gateway
accept = api.gateway.Gateway._accept
async def send_first(self, job, *rest):
    api.gateway.inference.enqueue(self._outbox, [(job.id, job.backend, job.task)])
    return await accept(self, job, *rest)
api.gateway.Gateway._accept = send_first
"""

_EARLY_ANSWER = """
import asyncio, datetime, api.gateway
from db.accept import Inserted
init = api.gateway.Gateway.__init__
class Hasty:
    def __init__(self, lane):
        self.lane = lane
    def submit(self, job):
        self.lane.submit(job).add_done_callback(lambda future: future.exception())
        done = asyncio.get_running_loop().create_future()
        now = datetime.datetime.now(datetime.UTC)
        done.set_result(Inserted(job.id, now, job.backend, job.cache_verdict, None, job.id))
        return done
def hurry(self, config):
    init(self, config)
    self.ledger._durable_inserts = Hasty(self.ledger._durable_inserts)
api.gateway.Gateway.__init__ = hurry
"""

_OWN_CLOCK = """
import time, db.workers
bury = db.workers.bury
began = time.monotonic()
def bury_by_own_clock(cursor, heartbeat_s):
    # Not before there is something to run: workers that are dead as they start run nothing twice.
    now = time.time() + (3600 if 5 < time.monotonic() - began < 8 else 0)
    cursor.execute("UPDATE workers SET state = 'dead' WHERE state <> 'dead' AND extract(epoch FROM lease_until) < %s", (now,))
    return bury(cursor, heartbeat_s)
db.workers.bury = bury_by_own_clock
"""


def _declare_dead(lab: Lab, token_ms: float) -> None:
    """Jobs on both workers; one is declared dead while it stores its first results, very slowly."""
    log = lab.stack.logs / "worker-a.log"
    before = log.read_text(errors="replace").count("storing late")
    with lab.supervised():
        started = [lab.clients.begin(lab.clients.job(token_ms=token_ms)) for _ in range(20)]
        lab.until(lambda: log.read_text(errors="replace").count("storing late") > before, "a late result", 30)
        lab.query("UPDATE workers SET state = 'dead' WHERE name = 'worker-a' AND state <> 'dead'")
        for future in started:
            future.result(90)
        time.sleep(5)


def _unfence(lab: Lab) -> None:
    _declare_dead(lab, 80)


def _complete_again(lab: Lab) -> None:
    _declare_dead(lab, 30)


def _poison(lab: Lab) -> None:
    with lab.supervised():
        nonce = lab.clients.nonce()
        made = lab.clients.run(lab.clients.submit(nonce, "default", {"fail": "exit"}))
        sql = "SELECT status IN ('failed', 'succeeded') OR attempt > 4 FROM jobs WHERE id = %s::uuid"
        lab.until(lambda: bool(lab.query(sql, made.job_id)[0][0]), "an end of the poison", 90)
        with lab.stack.client() as client:
            client.post(f"/v1/jobs/{made.job_id}/cancel")


def _lose_postgres(lab: Lab) -> None:
    with lab.traffic(mix={"job": 1}):
        lab.proxies["gateway-postgres"].set(Mode.REFUSE)
        time.sleep(5)
        lab.proxies["gateway-postgres"].set(Mode.PASS)


def _look_for_early_messages(lab: Lab) -> None:
    lab.peek("gateway-a")


def _crash_before_storing(lab: Lab) -> None:
    url = f"http://127.0.0.1:{lab.ports['gateway-a']}"
    with lab.locked("jobs", "SHARE MODE"):
        for _ in range(5):
            lab.clients.begin(lab.clients.submit(lab.clients.nonce(), "default", {}, url=url))
        time.sleep(1)
        lab.kill("gateway-a")
        # Longer than a statement waits for a lock: what was in flight is lost with its gateway.
        time.sleep(3)


_LEADS = "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND granted AND objsubid = 1"
"""Locks of one number are leaders', those of two are workers'."""


def _let_it_judge(lab: Lab) -> None:
    with lab.supervised(), lab.traffic(mix={"long": 1}):
        time.sleep(8)
        lab.stack.patches.clear()
        # Who supervises starts one in its place that is right, and the jobs end.
        lab.kill("reconciler-a")


CODE = (
    CodeMutant("un-fence", "I5", "worker-a", _UNFENCED, _unfence),
    CodeMutant("allow a second completion", "I5", "worker-a", _COMPLETED_AGAIN, _complete_again),
    CodeMutant("remove the attempts cap", "I6", "reconciler-a", _UNCAPPED, _poison),
    CodeMutant("401 on a pool timeout", "I10", "gateway-a", _BLAMED, _lose_postgres),
    CodeMutant("enqueue before commit", "M1", "gateway-a", _EARLY_MESSAGE, _look_for_early_messages),
    CodeMutant("ack before store", "I1", "gateway-a", _EARLY_ANSWER, _crash_before_storing),
    CodeMutant("use the process clock", "I18", "reconciler-a", _OWN_CLOCK, _let_it_judge, row="F70"),
)


def run_mutant(lab: Lab, mutant: CodeMutant) -> Run:
    """Put the mistake in, expose it, take it out; what that left behind, and nothing of before."""
    lab.history.row = mutant.row or mutant.name
    since, num_records = time.time(), len(lab.history.records)
    if mutant.process == "reconciler-a":
        # The leader must be the one that is wrong.
        lab.stack.stop("reconciler-b")
    lab.stack.patches[mutant.process] = mutant.patch
    lab.restart(mutant.process)
    try:
        if mutant.process == "reconciler-a":
            # The other, which is right, comes back with the supervisor and must not be quicker.
            lab.until(lambda: bool(lab.query(_LEADS)), "a leader")
        mutant.expose(lab)
    finally:
        lab.stack.patches.clear()
        lab.clients.stop()
        if mutant.process in lab.stack.processes:
            lab.kill(mutant.process)
        lab.heal()
    return of_it_alone(lab, since, num_records)


def of_it_alone(lab: Lab, since: float, num_records: int) -> Run:
    """What was told and done from then on, and nothing of before."""
    before, after = lab.close_books()
    return Run(lab.history.records[num_records:], _since(before, since), _since(after, since))


def _since(ledger: Ledger, since: float) -> Ledger:
    ids = {move.job_id for move in ledger.transitions if move.was is None and move.at >= since}
    return Ledger(
        jobs={job_id: job for job_id, job in ledger.jobs.items() if job_id in ids},
        transitions=[move for move in ledger.transitions if move.job_id in ids],
        writes=[(job_id, sha256) for job_id, sha256 in ledger.writes if job_id in ids],
    )
