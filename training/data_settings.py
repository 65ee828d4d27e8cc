"""What the settings say of data: sources, how they are shared out, and the longest rows."""

from typing import Literal

from pydantic import Field, PrivateAttr, ValidationInfo, field_validator

from training.role_settings import Rows, Settings, Share, Tokens

EMBEDDED_DATA = "chitchat"


class DataSettings(Settings):
    source: str | list[str] = EMBEDDED_DATA
    """`chitchat` (the embedded default), a file, directory or hub id, or `reasoning:TASK` of reasoning-gym; a list
    blends several, `=2` is a weight."""
    eval_source: str | list[str] = ""
    """Data for evaluation alone, named as `source` is; what they serve, `source` need not hold out. Empty: none."""
    split: tuple[float, float, float] = (2, 4, 4)
    """Shares of one data set that go to steps 1, 2 and 3, when one set serves all steps."""
    held_out: Share = Field(0.05, gt=0, lt=0.5)
    """Share of the prompts (of the embedded default: dialogues) that is kept for evaluation."""
    split_seed: int = Field(-1, ge=-1, lt=2**63)
    """Seed of what is held out and what each step gets; -1: that of the run that the models come from, else `seed`."""
    max_prompt_tokens: Tokens = Field(256, ge=4)
    """Longest prompt; older turns are dropped first."""
    max_response_tokens: Tokens = Field(256, ge=2)
    """Longest response, its end-of-turn token included."""
    parent: str = ""
    """A run that this one goes on from (`run --go-on`): what it holds out stays so, and its prompts serve here."""
    limit: Rows = Field(0, ge=0)
    """Use at most this many rows (of the embedded default: dialogues, and rated texts) of each source; 0 means all."""
    comparisons: Literal["extremes", "all"] = "extremes"
    """Which pairs several rated answers to a prompt give: the best and the worst alone, or all of different ratings."""
    bad_rows: Literal["refuse", "skip"] = "refuse"
    """What to do with a row that cannot be used: stop and name its line, or leave it out and count it."""
    _keeps_labels: bool = PrivateAttr(False)
    """Whether answers with a label stay so, and do not become pairs (`keep_labels`)."""

    @property
    def keeps_labels(self) -> bool:
        return self._keeps_labels

    def keep_labels(self, unpaired: bool) -> None:
        """Know whether the run, whose method lies beside these settings, learns from `unpaired` answers."""
        self._keeps_labels = unpaired

    @property
    def longest(self) -> int:
        """Tokens of a prompt and its response, at most."""
        return self.max_prompt_tokens + self.max_response_tokens

    @property
    def sources(self) -> list[str]:
        return [self.source] if isinstance(self.source, str) else self.source

    @property
    def eval_sources(self) -> list[str]:
        return [self.eval_source] * bool(self.eval_source) if isinstance(self.eval_source, str) else self.eval_source

    @field_validator("source", "eval_source")
    @classmethod
    def _check_sources(cls, given: str | list[str], info: ValidationInfo) -> str | list[str]:
        """Check the sources; a list of one becomes that one."""
        texts, evaluates = [given] * bool(given) if isinstance(given, str) else given, info.field_name == "eval_source"
        if not all(text.strip() for text in texts) or not (texts or evaluates):
            raise ValueError("is empty; give a file, a directory or a hub id")
        if EMBEDDED_DATA in texts and evaluates:
            raise ValueError(f"'{EMBEDDED_DATA}' has a split of its own; it evaluates what is trained on it alone")
        if EMBEDDED_DATA in texts and len(texts) > 1:
            raise ValueError(f"'{EMBEDDED_DATA}' has a split of its own and cannot be blended with other sources")
        return texts[0] if len(texts) == 1 else texts or ""
