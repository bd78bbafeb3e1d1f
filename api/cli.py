"""`switchyard`: the operator's commands, in the words of the API.

Where SWITCHYARD_DATABASE_URL is empty the embedded Postgres under SWITCHYARD_HOME is asked, so the
commands work in a plain shell beside a running stack.
"""

import json
import subprocess
import sys
import uuid
from datetime import UTC, datetime
from typing import Annotated

import typer

import catalog
import settings
from api import key_commands, tenant_commands, usage_command, views, webhook_commands
from api.terminal import Json, console, fail, ledger, show
from catalog import Catalog, CatalogError
from db import budgets, cache, job_views, jobs, removal, session, workers
from db.cache import Purge
from db.job_views import DeadLetters, Filter
from db.removal import Deletion
from db.states import TERMINAL, JobStatus
from local import stack
from local.models import ModelError
from local.servers import ServersError
from local.stack import StackError

app = typer.Typer(help="Switchyard: one door for every model you run.", no_args_is_help=True, add_completion=False)
jobs_app = typer.Typer(help="Jobs of every tenant.", no_args_is_help=True)
cache_app = typer.Typer(help="The response cache.", no_args_is_help=True)
app.add_typer(key_commands.app, name="keys")
app.add_typer(tenant_commands.app, name="tenants")
app.add_typer(jobs_app, name="jobs")
app.add_typer(cache_app, name="cache")
app.add_typer(webhook_commands.app, name="webhooks")
app.command("usage")(usage_command.show_usage)


def main() -> None:
    """Run a command; what an operator can mend is one line, not a traceback."""
    try:
        app()
    except (StackError, ServersError, ModelError, CatalogError) as error:
        fail(str(error))
    except session.DependencyDown as error:
        fail(f"Postgres does not answer ({str(error).strip().splitlines()[0]}); is the stack up? `make up`")


@app.command()
def up(
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Show the logs; stop everything at the end.")
    ] = False,
) -> None:
    """Start everything on this machine and wait until every model answers."""
    stack.up(detach=not foreground)


@app.command()
def down() -> None:
    """Stop everything; data and keys are kept."""
    stack.down()


@app.command()
def status() -> None:
    """Show processes, models and queues."""
    stack.status()


@app.command()
def logs(
    name: Annotated[str | None, typer.Argument(help="A process, or the start of its name.")] = None,
    follow: Annotated[bool, typer.Option(help="Go on as lines are written.")] = True,
) -> None:
    """Show the processes' logs."""
    stack.logs(name, follow)


@app.command()
def models(as_json: Json = False) -> None:
    """List the models, where they are served, and their state."""
    served = _catalog()
    with ledger() as cursor:
        lives = workers.alive(cursor)
    rows = []
    for model in served.models.values():
        states = {life.state for life in lives if life.backend in model.entry.backends}
        state = next((one for one in ("ready", "loading", "draining") if one in states), "down")
        rows.append(
            {
                "model": model.name,
                "state": state,
                "tasks": list(model.tasks),
                "backends": model.entry.backends,
                "context": model.context_length,
                "revision": model.revision,
            }
        )
    show(rows, as_json)


@app.command()
def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Of echo, cache, fairness, limits, eta, batch, vllm, gpt, bert, startup; all without one."),
    ] = None,
) -> None:
    """Run the benchmarks, each beside its peer."""
    raise SystemExit(subprocess.run([sys.executable, "-m", "benchmarks", *(names or [])], check=False).returncode)


@jobs_app.command("list")
def list_jobs(
    status: Annotated[JobStatus | None, typer.Option()] = None,
    model: Annotated[str | None, typer.Option()] = None,
    tenant: Annotated[str | None, typer.Option()] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 20,
    as_json: Json = False,
) -> None:
    """List jobs, newest first."""
    with ledger() as cursor:
        found = job_views.find(cursor, [Filter(tenant=tenant, status=status, model=model, limit=limit)])[0][:limit]
    rows = [views.job(view) for view in found]
    if not as_json:
        shown = ("id", "status", "endpoint", "model", "backend", "attempt")
        rows = [
            {
                **{name: row[name] for name in shown},
                "run_ms": row["metrics"]["run_ms"],
                "error": (row["error"] or {}).get("code"),
            }
            for row in rows
        ]
    show(rows, as_json)


@jobs_app.command("show")
def show_job(job_id: uuid.UUID) -> None:
    """The job object."""
    print(json.dumps(views.job(_job(job_id)), indent=2))


