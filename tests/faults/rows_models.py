"""Family B with real models, where they are on this machine.

fp32 and greedy, so the answer after a kill can be compared word for word with an undisturbed one.
"""

import contextlib
import os
import signal
import time

import psutil

from tests.faults.lab import Lab
from tests.faults.rows import row

_LOAD_S = 240


def _killed_in_the_middle(lab: Lab, backend: str) -> list[float]:
    name = f"{backend}-a"
    body = {
        "model": f"on-{backend}",
        "messages": [{"role": "user", "content": "Tell me about the sea."}],
        "temperature": 0,
        "max_tokens": 96,
    }
    lab.start_model_worker(backend, name, _LOAD_S)
    found = []
    with lab.stack.client(timeout_s=120) as client:
        answer = client.post("/v1/chat/completions", json=body, headers={"Cache-Control": "no-store"})
    undisturbed = answer.json()["choices"][0]["message"]["content"]
    try:
        for _ in range(lab.times(1, 5)):
            stream = lab.stack.read_stream("/v1/chat/completions", body, **{"Cache-Control": "no-store"})
            stream.wait_for(3 * lab.clients.rng.randrange(8, 60))
            since = time.time()
            lab.kill(name)
            lab.start_model_worker(backend, name, _LOAD_S)
            text = stream.text(_LOAD_S)
            assert text == undisturbed, f"{text!r} instead of {undisturbed!r}"
            found += lab.restarts(since)
    finally:
        lab.stack.stop(name, 60)
    return found


@row("F12g", "kill -9 of a Transformers worker in the middle of a stream", "I1 I5", within_s=120, needs="models")  # fmt: skip
def gpt(lab: Lab) -> list[float]:
    return _killed_in_the_middle(lab, "gpt")


@row("F12v", "kill -9 of a vLLM worker in the middle of a stream", "I1 I5", within_s=240, needs="models", is_long=True)  # fmt: skip
def vllm(lab: Lab) -> list[float]:
    return _killed_in_the_middle(lab, "vllm")


@row("F65g", "vLLM's engine is frozen, then killed, under its worker", "I1 I5", within_s=240, needs="models", is_long=True)  # fmt: skip
def lost_engine(lab: Lab) -> list[float]:
    body = {"model": "on-vllm", "messages": [{"role": "user", "content": "Tell me about the sea."}], "temperature": 0,
            "max_tokens": 96}  # fmt: skip
    lab.stack.environment["SWITCHYARD_STALL_S"] = "5"
    found, texts = [], set()
    try:
        for number in (signal.SIGSTOP, signal.SIGKILL):
            lab.start_model_worker("vllm", "vllm-a", _LOAD_S)
            worker = psutil.Process(lab.stack.processes["vllm-a"].pid)
            engine = max(worker.children(recursive=True), key=lambda child: child.memory_info().rss)
            stream = lab.stack.read_stream("/v1/chat/completions", body, **{"Cache-Control": "no-store"})
            stream.wait_for(3 * 20)
            since = time.time()
            os.kill(engine.pid, number)
            # The worker finds out by itself.
            lab.reap("vllm-a", 30)
            with contextlib.suppress(psutil.NoSuchProcess):
                engine.kill()
            lab.start_model_worker("vllm", "vllm-a", _LOAD_S)
            texts.add(stream.text(_LOAD_S))
            found += lab.restarts(since)
            lab.stack.stop("vllm-a", 60)
    finally:
        del lab.stack.environment["SWITCHYARD_STALL_S"]
        if "vllm-a" in lab.stack.processes:
            lab.kill("vllm-a")
    assert len(texts) == 1, f"two failovers of one question gave two answers: {texts}"
    return found
