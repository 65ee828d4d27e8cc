#!/bin/bash
# Makes tests/data/old_run: a run directory of commit 6d4be00, finished, with the checkpoint in the middle of each step.
# The arguments are a checkout of that commit (git worktree add DIRECTORY 6d4be00) and a python that runs it.
set -e
checkout=$(realpath "$1") python=$(realpath -s "$2") target=$(realpath "$(dirname "$0")")/old_run
place=$(mktemp -d); trap 'rm -rf "$place"' EXIT; cd "$place"
export PYTHONPATH=$checkout PYTHONSAFEPATH=1 OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu DS_BUILD_OPS=0
"$python" - <<'END'
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from inference.chat_format import DEFAULT_TEMPLATE

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.add_special_tokens(["<pad>", "</s>"])
PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>").save_pretrained("model")
torch.manual_seed(6)
sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
config = OPTConfig(vocab_size=258, max_position_embeddings=96, dropout=0.0, pad_token_id=256, eos_token_id=257,
                   bos_token_id=None, **sizes)
OPTForCausalLM(config).save_pretrained("model")
words = "red blue green tea sun rain bread stone river cloud paper song door lamp grass ship".split()
pairs = [{"prompt": f"Say {a} {i}.", "chosen": f"{a}!", "rejected": f"{words[i % 16 - 3]}."} for i, a in enumerate(words * 2)]
Path("pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
END
small=(threads=1 dtype=fp32 data.max_prompt_tokens=40 data.max_response_tokens=8 evaluation.prompts=2 evaluation.rows=2
    rlhf.iterations=2 rlhf.checkpoint_every=1 rlhf.keep_checkpoints=2 rlhf.prompts_per_iteration=4 rlhf.mini_batches=1
    rlhf.samples_every=1 rlhf.sample_prompts=1 rlhf.generation_batch=4)
for step in sft reward; do
    small+=("$step.max_steps=2" "$step.batch_size=2" "$step.eval_every=1" "$step.eval_rows=4" "$step.checkpoint_every=1"
        "$step.keep_checkpoints=2")
done
"$python" -c 'import sys; sys.argv[0] = "rlhf-chat"; from applications.cli import main; main()' \
    run --model model --data pairs.jsonl --name old "${small[@]/#/--set=}"
mv runs/old run && rmdir runs
rm -rf run/*/checkpoints/2 run/log.txt run/*/log.txt run/.lock run/*/.lock
grep -rl --include=*.yaml --include=*.json --include=*.html "$place" . | xargs sed -i "s#$place#/home/me#g"
rm -rf "$target" && cp -r "$place" "$target"
