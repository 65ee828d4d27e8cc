"""Prompt and response beside the template's own tokens of the finished dialogue, for templates of many families."""

import json
from datetime import datetime

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from inference.chat_format import ChatFormat
from inference.chat_model import TextPieces
from inference.chat_template import TRAINING_DATE, scored_otherwise
from inference.errors import UserError
from tests.inference.templates import CHATML, CHATML_PROMPT, CHATML_TURN, FAMILIES, Family, bytes_tokenizer

THOUGHT = "<think>\nhmm\n</think>\n\n"
THINKING = ("qwen-3", "deepseek-r1", "open thought")


@pytest.fixture(scope="module")
def formats() -> dict[str, ChatFormat]:
    return {name: ChatFormat(bytes_tokenizer(family)) for name, family in FAMILIES.items()}


def conversation(turns: int, answer: str = "A", system: str = "") -> list[dict]:
    messages = [{"role": "system", "content": system}] if system else []
    for number in range(1, turns + 1):
        messages += [{"role": "user", "content": f"Q{number}"}, {"role": "assistant", "content": f"{answer}{number}"}]
    return messages


def of_template(form: ChatFormat) -> list[str]:
    return [note for note in form.notes if not note.startswith("pad token")]


def apart(form: ChatFormat, messages: list[dict]) -> list[int]:
    return form.prompt_ids(messages[:-1]) + form.response_ids(messages[-1]["content"])


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_that_is_begun_has_the_tokens_of_a_trained_one(formats, name):
    form = formats[name]
    begun, trained = form.begun_ids("Well, yes"), form.response_ids("Well, yes")
    assert begun and trained[: len(begun)] == begun
    assert form.tokenizer.decode(trained[len(begun) :]) == form.ending + form.tokenizer.eos_token
    assert form.begun_ids("") == []


@pytest.mark.parametrize("name", FAMILIES)
def test_written_out_by_hand(formats, name):
    form, family = formats[name], FAMILIES[name]
    system = "" if family.refuses_system else "S"
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    text = form.tokenizer.decode(apart(form, messages))
    assert text == family.finished
    assert form.tokenizer.decode(form.prompt_ids(messages[:-1])).endswith(family.prompt_end)
    assert form.tokenizer.convert_ids_to_tokens(form.end_of_turn_id) == family.end
    assert form.tokenizer.convert_ids_to_tokens(list(form.end_ids)) == list(
        dict.fromkeys([family.end, family.special[0]])
    )
    assert form.decode(form.response_ids("A")) == "A"


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_prompt_and_response_are_the_templates_own_tokens(formats, name, turns):
    form = formats[name]
    messages = conversation(turns, system="" if FAMILIES[name].refuses_system else "S")
    ours, theirs = apart(form, messages), form.finished_ids(messages)
    if name == "deepseek-r1":  # it begins a thought, and finished dialogues have none
        text = form.tokenizer.decode(ours).replace("<think>\n\n</think>\n\n", "")
        assert form.tokenizer.decode(theirs) == text
    else:
        assert theirs[: len(ours)] == ours
    assert not [note for note in form.notes if "otherwise" in note or "no token" in note or "takes no" in note]


@pytest.mark.parametrize("name", ["llama-2", "llama-3", "qwen-2.5", "mistral"])
@pytest.mark.parametrize("text", ["\n A", "A \n", "", "two\n\nlines", "A <|im_end|> </s> of it"])
def test_answers_are_trimmed_as_the_template_trims(formats, name, text):
    form = formats[name]
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": text}]
    ours = apart(form, messages)
    assert form.finished_ids(messages)[: len(ours)] == ours


@pytest.mark.parametrize("name", THINKING)
def test_thoughts_are_trained_once_and_closed(formats, name):
    form = formats[name]
    thought = conversation(1, f"{THOUGHT}A")
    text = form.tokenizer.decode(apart(form, thought))
    assert text.endswith("<think>\nhmm\n</think>\n\nA1" + FAMILIES[name].end)
    bare = form.tokenizer.decode(apart(form, conversation(1)))
    assert bare.endswith("<think>\n\n</think>\n\nA1" + FAMILIES[name].end)
    if name != "deepseek-r1":
        ours = apart(form, thought)
        assert form.finished_ids(thought)[: len(ours)] == ours
    two = form.tokenizer.decode(apart(form, conversation(2, f"{THOUGHT}A")))
    assert two.count("hmm") == 1 and two.count("<think>") == 1 and "A1" in two  # earlier thoughts are not read again