@jobs_app.command("explain")
def explain_job(job_id: uuid.UUID, as_json: Json = False) -> None:
    """Why the job went where it went, and how long each step took."""
    explained = views.explanation(_job(job_id))
    if as_json:
        print(json.dumps(explained, indent=2))
        return
    decision = explained["decision"]
    console.print(f"{explained['id']}  {explained['status']}")
    console.print(f"asked for {explained['requested_model']}, ran {explained['model']} on {explained['backend']}"
                  f" ({explained['worker']}): {decision['reason']}")  # fmt: skip
    console.print(f"cache: {explained['cache']['verdict']}\n")
    show([{key: one[key] for key in ("model", "backend", "score_ms", "dropped")} for one in decision["candidates"]])
    show(explained["steps"])
    if explained["attempts"]:
        show(explained["attempts"])


@jobs_app.command("cancel")
def cancel_job(job_id: uuid.UUID) -> None:
    """Cancel a job. Its worker stops within a heartbeat."""
    tenant = _job(job_id).tenant
    with ledger() as cursor:
        state = jobs.cancel(cursor, [(job_id, tenant)])[0]
    if state is not JobStatus.CANCELLED:
        fail(f"the job has already {state}")
    console.print("cancelled")


@jobs_app.command("retry")
def retry_jobs(
    job_ids: Annotated[list[uuid.UUID] | None, typer.Argument(help="Failed or expired jobs.")] = None,
    failed: Annotated[bool, typer.Option("--failed", help="Every failed job that the options below match.")] = False,
    model: Annotated[str | None, typer.Option()] = None,
    code: Annotated[str | None, typer.Option(help="The error code they failed with.")] = None,
    tenant: Annotated[str | None, typer.Option()] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000)] = 1000,
) -> None:
    """Queue failed or expired jobs again, under their own ids. The reconciler sends them within seconds."""
    if bool(job_ids) == failed:
        fail("name the jobs, or say --failed")
    with ledger() as cursor:
        wanted = DeadLetters(tenant=tenant, model=model, code=code, limit=limit)
        ids = job_ids or job_views.dead_letters(cursor, [wanted])[0]
        retried = [
            found for found in budgets.retry(cursor, [(job_id, None) for job_id in ids]) if isinstance(found, tuple)
        ]
    console.print(f"queued {len(retried)} of {len(ids)} again")


@jobs_app.command("delete")
def delete_jobs(
    job_ids: Annotated[list[uuid.UUID] | None, typer.Argument(help="Jobs that have ended.")] = None,
    ended: Annotated[bool, typer.Option("--ended", help="Every ended job that the options below match.")] = False,
    status: Annotated[JobStatus | None, typer.Option()] = None,
    model: Annotated[str | None, typer.Option()] = None,
    tenant: Annotated[str | None, typer.Option()] = None,
    before: Annotated[datetime | None, typer.Option(help="Ended before then, in UTC.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000)] = 1000,
) -> None:
    """Remove ended jobs, their answers and the cache entries made of them. The oldest first."""
    if bool(job_ids) == ended:
        fail("name the jobs, or say --ended")
    seconds = None if before is None else int(before.replace(tzinfo=UTC).timestamp())
    wanted = Deletion(tenant=tenant, status=status, model=model, before=seconds, limit=limit)
    named = [(job_id, _job(job_id).tenant) for job_id in job_ids or ()]
    with ledger() as cursor:
        found = named or removal.find(cursor, [wanted])[0]
        states = removal.delete(cursor, found)
    console.print(f"deleted {sum(state in TERMINAL for state in states)} of {len(found)}")


@cache_app.command("stats")
def cache_stats(as_json: Json = False) -> None:
    """Entries, bytes and hits by model."""
    with ledger() as cursor:
        show(cache.stats(cursor, [None])[0], as_json)


@cache_app.command("purge")
def purge_cache(
    key: Annotated[str | None, typer.Option(help="One entry, by its hexadecimal key.")] = None,
    model: Annotated[str | None, typer.Option(help="A model's entries.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every entry of every tenant.")] = False,
) -> None:
    """Remove entries: one key, a model's, or all."""
    if not (key or model or everything):
        fail("say what to purge: --key, --model or --all")
    try:
        raw = bytes.fromhex(key) if key else None
    except ValueError:
        fail("--key must be hexadecimal")
    with ledger() as cursor:
        removed = cache.purge(cursor, [Purge(tenant=None, key=raw, model=model)])[0]
    console.print(f"removed {removed} entries")


def _catalog() -> Catalog:
    config = settings.load()
    return catalog.load(config.config, config.models_dir)


def _job(job_id: uuid.UUID) -> job_views.View:
    with ledger() as cursor:
        found = job_views.view(cursor, [(job_id, None)])[0]
    return found if found is not None else fail(f"no job {job_id}")


if __name__ == "__main__":
    main()
