"""The history checker passes what is right and catches each of twelve mistakes."""

import dataclasses
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import check, history
from tests.faults.audit import Job, Ledger, Transition
from tests.faults.check import Run
from tests.faults.history import Clients, History, Record, prompt_of
from tests.faults.lab import Lab
from tests.faults.mutants import CODE, DATA, CodeMutant, DataMutant, of_it_alone, run_mutant


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def move(job_id: str, was: str | None, became: str, **changes: object) -> Transition:
    made = Transition(
        job_id=job_id, was=was, became=became, attempt=int(was is not None), worker_id=1, role="w", at=0.0
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def honest_run() -> Run:
    """Two tenants' jobs, a stream that was resumed once, and a cancelled job: all as it should be."""
    records: list[Record] = []
    jobs: dict[str, Job] = {}
    moves: list[Transition] = []

    def answered(kind: str, job_id: str, nonce: str, tenant: str, **answer: object) -> None:
        op = len(records) + 1
        asked = Record(op=op, type="invoke", kind=kind, at=float(op), tenant=tenant, nonce=nonce, request_sha256=nonce)
        records.append(asked)
        told = {"type": "ok", "job_id": job_id, "seconds": 0.01, "bound_s": 1.0, **answer}
        records.append(dataclasses.replace(asked, **told))  # type: ignore[arg-type]

    def recorded(job_id: str, tenant: str, nonce: str, status: str) -> None:
        text = prompt_of(nonce) if status == "succeeded" else None
        sha256 = None if text is None else digest(text)
        jobs[job_id] = Job(
            id=job_id, tenant=tenant, status=status, attempt=1, sha256=sha256, stored_sha256=sha256, text=text
        )
        moves.extend([move(job_id, None, "queued"), move(job_id, "queued", "running"), move(job_id, "running", status)])

    for number, tenant in enumerate(("default", "other", "default")):
        job_id, nonce = f"job-{number}", f"nonce-{number}"
        answered("submit", job_id, nonce, tenant, status=202)
        answered("wait", job_id, nonce, tenant, status=200, state="succeeded")
        answered("result", job_id, nonce, tenant, status=200, text=prompt_of(nonce), sha256=digest(prompt_of(nonce)))
        recorded(job_id, tenant, nonce, "succeeded")
    answered("cancel", "job-c", "nonce-c", "default", status=200, state="cancelled")
    recorded("job-c", "default", "nonce-c", "cancelled")
    text = prompt_of("nonce-s")
    answered("stream", "job-s", "nonce-s", "default", status=200, ids=[1, 2, 3, 4], text=text[:4], bound_s=None)
    cut = records[-1]
    records.append(dataclasses.replace(cut, type="info", at=cut.at + 1, after=4, ids=[5, 6], text=text[4:], end="done"))
    recorded("job-s", "default", "nonce-s", "succeeded")
    answered("probe", "", "", "")
    ledger = Ledger(jobs=jobs, transitions=moves, writes=[(job.id, job.sha256) for job in jobs.values() if job.sha256])
    return Run(records, ledger, ledger)


def caught(run: Run) -> set[str]:
    return {finding.invariant for finding in check.check(run) if finding.violations}


def changed(run: Run, job_id: str, **changes: object) -> Run:
    job = dataclasses.replace(run.after.jobs[job_id], **changes)  # type: ignore[arg-type]
    return Run(run.history, run.before, dataclasses.replace(run.after, jobs=run.after.jobs | {job_id: job}))


def moved(run: Run, *more: Transition) -> Run:
    after = dataclasses.replace(run.after, transitions=[*run.after.transitions, *more])
    return Run(run.history, run.before, after)


def told(run: Run, kind: str, **changes: object) -> Run:
    victim = next(record for record in run.history if record.kind == kind and record.type == "ok")
    lie = dataclasses.replace(victim, **changes)  # type: ignore[arg-type]
    return Run([lie if record is victim else record for record in run.history], run.before, run.after)


def test_an_honest_run_passes_and_is_looked_at() -> None:
    findings = {finding.invariant: finding for finding in check.check(honest_run())}
    assert {name for name, finding in findings.items() if finding.violations} == set()
    demanded = {"I1", "I2", "I3", "I4", "I5", "I6", "I7", "I9", "I10", "I11", "I14", "I17", "I19"}
    assert check.failed(findings.values(), demanded) == []
    assert str(findings["I1"]) == "I1   checked=4 violations=0"


def test_what_was_checked_nowhere_has_failed() -> None:
    nothing = Run([], Ledger(jobs={}), Ledger(jobs={}))
    assert check.failed(check.check(nothing), ["I1", "I14"]) == ["I1", "I14"]


@pytest.mark.parametrize("mutant", DATA, ids=lambda mutant: mutant.name)
def test_tampering_is_caught(mutant: DataMutant) -> None:
    assert mutant.caught_by in caught(mutant.tamper(honest_run()))


@pytest.mark.parametrize(
    ("invariant", "run"),
    [
        ("I1", changed(honest_run(), "job-0", status="running")),
        ("I1", moved(honest_run(), move("job-0", "succeeded", "failed"))),
        ("I2", changed(honest_run(), "job-0", code="changed")),
        ("I2", moved(honest_run(), move("job-0", "succeeded", "queued"))),
        ("I2", moved(honest_run(), move("job-0", "succeeded", "succeeded"))),
        ("I2", told(honest_run(), "wait", state="failed")),
        ("I3", told(honest_run(), "result", sha256=digest("other bytes"))),
        ("I4", changed(honest_run(), "job-0", tenant="other")),
        ("I4", told(honest_run(), "result", text=prompt_of("nonce-1"))),
        (
            "I5",
            moved(
                honest_run(), move("job-9", "queued", "running"), move("job-9", "running", "succeeded", role="zombie")
            ),
        ),
        ("I6", moved(honest_run(), *[move("job-9", "queued", "running")] * 4)),
        ("I6", moved(honest_run(), move("job-9", "queued", "running", attempt=4))),
        ("I7", changed(honest_run(), "job-0", text=prompt_of("nonce-2"))),
        ("I9", told(honest_run(), "submit", seconds=2.0)),
        ("I10", told(honest_run(), "wait", type="fail", status=401, code="invalid_api_key")),
        ("I10", told(honest_run(), "wait", type="fail", status=500, code="internal_error")),
        ("I10", told(honest_run(), "wait", type="fail", status=503, code="dependency_unavailable")),
        ("I11", told(honest_run(), "probe", type="info", error="no work")),
        ("I14", told(honest_run(), "stream", ids=[1, 2, 4, 5])),
        ("I14", told(honest_run(), "stream", text="job")),
        ("I17", changed(honest_run(), "job-c", status="succeeded")),
        ("I19", changed(honest_run(), "job-0", status="queued")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_invariant_can_be_violated(invariant: str, run: Run) -> None:
    assert invariant in caught(run)


def test_a_frozen_gateway_is_not_blamed_for_being_late() -> None:
    run = told(honest_run(), "submit", seconds=5.0, url="here")
    late = next(record for record in run.history if record.seconds == 5.0)
    spell = [
        Record(op=0, type="info", kind=kind, at=late.at + at, url="here")
        for kind, at in (("frozen", -4), ("thawed", -1))
    ]
    assert "I9" in caught(run)
    assert "I9" not in caught(Run([*run.history, *spell], run.before, run.after))


def test_what_waited_for_postgres_may_take_as_long_as_a_503() -> None:
    for seconds, is_late in ((2.8, False), (3.2, True)):
        run = told(honest_run(), "submit", seconds=seconds)
        slow = next(record for record in run.history if record.seconds == seconds)
        spell = [
            Record(op=0, type="info", kind=kind, at=slow.at + at) for kind, at in (("severed", -9), ("joined", -0.2))
        ]
        assert "I9" in caught(run)
        assert ("I9" in caught(Run([*run.history, *spell], run.before, run.after))) == is_late


def test_a_harness_that_is_behind_blames_nobody_for_that_long() -> None:
    assert "I9" not in caught(told(honest_run(), "submit", seconds=2.0, behind_s=0.8))
    assert "I9" in caught(told(honest_run(), "submit", seconds=2.0, behind_s=0.3))


def test_a_history_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    book = History(tmp_path / "history.jsonl")
    book.row = "F00"
    made = book.add(Record(op=book.next_op(), type="ok", kind="stream", at=1.5, ids=[1, 2], text="a\nb", end="done"))
    book.nemesis("frozen", "http://here")
    book.close()
    assert history.read(book.path) == [made, book.records[1]]
    assert made.row == "F00"


def test_a_request_that_nobody_answers_is_neither_ok_nor_failed(tmp_path: Path) -> None:
    book = History(tmp_path / "history.jsonl")
    clients = Clients(book, ["http://127.0.0.1:9"], {"default": "secret"}, seed=1)
    made = clients.run(clients.submit("n", "default", {}))
    clients.close()
    book.close()
    assert (made.type, made.status, made.error) == ("info", None, "ConnectError")
    assert [record.type for record in book.records] == ["invoke", "info"]


# With real servers and processes: `make faults`.


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(tmp_path_factory.mktemp("lab"), seed=7) as made:
        yield made


@pytest.fixture(scope="module")
def real_run(lab: Lab) -> Run:
    """Some seconds of ordinary life, with a death in it, whatever the lab was used for before."""
    since, num_records = time.time(), len(lab.history.records)
    lab.history.row = "ordinary life"
    with lab.traffic(lead_s=3):
        for tenant in ("default", "other"):
            for life in (lab.clients.job, lab.clients.cancel, lab.clients.stream, lab.clients.foreign):
                lab.clients.begin(life(tenant))
        lab.kill("worker-a")
        lab.start("worker-a")
    lab.heal()
    return of_it_alone(lab, since, num_records)


@pytest.mark.faults
def test_a_real_run_passes(real_run: Run) -> None:
    findings = check.check(real_run)
    demanded = check.CHECKS.keys() - {"I18", "M1"}
    assert check.failed(findings, demanded) == [], "\n".join(map(str, findings))


@pytest.mark.faults
@pytest.mark.parametrize("mutant", DATA, ids=lambda mutant: mutant.name)
def test_tampering_with_a_real_run_is_caught(real_run: Run, mutant: DataMutant) -> None:
    assert mutant.caught_by in caught(mutant.tamper(real_run))


@pytest.mark.faults
@pytest.mark.timeout(180)
@pytest.mark.parametrize("mutant", CODE, ids=lambda mutant: mutant.name)
def test_wrong_code_is_caught(lab: Lab, mutant: CodeMutant) -> None:
    assert mutant.caught_by in caught(run_mutant(lab, mutant))
