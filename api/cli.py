"""`switchyard`: the operator's commands, in the words of the API.

Where SWITCHYARD_DATABASE_URL is empty the embedded Postgres under SWITCHYARD_HOME is asked, so the
commands work in a plain shell beside a running stack.
"""

import contextlib
import json
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

import catalog
import settings
from api import views, webhook_answers
from catalog import Catalog, CatalogError
from db import api_keys, cache, job_views, jobs, session, webhooks, workers
from db.cache import Purge
from db.job_views import DeadLetters, Filter
from db.models import JobStatus
from db.session import Cursor
from local import servers, stack
from local.models import ModelError
from local.servers import ServersError
from local.stack import StackError

app = typer.Typer(help="Switchyard: one door for every model you run.", no_args_is_help=True, add_completion=False)
keys_app = typer.Typer(help="API keys.", no_args_is_help=True)
jobs_app = typer.Typer(help="Jobs of every tenant.", no_args_is_help=True)
cache_app = typer.Typer(help="The response cache.", no_args_is_help=True)
webhooks_app = typer.Typer(help="Webhooks of every tenant.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")
app.add_typer(jobs_app, name="jobs")
app.add_typer(cache_app, name="cache")
app.add_typer(webhooks_app, name="webhooks")

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def main() -> None:
    """Run a command; what an operator can mend is one line, not a traceback."""
    try:
        app()
    except (StackError, ServersError, ModelError, CatalogError) as error:
        _fail(str(error))
    except session.DependencyDown as error:
        _fail(f"Postgres does not answer ({str(error).strip().splitlines()[0]}); is the stack up? `make up`")


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
    with _cursor() as cursor:
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
    _show(rows, as_json)


@app.command()
def bench(
    names: Annotated[list[str] | None, typer.Argument(help="echo, cache, vllm, gpt, bert, startup")] = None,
) -> None:
    """Run the benchmarks, each beside its peer."""
    raise SystemExit(subprocess.run([sys.executable, "-m", "benchmarks", *(names or [])], check=False).returncode)


@keys_app.command("create")
def create_key(
    name: Annotated[str, typer.Option(help="What the key is for.")],
    tenant: Annotated[str, typer.Option(help="Whose jobs and cache it reaches.")] = "default",
    admin: Annotated[bool, typer.Option("--admin", help="May see and purge across tenants.")] = False,
    expires_in_days: Annotated[float | None, typer.Option(help="No limit by default.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds until its jobs expire, unless they say so.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Revoke the tenant's keys of this name.")] = False,
    as_json: Json = False,
) -> None:
    """Make a key. It is shown once and stored only as a hash."""
    expires_in_s = None if expires_in_days is None else expires_in_days * 86_400
    with _cursor() as cursor:
        secret, key = api_keys.create(
            cursor,
            name,
            tenant,
            is_admin=admin,
            expires_in_s=expires_in_s,
            timeout_s=timeout,
            is_replacing=replace,
        )
    if as_json:
        print(json.dumps({"id": str(key.id), "key": secret, "name": name, "tenant": tenant}))
    else:
        console.print(
            f"{secret}\n\nKeep it now: it cannot be shown again. Revoke it with `switchyard keys revoke {key.prefix}`."
        )


@keys_app.command("list")
def list_keys(as_json: Json = False) -> None:
    """List keys, newest first, without their secrets."""
    with _cursor() as cursor:
        found = api_keys.find(cursor)
    rows = [
        {
            "id": str(key.id),
            "prefix": key.prefix,
            "name": key.name,
            "tenant": key.tenant,
            "admin": key.is_admin,
            "created": key.created_at.isoformat(timespec="seconds"),
            "state": "revoked" if key.revoked_at else "active",
        }
        for key in found
    ]
    _show(rows, as_json)


@keys_app.command("revoke")
def revoke_key(key: Annotated[str, typer.Argument(help="Its id or prefix.")]) -> None:
    """Revoke a key; gateways refuse it within two seconds."""
    with _cursor() as cursor:
        if not api_keys.revoke(cursor, key):
            _fail(f"no single living key has the id or prefix {key}; see `switchyard keys list`")
    console.print("revoked")


@jobs_app.command("list")
def list_jobs(
    status: Annotated[JobStatus | None, typer.Option()] = None,
    model: Annotated[str | None, typer.Option()] = None,
    tenant: Annotated[str | None, typer.Option()] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 20,
    as_json: Json = False,
) -> None:
    """List jobs, newest first."""
    with _cursor() as cursor:
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
    _show(rows, as_json)


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
    _show([{key: one[key] for key in ("model", "backend", "score_ms", "dropped")} for one in decision["candidates"]])
    _show(explained["steps"])
    if explained["attempts"]:
        _show(explained["attempts"])