def test_a_template_that_keeps_or_drops_thoughts_without_beginning_them(formats):
    kept = formats["chatml"].tokenizer.decode(formats["chatml"].response_ids(f"{THOUGHT}A"))
    assert kept == f"{THOUGHT}A<|im_end|>"
    drops = FAMILIES["deepseek-r1"].template.replace("<think>\\n", "")
    form = ChatFormat(
        bytes_tokenizer(Family(drops, FAMILIES["deepseek-r1"].special, "", FAMILIES["deepseek-r1"].begin))
    )
    assert form.tokenizer.decode(form.response_ids(f"{THOUGHT}A")) == f"{THOUGHT}A<|end_of_sentence|>"
    assert form.tokenizer.decode(form.response_ids("A")) == "A<|end_of_sentence|>"


@pytest.mark.parametrize("end", ["<think>\n\n</think>\n\n", "</think>"])
def test_a_thought_that_the_prompt_has_ended_is_not_begun_again(end):
    form = chatml(CHATML.replace("assistant\n", f"assistant\n{end}"))
    for answer in ("A", f"{THOUGHT}A"):
        text = form.tokenizer.decode(apart(form, conversation(1, answer)))
        assert text == f"<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n{end}A1<|im_end|>"
    assert [note for note in form.notes if "thoughts of answers are left out" in note]


@pytest.mark.parametrize("name", [*THINKING, "channels"])
def test_a_stream_shows_no_empty_thought(formats, name):
    form = formats[name]
    for text in ("A", "", "the answer"):
        ids, pieces = form.response_ids(text), TextPieces(form.decode)
        assert "".join(pieces.take(ids[:n], n == len(ids)) for n in range(1, len(ids) + 1)) == text
    ids, pieces = form.response_ids(f"{THOUGHT}A"), TextPieces(form.decode)
    assert "".join(pieces.take(ids[:n], n == len(ids)) for n in range(1, len(ids) + 1)).endswith("hmm\n</think>\n\nA")


def test_what_was_put_in_is_said_and_saved(formats, tmp_path):
    for name, said in (
        ("no prompt", "does not begin an answer"),
        ("parts", "lists of parts"),
        ("llama-3.1", "the date: in training it is always 26 Jul 2024"),
        ("deepseek-r1", "prompts begin a thought (<think>)"),
        ("qwen-3", "answers begin with '<think>"),
    ):
        assert len([note for note in formats[name].notes if said in note]) == 1
        formats[name].save(tmp_path / name)
        again = ChatFormat.load(tmp_path / name)
        assert apart(again, conversation(2)) == apart(formats[name], conversation(2))
    assert not [note for note in ChatFormat.load(tmp_path / "no prompt").notes if "begin" in note]


# Dates


def test_a_date_is_that_of_training_or_of_the_clock(monkeypatch):
    template = FAMILIES["llama-3.1"].template
    form, live = (ChatFormat(bytes_tokenizer(FAMILIES["llama-3.1"]), day=day) for day in (TRAINING_DATE, None))
    question = [{"role": "user", "content": "Q"}]
    assert "Today Date: 26 Jul 2024" in form.tokenizer.decode(form.prompt_ids(question))
    today = f"Today Date: {datetime.now():%d %b %Y}"
    assert today in live.tokenizer.decode(live.prompt_ids(question))
    assert not of_template(live)
    assert form.tokenizer.chat_template == template  # the saved model asks the clock


@pytest.mark.parametrize(
    "written, expected",
    [
        ("strftime_now('%Y-%m-%d')", "2024-07-26"),
        ("strftime_now('%-d %B %Y, %A')", "26 July 2024, Friday"),
        ("strftime_now(form)", "07/26/24"),
        ("strftime_now(format='%G-W%V')", "2024-W30"),
        ("said()", "26.7."),
    ],
)
def test_every_way_to_ask_for_the_date(written, expected):
    said = "{% macro said() %}{{ strftime_now('%d.%-m.') }}{% endmacro %}{% set form = '%D' %}"
    form = ChatFormat(bytes_tokenizer(Family(f"{said}[{{{{ {written} }}}}]{CHATML}", FAMILIES["chatml"].special, "")))
    prompt = form.tokenizer.decode(form.prompt_ids([{"role": "user", "content": "Q"}]))
    assert prompt == f"[{expected}]<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"


# Templates that are refused, or mended


def chatml(template, **more) -> ChatFormat:
    tokenizer = bytes_tokenizer(FAMILIES["chatml"])
    tokenizer.chat_template = template
    return ChatFormat(tokenizer, **more)


