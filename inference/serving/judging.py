"""People say which of two answers is better. Whose answers they are never leaves the server."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any, TypeVar

from inference.chat_model import longest_answer
from inference.chat_template import Message
from inference.errors import UserError
from inference.preferences import EQUAL, Answer, BlindPair, PreferenceFile, blank_pairs, checked_name, unjudged
from inference.serving.answers import Answers
from inference.serving.request import ApiError, ChatRequest, PairRequest, PreferenceRequest
from inference.serving.service import Service

MOST_PAIRS = 1000
"""So many pairs that wait for a preference, and that had one, are remembered; older ones are forgotten."""
Result = TypeVar("Result")


@dataclass(frozen=True)
class ServedModel:
    name: str
    label: str
    """Its name in the file of preferences."""


@dataclass(frozen=True)
class Collecting:
    """What is asked of whom, and where preferences go."""

    file: PreferenceFile
    models: tuple[ServedModel, ServedModel]
    """Two models, or one twice."""
    temperature: float
    max_tokens: int
    prompts: Sequence[list[Message]] = ()
    """Suggested one after the other."""


class Judging:
    """Lives in the event loop and serves any number of people."""

    def __init__(self, service: Service, collecting: Collecting):
        self.service, self.collecting = service, collecting
        room = min(service.find(model.name).batch.context for model in collecting.models)
        self.max_tokens = longest_answer(min(collecting.max_tokens, service.limits.max_tokens), room)
        self._prompts = cycle(collecting.prompts)
        self._pairs: dict[str, BlindPair] = {}
        self._judged: dict[str, PreferenceRequest] = {}
        self._writing = asyncio.Lock()

    async def draw(self, request: PairRequest) -> BlindPair:
        """Both answers when both are there. Raises ApiError."""
        if request.unjudged_by is not None:
            return await self._of_others(named(request.unjudged_by), request.skip)
        prompt = request.conversation or self._suggestion()
        labels = [model.label for model in self.collecting.models]
        for blank in blank_pairs(prompt, labels, self.collecting.temperature, self.max_tokens):
            pair = await self._answered(blank)
            if not pair.teaches_nothing:
                return self._remember(pair)
        raise ApiError(422, EQUAL, code="equal_answers")

    async def judge(self, request: PreferenceRequest) -> None:
        """Return when the preference is on the disk; sent a second time it changes nothing. Raises ApiError."""
        async with self._writing:
            if (before := self._judged.get(request.pair)) == request:
                return
            if before is not None:
                raise ApiError(409, "Which of these two is better was said already; undo it first.", "pair", "judged")
            if (pair := self._pairs.get(request.pair)) is None:
                message = (
                    "The server does not know these two answers any more, as it was started again or they have waited "
                    "too long: skip them. Preferences that were kept are still there."
                )
                raise ApiError(404, message, "pair", "pair_not_found")
            preference = pair.judged(request.winner, named(request.by))
            await in_thread(lambda: self.collecting.file.add(preference))
            del self._pairs[pair.id]
            self._judged[pair.id] = request
            forget_oldest(self._judged)

    async def undo(self, by: str) -> BlindPair:
        """What this person has judged last; the preference is taken back. Raises ApiError."""
        by = named(by)
        async with self._writing:
            preference = await in_thread(lambda: self.collecting.file.undo(by))
            if preference is None:
                raise ApiError(404, f"There is no preference of {by} to take back.", code="nothing_judged")
            self._judged.pop(preference.id, None)
            return self._remember(BlindPair.again(preference))

    async def count(self, by: str) -> dict[str, int]:
        """The preferences of a person, and the pairs that others alone have judged. Raises ApiError."""
        by = named(by)
        preferences = await in_thread(self.collecting.file.read)
        own = sum(preference.by == by for preference in preferences)
        return {"count": own, "others": len(unjudged(preferences, by))}

    async def _of_others(self, by: str, skip: Sequence[str]) -> BlindPair:
        """`skip` has the ids of pairs that the person looks at or has skipped; others come until they are judged."""
        skipped = {self._pairs[id].pair for id in skip if id in self._pairs}
        for preference in unjudged(await in_thread(self.collecting.file.read), by):
            if preference.pair not in skipped:
                return self._remember(BlindPair.again(preference, redrawn=True))
        raise ApiError(404, f"Nothing that others have judged is left for {by}.", code="none_left")

    async def _answered(self, blank: BlindPair) -> BlindPair:
        try:
            async with asyncio.TaskGroup() as tasks:  # where one is refused, the other ends too
                left, right = (tasks.create_task(self._text(blank, side)) for side in (blank.left, blank.right))
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        return replace(
            blank, left=replace(blank.left, text=left.result()), right=replace(blank.right, text=right.result())
        )

    async def _text(self, pair: BlindPair, side: Answer) -> str:
        name = next(model.name for model in self.collecting.models if model.label == side.model)
        sampling = {"temperature": pair.temperature, "max_tokens": pair.max_tokens, "seed": side.seed}
        request = ChatRequest.model_validate({"model": name, "messages": pair.prompt}).model_copy(update=sampling)
        completion = await self.service.begin(request)
        try:
            body = await Answers(request, completion).body()
        finally:
            self.service.end(completion)
        return str(body["choices"][0]["message"]["content"])

    def _suggestion(self) -> list[Message]:
        for prompt in self._prompts:
            return prompt
        raise ApiError(404, "This server has no messages to suggest: type one.", code="no_suggestions")

    def _remember(self, pair: BlindPair) -> BlindPair:
        self._pairs[pair.id] = pair
        forget_oldest(self._pairs)
        return pair


def forget_oldest(recent: dict[str, Any]) -> None:
    while len(recent) > MOST_PAIRS:
        del recent[next(iter(recent))]


async def in_thread(work: Callable[[], Result]) -> Result:
    """Work on a file, whose disk can be slow. What a person can put right becomes an ApiError."""
    try:
        return await asyncio.to_thread(work)
    except UserError as error:
        raise ApiError(507 if isinstance(error.__cause__, OSError) else 500, str(error)) from None


def named(by: str) -> str:
    """The name as it is stored. Raises ApiError."""
    try:
        return checked_name(by)
    except UserError as error:
        raise ApiError(400, str(error), "by", "invalid_value") from None
