"""`rlhf-chat serve`: models of a run behind the OpenAI protocol, with a page to compare them."""

from __future__ import annotations

import json
import secrets
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from inference.errors import UserError
from inference.serving.listener import bind, is_loopback
from inference.serving.served_models import find_served_models
from inference.streams import guard_output

if TYPE_CHECKING:
    from inference.chat_model import ChatModel
    from inference.serving.judging import Collecting
    from inference.serving.service import Limits, Service


USUAL_TEMPERATURE, USUAL_TOKENS = 0.7, 256
"""Of answers to be judged by a model that lies in no run."""


def serve_command(
    target: Path,
    host: str,
    port: int,
    token: str | None,
    slots: int,
    queue: int,
    context: int,
    max_tokens: int,
    preferences: Path | None,
) -> None:
    """`rlhf-chat serve`; returns after Ctrl-C. Raises UserError for what cannot be served, or not here."""
    guard_output()  # whoever reads its log may go
    found = find_served_models(target)
    token = choose_token(token, host)
    with bind(host, port) as listener:  # before the models, which take longer
        from applications.fit import size
        from inference.chat_model import ChatModel
        from inference.serving.app import create_app
        from inference.serving.server import Server
        from inference.serving.service import Limits, Service

        collecting = find_collecting(found, preferences)
        limits = Limits(slots, queue, context, max_tokens)
        models = {name: ChatModel.load(path) for name, path in found.items()}
        check_context(models, limits)
        service = Service(models, limits)
        lines = [
            f"Serving {' and '.join(models)} of {target}; the chat page is {page_address(listener, host, token)}",
            *collecting_lines(collecting, page_address(listener, host, token, "prefer")),
            f"OpenAI protocol: base URL {address(listener, host)}/v1, API key {token or 'of any kind'}",
            f"Up to {slots} answers of a model at a time, {queue} waiting; {size(reserve_memory(service, models))} for "
            "keys and values. Ctrl-C stops.",
        ]
        app = create_app(service, token, loopback_only=is_loopback(host), collecting=collecting)
        Server(app, service, ready=lambda: print("\n".join(lines), flush=True)).run([listener])
    print("Stopped.")


def find_collecting(found: dict[str, Path], preferences: Path | None) -> Collecting | None:
    """Two answers of the newest of the models, drawn as its run does, and the run's prompts to be suggested; None where
    it lies in no run and there is no file for verdicts. Raises UserError where the file is damaged."""
    from inference.preferences import PreferenceFile
    from inference.serving.judging import Answerer, Collecting
    from training.data.rows import read_rows
    from training.lineage import origin_of
    from training.steps import PROMPTS

    name, directory = list(found.items())[-1]
    origin = origin_of(directory)
    if origin is None:
        if preferences is None:
            return None
        answerer = Answerer(name, name)
        return Collecting(PreferenceFile(preferences), (answerer, answerer), USUAL_TEMPERATURE, USUAL_TOKENS)
    config, prompts = origin.run.read_config(), origin.run.data / f"{PROMPTS.name}_train.jsonl"
    file = PreferenceFile(preferences or origin.run.preferences)
    rows = [row["prompt"] for row in read_rows(prompts)] if prompts.exists() else []
    seen = {json.dumps(verdict.prompt) for verdict in file.read()}
    answerer = Answerer(name, f"{origin.run.path.name}/{origin.step.command}")
    return Collecting(
        file,
        (answerer, answerer),
        config.rlhf.temperature,
        config.data.max_response_tokens,
        sorted(rows, key=lambda prompt: json.dumps(prompt) in seen),  # what nobody has judged answers to comes first
    )


def collecting_lines(collecting: Collecting | None, page: str) -> list[str]:
    if collecting is None:
        return []
    labels = " and ".join(dict.fromkeys(each.label for each in collecting.answerers))
    return [f"To judge answers of {labels}: {page}; verdicts go to {collecting.file.path}"]


def choose_token(token: str | None, host: str) -> str | None:
    """The one that was given; a new one where other machines can come in."""
    if token is not None and not (token.isascii() and token.isprintable() and token.strip() == token != ""):
        raise UserError("The token must be of printable ASCII characters without blanks at its ends; choose another.")
    return token if token is not None or is_loopback(host) else secrets.token_urlsafe(24)


def check_context(models: dict[str, ChatModel], limits: Limits) -> None:
    """Raise UserError where an answer would leave no room for a prompt."""
    for name, model in models.items():
        context = min(limits.context, model.context_length or limits.context)
        if context < 2:
            raise UserError(f"{context} tokens are no room for a prompt and an answer of {name}; give more --context.")


def reserve_memory(service: Service, models: dict[str, ChatModel]) -> int:
    """Make the room for keys and values and return its bytes. Raises UserError where it is too much."""
    from applications.fit import Machine, size

    way_out = "give fewer --slots or a smaller --context"
    try:
        cache_bytes = service.warm_up()
    except RuntimeError as error:  # torch's errors of allocation are such
        if "memory" not in str(error):
            raise
        raise UserError(f"Keys and values do not fit into the memory; {way_out}.") from error
    weights = sum(model.model.get_memory_footprint() for model in models.values())
    has = Machine.here().per_process(1)
    if weights + cache_bytes > has:  # a CPU hands memory out only when it is written to
        parts = f"Weights ({size(weights)}) and keys and values ({size(cache_bytes)})"
        raise UserError(f"{parts} do not fit into {size(has)} of memory; {way_out}.")
    return cache_bytes


def address(listener: socket.socket, host: str) -> str:
    """As other programs reach it; a server on all interfaces is shown under the machine's name."""
    name, port, *_ = listener.getsockname()
    shown = socket.gethostname() if name in ("0.0.0.0", "::") else host
    return f"http://{f'[{shown}]' if ':' in shown else shown}:{port}"


def page_address(listener: socket.socket, host: str, token: str | None, page: str = "") -> str:
    """With the token behind `#`, which browsers keep to themselves."""
    return f"{address(listener, host)}/{page}" + (f"#token={token}" if token else "")
