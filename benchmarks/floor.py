"""The floor: a hand-written OPT that does the work and nothing else, as a measure of what eager torch can reach.

Key-value cache allocated in advance, ended rows swapped out of the batch, sampling by inverting the cumulative
distribution with the log-probability kept, scoring and training on packed rows without padding, the output head on
response tokens only, fused AdamW. No advantages, no metrics, no checks, random targets: times are all it is good for.

    python -m benchmarks.floor --size s --lengths skew --dtype bf16 --attention fp32 --part gen score train

With --alone there is no critic and no reward model: the work of GRPO and RLOO; with --rows it is that of SFT or DPO.
"""

import argparse
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import work
from benchmarks.turns import Channel, measured, print_medians
from benchmarks.work import END_ID, LENGTHS, PROMPT_TOKENS, SAMPLES, SIZES, Size

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
POSITION_OFFSET = 2  # OPT's embeddings of positions begin with two that are not used
CLIP = 0.2

Cache = list[tuple[Tensor, Tensor]]  # a layer: keys and values, each (rows, heads, positions, head)


@dataclass
class Layer:
    attention_norm: tuple[Tensor, Tensor]  # weight, bias; so all
    qkv: tuple[Tensor, Tensor]
    out: tuple[Tensor, Tensor]
    mlp_norm: tuple[Tensor, Tensor]
    up: tuple[Tensor, Tensor]
    down: tuple[Tensor, Tensor]

    def tensors(self) -> list[Tensor]:
        return [*self.attention_norm, *self.qkv, *self.out, *self.mlp_norm, *self.up, *self.down]


@dataclass
class Packed:
    """Samples one after another, without padding."""

    ids: Tensor  # (tokens) int64
    positions: Tensor  # (tokens) int64
    bounds: list[tuple[int, int]]
    """Where each sample begins and ends."""
    predicting: Tensor  # (response tokens) int64: where the token before each response token stands


