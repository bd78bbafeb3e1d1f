"""Our envelope against Celery's own, so an upgrade cannot part them unnoticed."""

import base64
import contextlib
import json
import uuid
from typing import Any

import redis

from tasks import celery
from tasks.call import VERSION


def sent_by_celery(redis_url: str, job_id: uuid.UUID) -> dict[str, Any]:
    celery.app.conf.broker_url = redis_url
    with (
        contextlib.closing(redis.Redis.from_url(redis_url)) as client,
        celery.app.connection_for_write(redis_url) as link,
    ):
        client.delete("echo")
        celery.app.send_task(
            "switchyard.generate", args=(str(job_id), VERSION), kwargs={}, queue="echo", task_id=str(job_id),
            argsrepr="", kwargsrepr="", connection=link,
        )  # fmt: skip
        taken: Any = client.lpop("echo")
        message: dict[str, Any] = json.loads(taken)
    return message


def test_our_envelope_is_celerys(redis_url: str) -> None:
    job_id = uuid.uuid4()
    theirs = sent_by_celery(redis_url, job_id)
    ours = json.loads(celery.message(job_id, "generate", "echo"))
    assert json.loads(base64.b64decode(ours["body"])) == json.loads(base64.b64decode(theirs["body"]))
    for envelope in (ours, theirs):
        del envelope["body"], envelope["properties"]["delivery_tag"]
        # Where results would go, which nobody reads; and options that send_task repeats among the properties.
        for name in ("reply_to", "argsrepr", "kwargsrepr"):
            envelope["properties"].pop(name, None)
        envelope["headers"].pop("origin", None)
    assert ours["headers"] == theirs["headers"]
    assert ours == theirs


def test_a_message_shows_nothing_but_ids() -> None:
    message = json.loads(celery.message(uuid.uuid4(), "embed", "bert"))
    assert message["headers"]["task"] == "switchyard.embed"
    assert (message["headers"]["argsrepr"], message["headers"]["kwargsrepr"]) == ("", "")
    (job_id, version), kwargs, _ = json.loads(base64.b64decode(message["body"]))
    assert str(uuid.UUID(job_id)) == message["headers"]["id"]
    assert (version, kwargs) == (VERSION, {})


def test_celery_knows_one_queue_per_backend_and_no_other() -> None:
    assert set(celery.app.amqp.queues) == {"gpt", "bert", "vllm", "echo"}
