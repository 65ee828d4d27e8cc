# ruff: noqa: E501  (a template is read better unbroken)
"""Chat templates in the manner of well-known families, written for these tests, with the tokens that each needs."""

from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

ALTERNATE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user and assistant') }}{% endif %}{% endfor %}"
)
CHATML_TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
CHATML_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = "{% for m in messages %}" + CHATML_TURN + "{% endfor %}" + CHATML_PROMPT


@dataclass(frozen=True)
class Family:
    template: str
    special: tuple[str, ...]
    """The first one is the end of a text."""
    end: str
    """What ends a turn."""
    begin: str = ""
    """What the tokenizer puts before each text."""
    refuses_system: bool = False
    finished: str = ""
    """`system` (where it is taken), one question `Q` and its answer `A`, written out by hand."""
    prompt_end: str = ""
    """What a prompt ends with."""


def bytes_tokenizer(family: Family, ids: dict[str, int] | None = None, **more: Any) -> PreTrainedTokenizerFast:
    """256 letters and the special tokens, some with `ids` of their own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)} | (ids or {}), []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in family.special])
    if family.begin:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{family.begin} $A", special_tokens=[(family.begin, tokenizer.token_to_id(family.begin))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=family.special[0],
        bos_token=family.begin or None,
        chat_template=family.template or None,
        **more,
    )


FAMILIES = {
    "chatml": Family(
        CHATML,
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
        finished="<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>",
        prompt_end="<|im_start|>assistant\n",
    ),
    "llama-2": Family(
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
        "{% set system_message = false %}{% endif %}{% for m in loop_messages %}"
        "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if loop.index0 == 0 and system_message != false %}"
        "{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + m['content'] %}"
        "{% else %}{% set content = m['content'] %}{% endif %}"
        "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        ("</s>", "<s>", "<unk>"),
        "</s>",
        begin="<s>",
        finished="<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ [/INST] A </s>",
        prompt_end=" [/INST]",
    ),
    "llama-3": Family(
        "{% for m in messages %}{% set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
        "m['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
        "{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        ("<|end_of_text|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
        begin="<|begin_of_text|>",
        finished="<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user"
        "<|end_header_id|>\n\nQ<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>",
        prompt_end="<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "llama-3.1": Family(
        "{{- bos_token }}\n{%- if not date_string is defined %}\n{%- if strftime_now is defined %}\n"
        '{%- set date_string = strftime_now("%d %b %Y") %}\n{%- else %}\n{%- set date_string = "26 Jul 2024" %}\n'
        "{%- endif %}\n{%- endif %}\n{%- if messages[0]['role'] == 'system' %}\n"
        "{%- set system_message = messages[0]['content']|trim %}\n{%- set messages = messages[1:] %}\n{%- else %}\n"
        '{%- set system_message = "" %}\n{%- endif %}\n{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}\n'
        '{{- "Today Date: " + date_string + "\\n\\n" }}\n{{- system_message }}\n{{- "<|eot_id|>" }}\n'
        "{%- for message in messages %}\n{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
        "+ message['content'] | trim + '<|eot_id|>' }}\n{%- endfor %}\n{%- if add_generation_prompt %}\n"
        "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n",
        ("<|end_of_text|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
        begin="<|begin_of_text|>",
        finished="<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\nS<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        "A<|eot_id|>",
        prompt_end="<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "mistral": Family(
        "{{ bos_token }}" + ALTERNATE + "{% for m in messages %}"
        "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token + ' ' }}{% endif %}{% endfor %}",
        ("</s>", "<s>", "<unk>"),
        "</s>",
        begin="<s>",
        refuses_system=True,
        finished="<s>[INST] Q [/INST]A</s>",
        prompt_end=" [/INST]",
    ),
    "gemma": Family(
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}" + ALTERNATE + "{% for m in messages %}{% if m['role'] == 'assistant' %}{% set role = 'model' %}"
        "{% else %}{% set role = m['role'] %}{% endif %}"
        "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
        ("<eos>", "<bos>", "<pad>", "<start_of_turn>", "<end_of_turn>"),
        "<end_of_turn>",
        begin="<bos>",
        refuses_system=True,
        finished="<bos><start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>",
        prompt_end="<start_of_turn>model\n",
    ),
    "phi-3": Family(
        "{% for m in messages %}{% if m['role'] == 'system' %}{{'<|system|>\n' + m['content'] + '<|end|>\n'}}"
        "{% elif m['role'] == 'user' %}{{'<|user|>\n' + m['content'] + '<|end|>\n'}}"
        "{% elif m['role'] == 'assistant' %}{{'<|assistant|>\n' + m['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "<|end|>",
        finished="<|system|>\nS<|end|>\n<|user|>\nQ<|end|>\n<|assistant|>\nA<|end|>",
        prompt_end="<|assistant|>\n",
    ),
    "qwen-2.5": Family(
        "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
        "{%- else %}{{- '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{%- endif %}{%- for m in messages %}"
        '{%- if (m.role == "user") or (m.role == "system" and not loop.first) or (m.role == "assistant") %}'
        "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}",
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
        finished="<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>",
        prompt_end="<|im_start|>assistant\n",
    ),
    "qwen-3": Family(
        "{%- set ns = namespace(last=0) %}{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}"
        "{%- endif %}{%- endfor %}{%- for m in messages %}{%- if m.role == 'assistant' %}{%- set content = m.content %}"
        "{%- set thought = '' %}{%- if '</think>' in m.content %}{%- set content = m.content.split('</think>')[-1]."
        "lstrip('\n') %}{%- set thought = m.content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
        "{%- endif %}{%- if loop.index0 > ns.last and (loop.last or thought) %}"
        "{{- '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
        "{%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}{{- '<|im_end|>\n' }}"
        "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
        "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
        "{%- endif %}",
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
        finished="<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
        "<think>\n\n</think>\n\nA<|im_end|>",
        prompt_end="<|im_start|>assistant\n",
    ),
    "deepseek-r1": Family(
        "{% set ns = namespace(system='') %}{%- for m in messages %}{%- if m['role'] == 'system' %}"
        "{%- set ns.system = m['content'] %}{%- endif %}{%- endfor %}{{bos_token}}{{ns.system}}{%- for m in messages %}"
        "{%- if m['role'] == 'user' %}{{'<|User|>' + m['content']}}{%- endif %}{%- if m['role'] == 'assistant' %}"
        "{% set content = m['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}"
        "{% endif %}{{'<|Assistant|>' + content + '<|end_of_sentence|>'}}{%- endif %}{%- endfor -%}"
        "{% if add_generation_prompt %}{{'<|Assistant|><think>\\n'}}{% endif %}",
        ("<|end_of_sentence|>", "<|begin_of_sentence|>", "<|User|>", "<|Assistant|>"),
        "<|end_of_sentence|>",
        begin="<|begin_of_sentence|>",
        finished="<|begin_of_sentence|>S<|User|>Q<|Assistant|><think>\n\n</think>\n\nA<|end_of_sentence|>",
        prompt_end="<|Assistant|><think>\n",
    ),
    "zephyr": Family(
        "{% for m in messages %}\n{% if m['role'] == 'user' %}\n{{ '<|user|>\n' + m['content'] + eos_token }}\n"
        "{% elif m['role'] == 'system' %}\n{{ '<|system|>\n' + m['content'] + eos_token }}\n"
        "{% elif m['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + m['content'] + eos_token }}\n{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
        ("</s>", "<s>", "<unk>"),
        "</s>",
        finished="<|system|>\nS</s>\n<|user|>\nQ</s>\n<|assistant|>\nA</s>",
        prompt_end="<|assistant|>\n",
    ),
    "opt": Family(
        "",
        ("</s>", "<pad>"),
        "</s>",
        begin="</s>",
        finished="</s>S\n\nHuman: Q\n\nAssistant: A</s>",
        prompt_end="Assistant:",
    ),
    "parts": Family(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% for part in m['content'] %}"
        "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
        + CHATML_PROMPT,
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
        finished="<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>",
        prompt_end="<|im_start|>assistant\n",
    ),
    "no prompt": Family(
        "{% for m in messages %}" + CHATML_TURN + "{% endfor %}\n",
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
        finished="<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>",
        prompt_end="<|im_start|>assistant\n",
    ),
    "open thought": Family(  # the prompt begins a thought that finished dialogues have too
        "{% for m in messages %}{% if m.role == 'assistant' %}{% set c = m.content.split('</think>')[-1].lstrip('\n') %}"
        "{% set t = m.content.split('</think>')[0].split('<think>')[-1].strip() if '</think>' in m.content else '' %}"
        "{{ '<|im_start|>assistant\n' }}{% if loop.last %}{{ '<think>\n' + t + '\n</think>\n\n' }}{% endif %}"
        "{{ c + '<|im_end|>\n' }}{% else %}" + CHATML_TURN + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
        finished="<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
        "<think>\n\n</think>\n\nA<|im_end|>",
        prompt_end="<|im_start|>assistant\n<think>\n",
    ),
    "channels": Family(  # as gpt-oss: a finished answer has a channel, which the model writes
        "{% for m in messages %}{{ '<|start|>' + m.role }}{% if m.role == 'assistant' %}{{ '<|channel|>final' }}{% endif %}"
        "{{ '<|message|>' + m.content }}{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
        ("<|endoftext|>", "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"),
        "<|return|>",
        finished="<|start|>system<|message|>S<|end|><|start|>user<|message|>Q<|end|><|start|>assistant"
        "<|channel|>final<|message|>A<|return|>",
        prompt_end="<|start|>assistant",
    ),
}
