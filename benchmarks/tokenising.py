"""What keeping tokens on the disk saves: tokenising pairs against reading them again, for several numbers of rows.

python benchmarks/tokenising.py --model smollm2-135m --rows 1000 10000 76256

The rows are made from the embedded dialogues: three turns and two answers, about 2,000 characters a pair.
"""

import argparse
import random
import tempfile
import time
from pathlib import Path

from applications.settings import settings_for_model
from inference.chat_format import ChatFormat
from inference.model_store import resolve_model
from training.config import DataSettings
from training.data.chitchat import load_dialogues
from training.data.token_cache import TokenCache

PARTS = ("prompt", "chosen", "rejected")


def make_rows(count: int) -> list[dict]:
    """Pairs of real talk with the lengths above."""
    turns = [turn for dialogue in load_dialogues() for turn in dialogue.turns]
    rng = random.Random(1)

    def talk(characters: int) -> str:
        text = ""
        while len(text) < characters:
            text += rng.choice(turns) + " "
        return text

    def conversation() -> list[dict]:
        return [{"role": "user" if i % 2 == 0 else "assistant", "content": talk(290)} for i in range(3)]

    return [{"prompt": conversation(), "chosen": talk(290), "rejected": talk(290)} for _ in range(count)]


def measure(rows: list[dict], chat_format: ChatFormat, settings: DataSettings) -> tuple[float, float, int]:
    """Seconds to make and keep the tokens, seconds to find and read them, and bytes on the disk."""
    with tempfile.TemporaryDirectory() as directory:
        begun = time.perf_counter()
        first = TokenCache(Path(directory), rows, PARTS, chat_format, settings, small=0)
        first.fill()
        made = time.perf_counter() - begun
        begun = time.perf_counter()
        TokenCache(Path(directory), rows, PARTS, chat_format, settings, small=0).read()
        return made, time.perf_counter() - begun, first.file.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10000])
    arguments = parser.parse_args()
    chat_format = ChatFormat.load(resolve_model(settings_for_model(arguments.model)["model"]))
    settings = DataSettings(max_prompt_tokens=512, max_response_tokens=256)
    for count in arguments.rows:
        rows = make_rows(count)
        _, characters = TokenCache(Path(), rows, PARTS, chat_format, settings).content
        made, read, size = measure(rows, chat_format, settings)
        print(
            f"{count:,} pairs, {characters / 1e6:.1f} M characters: made and kept in {made:.1f} s, found and read in "
            f"{read:.2f} s, {size / 1e6:.1f} MB"
        )


if __name__ == "__main__":
    main()
