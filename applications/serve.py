"""`rlhf-chat serve`: models of a run behind the OpenAI protocol, with a page to compare them."""

from __future__ import annotations

import secrets
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from inference.errors import UserError
from inference.serving.server import bind, is_loopback
from inference.serving.service import find_served_models
from inference.streams import guard_output
from training.checkpoints import checkpoint_of

if TYPE_CHECKING:
    from inference.chat_model import ChatModel
    from inference.serving.judging import Collecting
    from inference.serving.service import Limits, Service


def serve_command(
    target: Path,
    host: str,
    port: int,
    token: str | None,
    slots: int,
    queue: int,
    context: int,
    max_tokens: int,
    against: str,
    preferences: Path | None,
    trusts: bool = False,
) -> None:
    """`rlhf-chat serve`; returns after Ctrl-C. Raises UserError for what cannot be served, or not here."""
    guard_output()  # whoever reads its log may go
    at = checkpoint_of(target)
    served = {at.name: at.model(trusts)} if at else find_served_models(target)
    token = choose_token(token, host)
    with bind(host, port) as listener:  # before the models, which take longer
        from inference.chat_model import ChatModel
        from inference.serving.app import create_app
        from inference.serving.server import Server
        from inference.serving.service import Limits, Service
        from training.metrics import size

        collecting, others = find_collecting(target, served, against, preferences, trusts)
        limits = Limits(slots, queue, context, max_tokens)
        models = {name: ChatModel.load(path) for name, path in (served | others).items()}
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


def find_collecting(
    target: Path, served: dict[str, Path], against: str, preferences: Path | None, trusts: bool
) -> tuple[Collecting | None, dict[str, Path]]:
    """Two answers of the newest of the models served, or one of it and one of `against`, drawn as its run
    does, with the run's prompts to be suggested; and the models that are to be served for it besides.

    None where it lies in no run and there is no file for preferences. Raises UserError for models that cannot be told
    apart, and where `preferences` is a file of another kind.
    """
    from applications.prefer import USUAL_TEMPERATURE, USUAL_TOKENS, find_model, suggestions
    from inference.preferences import PreferenceFile
    from inference.serving.judging import Collecting, ServedModel
    from training.lineage import label_of, origin_of

    name, directory = list(served.items())[-1]
    origin = origin_of(directory)
    run = origin.run if origin else None
    path = preferences or (run.preferences if run else None)
    if path is None:
        if against:
            raise UserError(f"{target} lies in no run: say where preferences go, with --preferences FILE.")
        return None, {}
    file = PreferenceFile(path)
    if preferences:
        file.require_own()
    one = other = ServedModel(name, label_of(directory, name))
    others: dict[str, Path] = {}
    if against:
        asked = find_model(run.path if run else target, against, trusts)
        names = {path.resolve(): name for name, path in served.items()}
        other = ServedModel(names.get(asked.directory.resolve(), asked.label.replace("/", "-")), asked.label)
        if one.name == other.name or one.label == other.label:
            raise UserError(f"{against} and {target} are both {one.label}: give another one with --against.")
        if asked.directory.resolve() not in names:
            others[other.name] = asked.directory
    if not run:
        return Collecting(file, (one, other), USUAL_TEMPERATURE, USUAL_TOKENS), others
    config = run.read_config()
    sampling = config.rlhf.temperature, config.data.max_response_tokens
    unjudged = list(suggestions(run, file.read_or_say()))
    prompts = unjudged or list(suggestions(run, []))
    return Collecting(file, (one, other), *sampling, prompts), others


def collecting_lines(collecting: Collecting | None, page: str) -> list[str]:
    if collecting is None:
        return []
    labels = " and ".join(dict.fromkeys(model.label for model in collecting.models))
    return [f"To judge answers of {labels}: {page}; preferences go to {collecting.file.path}"]


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
    from applications.fit import Machine
    from training.metrics import size

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
    """The URL for other programs; a server on all interfaces is shown under the machine's name."""
    name, port, *_ = listener.getsockname()
    shown = socket.gethostname() if name in ("0.0.0.0", "::") else host
    return f"http://{f'[{shown}]' if ':' in shown else shown}:{port}"


def page_address(listener: socket.socket, host: str, token: str | None, page: str = "") -> str:
    """The URL of a page, with the token behind `#`, which browsers keep to themselves."""
    return f"{address(listener, host)}/{page}" + (f"#token={token}" if token else "")