@jobs_app.command("cancel")
def cancel_job(job_id: uuid.UUID) -> None:
    """Cancel a job. Its worker stops within a heartbeat."""
    tenant = _job(job_id).tenant
    with _cursor() as cursor:
        state = jobs.cancel(cursor, [(job_id, tenant)])[0]
    if state is not JobStatus.CANCELLED:
        _fail(f"the job has already {state}")
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
        _fail("name the jobs, or say --failed")
    with _cursor() as cursor:
        wanted = DeadLetters(tenant=tenant, model=model, code=code, limit=limit)
        ids = job_ids or job_views.dead_letters(cursor, [wanted])[0]
        retried = [found for found in jobs.retry(cursor, [(job_id, None) for job_id in ids]) if found is not None]
    console.print(f"queued {len(retried)} of {len(ids)} again")


@cache_app.command("stats")
def cache_stats(as_json: Json = False) -> None:
    """Entries, bytes and hits by model."""
    with _cursor() as cursor:
        _show(cache.stats(cursor, [None])[0], as_json)


@cache_app.command("purge")
def purge_cache(
    key: Annotated[str | None, typer.Option(help="One entry, by its hexadecimal key.")] = None,
    model: Annotated[str | None, typer.Option(help="A model's entries.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every entry of every tenant.")] = False,
) -> None:
    """Remove entries: one key, a model's, or all."""
    if not (key or model or everything):
        _fail("say what to purge: --key, --model or --all")
    try:
        raw = bytes.fromhex(key) if key else None
    except ValueError:
        _fail("--key must be hexadecimal")
    with _cursor() as cursor:
        removed = cache.purge(cursor, [Purge(tenant=None, key=raw, model=model)])[0]
    console.print(f"removed {removed} entries")


@webhooks_app.command("secret")
def create_webhook_secret(tenant: Annotated[str, typer.Option(help="Whose webhooks it signs.")] = "default") -> None:
    """Make a signing secret. It is shown once; the one before it signs beside it for a day."""
    with _cursor() as cursor:
        print(webhooks.create_secret(cursor, [tenant])[0][1])


@webhooks_app.command("list")
def list_deliveries(
    tenant: Annotated[str | None, typer.Option()] = None,
    status: Annotated[str | None, typer.Option(help="pending, delivered, failed or disabled")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 20,
    as_json: Json = False,
) -> None:
    """Deliveries, newest first."""
    with _cursor() as cursor:
        found = webhooks.find(cursor, [webhooks.Filter(tenant=tenant, status=status, limit=limit)])[0]
    shown = [webhook_answers.delivery(one) for one in found[:limit]]
    names = ("id", "type", "url", "status", "attempts", "last_status_code", "last_error")
    _show(shown if as_json else [{name: one[name] for name in names} for one in shown], as_json)


@webhooks_app.command("redeliver")
def redeliver(delivery_id: uuid.UUID) -> None:
    """Deliver again, under the same event id; a URL that was disabled is called again."""
    with _cursor() as cursor:
        again = webhooks.redeliver(cursor, [(delivery_id, None)])[0]
    if again is None:
        _fail(f"no delivery {delivery_id}")
    console.print("queued again")


@contextlib.contextmanager
def _cursor() -> Iterator[Cursor]:
    config = settings.load()
    url = config.database_url or servers.urls(config.home)[0]
    with contextlib.closing(session.connect(url, "switchyard-cli")) as connection, connection.cursor() as cursor:
        yield cursor


def _catalog() -> Catalog:
    config = settings.load()
    return catalog.load(config.config, config.models_dir)


def _job(job_id: uuid.UUID) -> job_views.View:
    with _cursor() as cursor:
        found = job_views.view(cursor, [(job_id, None)])[0]
    return found if found is not None else _fail(f"no job {job_id}")


def _show(rows: Sequence[dict[str, Any]], as_json: bool = False) -> None:
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    if not rows:
        console.print("nothing to show")
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in rows[0]:
        table.add_column(column, no_wrap=column == "id")
    for row in rows:
        table.add_row(*[_text(value) for value in row.values()])
    console.print(table)


def _text(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _fail(message: str) -> NoReturn:
    print(f"switchyard: {message}", file=sys.stderr)
    raise SystemExit(1)


if __name__ == "__main__":
    main()