class Floor:
    """The weights of one OPT; attention and its cache may be in another dtype than the matrix products."""

    def __init__(self, directory: Path, size: Size, dtype: torch.dtype, attention_dtype: torch.dtype, trained=False):
        from safetensors.torch import load_file

        self.size, self.dtype, self.attention_dtype = size, dtype, attention_dtype
        self.head = size.hidden // size.heads
        stored = load_file(directory / "model.safetensors")
        root = next(name for name in stored if name.endswith("decoder.embed_tokens.weight")).removesuffix(
            "embed_tokens.weight"
        )

        def get(name: str) -> Tensor:
            return stored[root + name].to(dtype, copy=True).contiguous()

        def pair(name: str) -> tuple[Tensor, Tensor]:
            return get(f"{name}.weight"), get(f"{name}.bias")

        def layer(name: str) -> Layer:
            q, k, v = (pair(f"{name}.self_attn.{which}_proj") for which in "qkv")
            qkv = torch.cat([q[0], k[0], v[0]]), torch.cat([q[1], k[1], v[1]])
            attention_norm = pair(f"{name}.self_attn_layer_norm")
            out, mlp_norm = pair(f"{name}.self_attn.out_proj"), pair(f"{name}.final_layer_norm")
            return Layer(attention_norm, qkv, out, mlp_norm, pair(f"{name}.fc1"), pair(f"{name}.fc2"))

        self.embedding, self.position_embedding = get("embed_tokens.weight"), get("embed_positions.weight")
        self.final_norm = pair("final_layer_norm")
        self.layers = [layer(f"layers.{place}") for place in range(size.layers)]
        if trained:
            for tensor in self.tensors():
                tensor.requires_grad_(True)

    def tensors(self) -> list[Tensor]:
        layers = [tensor for layer in self.layers for tensor in layer.tensors()]
        return [self.embedding, self.position_embedding, *self.final_norm, *layers]

    def new_cache(self, rows: int, positions: int) -> Cache:
        shape = (rows, self.size.heads, positions, self.head)
        dtype = self.attention_dtype
        return [(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for _ in self.layers]

    def forward(self, packed: Packed, cache: Cache | None = None) -> Tensor:
        """Last hidden states (tokens, hidden). A `cache` is filled; all samples are then of the same length."""
        x = self.embedding[packed.ids] + self.position_embedding[packed.positions + POSITION_OFFSET]
        for place, layer in enumerate(self.layers):
            qkv = F.linear(self._norm(x, layer.attention_norm), *layer.qkv).to(self.attention_dtype)
            qkv = qkv.view(-1, 3, self.size.heads, self.head)
            if len({end - begin for begin, end in packed.bounds}) > 1:
                attended = torch.cat([self._attend(qkv[begin:end], 1)[0] for begin, end in packed.bounds])
            else:
                attended, keys, values = self._attend(qkv, len(packed.bounds))
                if cache is not None:
                    rows, _, length, _ = keys.shape
                    cache[place][0][:rows, :, :length] = keys
                    cache[place][1][:rows, :, :length] = values
            x = self._mlp(layer, x + F.linear(attended.to(self.dtype), *layer.out))
        return self._norm(x, self.final_norm)

    def decode(self, tokens: Tensor, position: int, cache: Cache) -> Tensor:
        """One more token (rows) for every row, all at the same position; logits (rows, vocabulary)."""
        rows = len(tokens)
        x = self.embedding[tokens] + self.position_embedding[position + POSITION_OFFSET]
        for layer, (keys, values) in zip(self.layers, cache, strict=True):
            qkv = F.linear(self._norm(x, layer.attention_norm), *layer.qkv).to(self.attention_dtype)
            q, k, v = qkv.view(rows, 3, self.size.heads, 1, self.head).unbind(1)
            keys[:rows, :, position : position + 1] = k
            values[:rows, :, position : position + 1] = v
            attended = F.scaled_dot_product_attention(
                q, keys[:rows, :, : position + 1], values[:rows, :, : position + 1]
            )
            attended = attended.reshape(rows, self.size.hidden).to(self.dtype)
            x = self._mlp(layer, x + F.linear(attended, *layer.out))
        return self.logits(self._norm(x, self.final_norm))

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embedding)

    def logprobs(self, packed: Packed) -> Tensor:
        """Of the response tokens, float32."""
        logits = self.logits(self.forward(packed)[packed.predicting]).float()
        targets = packed.ids[packed.predicting + 1]
        return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)

    def _attend(self, qkv: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Causal attention of rows of equal length, (tokens, 3, heads, head) -> (tokens, hidden); and keys, values."""
        q, k, v = qkv.view(rows, -1, 3, self.size.heads, self.head).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return attended.transpose(1, 2).reshape(-1, self.size.hidden), k, v

    def _mlp(self, layer: Layer, x: Tensor) -> Tensor:
        return x + F.linear(F.relu(F.linear(self._norm(x, layer.mlp_norm), *layer.up)), *layer.down)

    def _norm(self, x: Tensor, parameters: tuple[Tensor, Tensor]) -> Tensor:
        return F.layer_norm(x, (self.size.hidden,), *parameters)


def pack(prompts: Tensor | Sequence[Tensor], responses: Sequence[Tensor]) -> Packed:
    """Prompts (rows, prompt tokens), or (length) each, with the response of each (length)."""
    rows = [torch.cat(row) for row in zip(prompts, responses, strict=True)]
    bounds, predicting, begin = [], [], 0
    for row, response in zip(rows, responses, strict=True):
        end = begin + len(row)
        bounds.append((begin, end))
        predicting.append(torch.arange(end - len(response) - 1, end - 1))
        begin = end
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    return Packed(torch.cat(rows), positions, bounds, torch.cat(predicting))


def sample(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (rows) and their log-probabilities; never the end token, since the length is forced."""
    logits = logits.float()
    logits[:, END_ID] = -torch.inf
    probabilities = logits.softmax(-1)
    cumulative = probabilities.cumsum(-1)
    threshold = torch.rand(len(logits), 1) * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, threshold).clamp_(max=logits.shape[1] - 1)
    return tokens[:, 0], probabilities.gather(1, tokens).log()[:, 0]