@pytest.mark.parametrize(
    "template, sentence",
    [
        (CHATML.replace("m['content']", "''"), "leaves out the question"),
        ("{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}", "leaves out the answer"),
        ("{% for m in messages %}{{ m['content'] + 1 }}{% endfor %}", "can only concatenate str.*; give .* another"),
        ("{% for m in messages %}", "Unexpected end of template"),
        ({"tool_use": CHATML, "rag": CHATML}, r"several chat templates \(rag, tool_use\) and none is called default"),
    ],
)
def test_templates_that_lose_what_is_said_are_refused(template, sentence):
    with pytest.raises(UserError, match=sentence):
        chatml(template)


def test_messages_that_a_template_leaves_out_are_refused():
    only_turns = chatml(CHATML.replace("messages %}", "messages if m['role'] != 'system' %}"))
    only_last = chatml(CHATML.replace("messages %}", "messages[-2 if messages[-1]['role'] == 'assistant' else -1:] %}"))
    question = {"role": "user", "content": "Hello there"}
    assert only_turns.prompt_ids([question]) == only_last.prompt_ids([question])
    with pytest.raises(UserError, match=r"leaves out the system message 'Be kind\.'"):
        only_turns.prompt_ids([{"role": "system", "content": "Be kind."}, question])
    assert only_turns.refusal([question]) == ""
    assert "leaves out the system" in only_turns.refusal([{"role": "system", "content": "Be kind."}, question])
    with pytest.raises(UserError, match="leaves out the user message 'First'"):
        only_last.prompt_ids([{"role": "user", "content": "First"}, {"role": "assistant", "content": "A"}, question])


def test_a_template_may_obey_a_word_of_a_message():
    shown = "(m['content'] | replace('/no_think', ''))"
    form = chatml(CHATML.replace("m['content']", shown))
    with_word, without = ([{"role": "user", "content": f"Hello{word}"}] for word in (" /no_think", " "))
    assert form.prompt_ids(with_word) == form.prompt_ids(without)


def test_named_templates(tmp_path):
    family = FAMILIES["llama-3"]
    tokenizer = bytes_tokenizer(family)
    bare = family.template.replace("bos_token + content", "content")  # the tokenizer adds one
    tokenizer.chat_template = {"default": bare, "tool_use": "T"}
    form = ChatFormat(tokenizer)
    assert apart(form, conversation(2)) == apart(ChatFormat(bytes_tokenizer(family)), conversation(2))
    form.save(tmp_path)
    again = ChatFormat.load(tmp_path)
    assert again.tokenizer.chat_template["tool_use"] == "T"
    assert apart(again, conversation(2)) == apart(form, conversation(2))


def test_the_template_of_a_processor_is_read(tmp_path):
    tokenizer = bytes_tokenizer(FAMILIES["parts"])
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": FAMILIES["parts"].template}))
    form = ChatFormat.load(tmp_path)
    assert apart(form, conversation(2)) == apart(ChatFormat(bytes_tokenizer(FAMILIES["parts"])), conversation(2))


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_damaged_generation_config_is_a_sentence(tmp_path, content):
    bytes_tokenizer(FAMILIES["chatml"]).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match=r"generation_config\.json .* copy the model again"):
        ChatFormat.load(tmp_path)


def test_what_begins_a_turn_does_not_end_one():
    turn = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '\n' }}"
    form = chatml("{% for m in messages %}" + turn + "{% endfor %}<|im_start|>assistant\n")
    assert form.tokenizer.convert_ids_to_tokens(form.end_of_turn_id) == "<|endoftext|>"


def test_an_end_of_turn_that_is_no_token_is_said():
    form = chatml(CHATML.replace("<|im_end|>", "<end>"))
    assert form.tokenizer.convert_ids_to_tokens(form.end_of_turn_id) == "<|endoftext|>"
    (note,) = of_template(form)
    assert "ends an answer with '<end>" in note and "<|endoftext|> ends it" in note


def test_no_token_of_the_template_pads():
    template = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}<|assistant|>"
    special = ("<|endoftext|>", "<|tool|>", "<|system|>", "<|user|>", "<|assistant|>")
    family = Family(f"{template}{{% if tools %}}<|tool|>{{% endif %}}", special, "")
    form = ChatFormat(bytes_tokenizer(family))
    assert form.tokenizer.pad_token == "<|pad|>"
    assert "<|endoftext|> ends it" in "".join(form.notes)  # and not what begins an answer


def test_an_end_of_turn_that_is_not_marked_special():
    tokenizer = bytes_tokenizer(FAMILIES["chatml"])
    tokenizer.add_tokens([AddedToken("<end>", special=False)])
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "<end>")
    form = ChatFormat(tokenizer)
    assert form.tokenizer.convert_ids_to_tokens(form.end_of_turn_id) == "<end>"
    assert form.response_ids("a <end> b").count(form.end_of_turn_id) == 1
    assert form.decode(form.response_ids("a")) == "a"


