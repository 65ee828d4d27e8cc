import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from inference.chat_format import ChatFormat


@pytest.fixture(scope="session")
def word_format() -> ChatFormat:
    """One token for each word or run of signs, so that tests count tokens by eye."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "<pad>": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return ChatFormat(
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="<pad>")
    )