@torch.inference_mode()
def generate(model: Floor, prompts: Tensor, lengths: list[int], cache: Cache) -> list[tuple[Tensor, Tensor]]:
    """Tokens and log-probabilities of each response, both (length); the last token is the end token."""
    rows, width = prompts.shape
    whole = pack(prompts, [prompts[0, :0]] * rows)
    hidden = model.forward(whole, cache).view(rows, width, -1)
    logits = model.logits(hidden[:, -1])
    tokens = torch.full((rows, max(lengths)), END_ID)
    logprobs = torch.zeros(rows, max(lengths))
    slots = list(range(rows))  # slots[row] is the sample that the row decodes
    step = 0
    while True:
        drawn, drawn_logprobs = sample(logits)
        running = torch.tensor(slots)
        tokens[running, step], logprobs[running, step] = drawn, drawn_logprobs
        keep = list(range(len(slots)))
        row = 0
        while row < len(slots):
            if lengths[slots[row]] > step + 1:
                row += 1
                continue
            last, source = slots.pop(), keep.pop()  # the last row moves into the hole
            if row < len(slots):
                slots[row], keep[row] = last, source
                for keys, values in cache:
                    keys[row, :, : width + step] = keys[len(slots), :, : width + step]
                    values[row, :, : width + step] = values[len(slots), :, : width + step]
        if not slots:
            break
        if keep != list(range(len(drawn))):
            drawn = drawn[torch.tensor(keep)]
        logits = model.decode(drawn, width + step, cache)
        step += 1
    for place, length in enumerate(lengths):
        tokens[place, length - 1] = END_ID
    return [(tokens[place, :length], logprobs[place, :length]) for place, length in enumerate(lengths)]