def test_a_finished_dialogue_that_differs_is_said():
    turn = CHATML_TURN.replace("m['role']", "('AI' if m['role'] == 'assistant' else m['role'])")
    form = chatml("{% for m in messages %}" + turn + "{% endfor %}" + CHATML_PROMPT)
    (note,) = of_template(form)
    assert "otherwise than its prompts" in note and "AI" in note and "assistant" in note


# All that ends an answer


@pytest.mark.parametrize(
    "files, ends",
    [
        ({"generation_config.json": {"eos_token_id": [256, 258]}}, ["<|im_end|>", "<|endoftext|>"]),
        ({"generation_config.json": {"eos_token_id": 257}}, ["<|im_end|>", "<|endoftext|>", "<|im_start|>"]),
        ({"generation_config.json": {"eos_token_id": [97, 9999]}}, ["<|im_end|>", "<|endoftext|>", "¤"]),
        ({"generation_config.json": {}}, ["<|im_end|>", "<|endoftext|>"]),
        ({"config.json": {"eos_token_id": 257}}, ["<|im_end|>", "<|endoftext|>", "<|im_start|>"]),
        ({"config.json": {"eos_token_id": 2}}, ["<|im_end|>", "<|endoftext|>"]),  # LlamaConfig has it by default
    ],
)
def test_generation_config_and_tokenizer_name_the_ends(tmp_path, files, ends):
    bytes_tokenizer(FAMILIES["chatml"]).save_pretrained(tmp_path)
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values))
    form = ChatFormat.load(tmp_path)
    assert form.tokenizer.convert_ids_to_tokens(list(form.end_ids)) == ends
    assert form.as_taught([1, 2, form.end_ids[1]]) == [1, 2, form.end_of_turn_id]
    assert form.as_taught([1, 2]) == [1, 2]


# Ids with gaps


def test_vocabulary_size_is_one_more_than_the_largest_id():
    family = Family(CHATML, ("<|im_end|>", "<|im_start|>"), "<|im_end|>")
    form = ChatFormat(bytes_tokenizer(family, {"<|im_start|>": 300, "<|im_end|>": 301}))
    assert len(form.tokenizer) == 259
    assert (form.pad_id, form.vocabulary_size) == (302, 303)


def test_a_new_pad_token_does_not_take_the_id_of_another():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = {letter: i for i, letter in enumerate(alphabet)}
    letters |= {"ab": len(alphabet) + 2, "<end>": 3000}  # 258 tokens, and the 259th would get the id of `ab`
    tokenizer = Tokenizer(models.BPE(letters, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHATML)
    made.eos_token = "<end>"
    with pytest.raises(UserError, match="no free id"):
        ChatFormat(made)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_template_of_a_reward_model_ends_where_it_is_read(formats, tmp_path, name):
    """Plain transformers makes of a finished dialogue, also as text, the tokens that training made; prompts stay."""
    form, family = formats[name], FAMILIES[name]
    form.save(tmp_path, scored=True)
    plain, again = AutoTokenizer.from_pretrained(tmp_path), ChatFormat.load(tmp_path)
    for turns in (1, 2, 3):
        messages = conversation(turns, system="" if family.refuses_system else "S")
        trained = apart(form, messages)
        assert apart(again, messages) == trained
        given = messages
        if name == "parts":
            given = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        finished = plain.apply_chat_template(given, return_dict=False)
        assert plain(plain.apply_chat_template(given, tokenize=False))["input_ids"] == finished
        assert finished[-1] == form.end_of_turn_id == plain.eos_token_id
        assert (finished == trained) == (name != "deepseek-r1") == (not scored_otherwise(again))
        prompt = plain.apply_chat_template(given[:-1], add_generation_prompt=True, return_dict=False)
        assert prompt == form.prompt_ids(messages[:-1])
    assert (
        "<think>" in scored_otherwise(again) if name == "deepseek-r1" else again.end_of_turn_id == form.end_of_turn_id
    )
    assert again.pad_id == form.pad_id != form.end_of_turn_id


def test_the_template_of_a_reward_model_says_the_date_of_training(tmp_path):
    dated = Family(
        "{{ strftime_now('%d %b %Y') }}" + CHATML, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<|im_end|>"
    )
    form = ChatFormat(bytes_tokenizer(dated))
    form.save(tmp_path, scored=True)
    finished = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(conversation(1), return_dict=False)
    assert finished == apart(form, conversation(1))
    again = ChatFormat.load(tmp_path)
    again.save(tmp_path / "again", scored=True)
    assert (tmp_path / "again" / "chat_template.jinja").read_text() == (tmp_path / "chat_template.jinja").read_text()
