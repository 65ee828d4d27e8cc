"""What a server gives to 1, 8 and 32 clients at once: requests and tokens a second, time to the first token.

    python -m benchmarks.serving --out serving.json

The server runs in a process of its own, the clients in this one. Every client sends its requests one behind the other;
each streams an answer of up to `--tokens` tokens. Time to the first token counts from sending to the first text.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from applications.doctor import find_model
from training.run_directory import versions

PROMPTS = (
    "How was your day?",
    "What is a good way to learn something new?",
    "Could you tell me a story about the sea?",
    "Please give me three short tips for cooking rice, and say why each of them works.",
)


@dataclass(frozen=True)
class Answered:
    first: float
    """Seconds to the first text."""
    whole: float
    tokens: int


@contextmanager
def server(model: Path, slots: int, queue: int) -> Iterator[tuple[str, str]]:
    """Its address and the name of its model."""
    program = "from rlhf_chat import main; main()"
    options = ["serve", str(model), "--port", "0", "--slots", str(slots), "--queue", str(queue), "--context", "512"]
    with subprocess.Popen([sys.executable, "-c", program, *options], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = re.match(r"Serving (\S+) of .* (http://\S+)/", process.stdout.readline())
        assert found, "the server has not started"
        try:
            yield found[2], found[1]
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)


async def ask(client: httpx.AsyncClient, name: str, number: int, tokens: int) -> Answered:
    body: dict[str, Any] = {
        "model": name,
        "messages": [{"role": "user", "content": PROMPTS[number % len(PROMPTS)]}],
        "max_tokens": tokens,
        "seed": number,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    begun, first, used = time.perf_counter(), 0.0, 0
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if not first and chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                first = time.perf_counter() - begun
            used = chunk["usage"]["completion_tokens"] if chunk.get("usage") else used
    whole = time.perf_counter() - begun
    return Answered(first or whole, whole, used)


async def load(url: str, name: str, clients: int, requests: int, tokens: int) -> tuple[float, list[Answered]]:
    """Seconds for all requests of all clients, and what each was."""

    async def one_client(client: httpx.AsyncClient, place: int) -> list[Answered]:
        return [await ask(client, name, place * requests + number, tokens) for number in range(requests)]

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=600, trust_env=False) as client:
        await ask(client, name, 0, 2)
        begun = time.perf_counter()
        answered = await asyncio.gather(*(one_client(client, place) for place in range(clients)))
        return time.perf_counter() - begun, [answer for of_client in answered for answer in of_client]


def measure(url: str, name: str, clients: int, requests: int, tokens: int) -> dict[str, float]:
    seconds, answered = asyncio.run(load(url, name, clients, requests, tokens))
    firsts = sorted(answer.first for answer in answered)
    return {
        "clients": clients,
        "requests": len(answered),
        "requests_per_second": len(answered) / seconds,
        "tokens_per_second": sum(answer.tokens for answer in answered) / seconds,
        "first_token_median": statistics.median(firsts),
        "first_token_95": firsts[round(0.95 * (len(firsts) - 1))],
    }


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a preset, a run or a model directory")
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=4, help="of each client")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(given)
    rows = []
    print("| clients | requests | requests a second | tokens a second | first token, median s | first token, 95 % s |")
    print("|---|---|---|---|---|---|")
    with server(find_model(arguments.model), arguments.slots, max(arguments.clients)) as (url, name):
        for clients in arguments.clients:
            row = measure(url, name, clients, arguments.requests, arguments.tokens)
            rows.append(row)
            print(
                f"| {clients} | {row['requests']} | {row['requests_per_second']:.2f} | {row['tokens_per_second']:.1f} "
                f"| {row['first_token_median']:.2f} | {row['first_token_95']:.2f} |",
                flush=True,
            )
    if arguments.out:
        used = {key: getattr(arguments, key) for key in ("model", "requests", "tokens", "slots")}
        found = {"cores": os.cpu_count(), "versions": versions(), "settings": used, "rows": rows}
        arguments.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