class FloorIteration:
    """All four roles; the phases of one iteration."""

    def __init__(self, size: str, dtype: torch.dtype, attention_dtype: torch.dtype, longest: int, alone: bool = False):
        """`alone`: actor and reference are."""
        self.alone = alone
        directories, shape = work.models(size), SIZES[size]
        self.actor = Floor(directories.actor, shape, dtype, attention_dtype, trained=True)
        self.critic = Floor(directories.reward, shape, dtype, attention_dtype, trained=True)
        self.reference = Floor(directories.actor, shape, dtype, attention_dtype)
        self.reward = Floor(directories.reward, shape, dtype, attention_dtype)
        self.score_head = (torch.randn(1, shape.hidden) * 0.02).to(dtype)
        self.value_head = self.score_head.clone().requires_grad_(True)
        rate = work.LEARNING_RATE
        self.actor_optimizer = torch.optim.AdamW(self.actor.tensors(), lr=rate, fused=True)
        self.critic_optimizer = torch.optim.AdamW([*self.critic.tensors(), self.value_head], lr=rate, fused=True)
        self.cache = self.actor.new_cache(SAMPLES, PROMPT_TOKENS + longest)

    def generate(self, prompts: Tensor, lengths: list[int]) -> list[tuple[Tensor, Tensor]]:
        return generate(self.actor, prompts, lengths, self.cache)

    @torch.inference_mode()
    def score(self, prompts: Tensor, responses: list[Tensor]) -> None:
        packed = pack(prompts, responses)
        self.reference.logprobs(packed)
        if self.alone:
            return
        F.linear(self.critic.forward(packed)[packed.predicting], self.value_head)
        F.linear(self.reward.forward(packed), self.score_head)

    def train(self, prompts: Tensor, responses: list[tuple[Tensor, Tensor]]) -> None:
        each = SAMPLES // work.MINI_BATCHES
        for first in range(0, SAMPLES, each):
            rows = responses[first : first + each]
            packed = pack(prompts[first : first + each], [tokens for tokens, _ in rows])
            old = torch.cat([logprobs for _, logprobs in rows])
            advantages = torch.randn(len(old))
            ratio = (self.actor.logprobs(packed) - old).exp()
            clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
            torch.maximum(-advantages * ratio, -advantages * clipped).mean().backward()
            self.actor_optimizer.step()
            self.actor_optimizer.zero_grad()
            if self.alone:
                continue
            values = F.linear(self.critic.forward(packed)[packed.predicting], self.value_head)[:, 0].float()
            (0.5 * (values - advantages).square().mean()).backward()
            self.critic_optimizer.step()
            self.critic_optimizer.zero_grad()

    def fit(self, method: str) -> dict[str, float]:
        """An optimiser step of SFT or DPO on all rows, without DPO's loss; seconds by phase."""
        given = work.demonstrations() if method == "sft" else work.pairs()
        rows = [(prompt, answer) for prompt, *answers in given for answer in answers]
        batches = [pack(*zip(*rows[first : first + 8], strict=True)) for first in range(0, len(rows), 8)]
        begun = time.perf_counter()
        with torch.inference_mode():
            for packed in batches if method == "dpo" else ():
                self.reference.logprobs(packed)
        scored = time.perf_counter()
        for packed in batches:
            (self.actor.logprobs(packed).sum() * -1e-4).backward()
        self.actor_optimizer.step()
        self.actor_optimizer.zero_grad()
        ended = time.perf_counter()
        seconds = {"generate": 0.0, "score": scored - begun, "train": ended - scored, "total": ended - begun}
        return {**seconds, "tokens": sum(len(packed.ids) for packed in batches)}

    def iterate(self, prompts: Tensor, lengths: list[int], parts: list[str]) -> dict[str, float]:
        """Seconds by phase. Parts that are left out get a stand-in for what they would have made."""
        times = [time.perf_counter()]
        if "gen" in parts:
            made = self.generate(prompts, lengths)
        else:
            made = [(torch.full((length,), END_ID), torch.zeros(length)) for length in lengths]
        made = [(tokens.clone(), logprobs.clone()) for tokens, logprobs in made]  # no longer inference tensors
        times.append(time.perf_counter())
        if "score" in parts:
            self.score(prompts, [tokens for tokens, _ in made])
        times.append(time.perf_counter())
        if "train" in parts:
            self.train(prompts, made)
        times.append(time.perf_counter())
        generated, scored, trained = (after - before for before, after in itertools.pairwise(times))
        seconds = {"generate": generated, "score": scored, "train": trained, "total": times[-1] - times[0]}
        return {**seconds, "tokens": sum(len(tokens) for tokens, _ in made)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="s")
    parser.add_argument("--lengths", choices=list(LENGTHS), default="skew")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument(
        "--attention", choices=list(DTYPES), help="dtype of attention and its cache; else that of --dtype"
    )
    parser.add_argument("--part", nargs="+", choices=["gen", "score", "train"], default=["gen", "score", "train"])
    parser.add_argument("--rows", choices=["sft", "dpo"], help="one optimiser step on the rows of the supervised work")
    parser.add_argument("--alone", action="store_true", help="actor and reference only")
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", action="store_true", help="wait to be asked for each iteration (ppo_iteration.py)")
    arguments = parser.parse_args()
    channel = Channel() if arguments.turns else None
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(work.SEED)
    lengths, iterations = LENGTHS[arguments.lengths], arguments.iterations
    attention = arguments.attention or arguments.dtype
    floor = FloorIteration(arguments.size, DTYPES[arguments.dtype], DTYPES[attention], lengths.longest, arguments.alone)
    prompts = work.prompts(iterations + 1).view(iterations + 1, SAMPLES, PROMPT_TOKENS)

    def iterate(number: int) -> dict[str, float]:
        if arguments.rows:
            return floor.fit(arguments.rows)
        return floor.iterate(prompts[number], lengths.of(number), arguments.part)

    what = f"weights and AdamW in {arguments.dtype}, attention in {attention}"
    print_medians(measured(what, iterate, iterations, channel)[1:])


if __name__ == "__main__":
    main()
