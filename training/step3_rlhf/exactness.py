"""Does training compute what generation computed, to the bit? Tried on this processor before a run relies on it."""

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from inference.errors import UserError
from inference.families import longest_text, meta_model, text_config
from inference.generation.attention import PACKED_ATTENTION, can_pack
from inference.generation.cpu import BlockedWeights, CausalAttention, Exactness, plain_attention
from inference.generation.kv_cache import KVCache
from inference.generation.passes import PackedPasses
from inference.private_surfaces import set_attention
from inference.weights import quiet_transformers
from training.data.batching import TokenBatch
from training.distributed import Ranks
from training.models.policy import add_lora, call_on_tokens, keep_layers
from training.role_settings import LoRASettings
from training.stage import Stage
from training.step3_rlhf.planned import expects_exactness, generation_degree

CANDIDATES = {
    torch.bfloat16: (
        Exactness(keys=32),
        Exactness(keys=32, summed=128),
        Exactness(8, 8, 64, 128),
        Exactness(8, 8, 64, 128, blocked=False),
    ),
    torch.float32: (Exactness(8, 8, 16, 128, blocked=False), Exactness(8, 8, 64, 128, blocked=False)),
}
"""Those that are tried, the cheapest first. A vector of a processor holds up to 32 numbers: where keys do not fill the
last one, softmax and products add in another order."""
TENSOR_PARALLEL = "the ranks that generate together add up their parts of a sum, and training adds it up whole"
LAYERS = 2
PROMPTS = (70, 70, 41, 17, 6, 3, 2, 1)
"""Tokens; the first two are the same."""
DECODED = 8
QUERIES = 256
"""Queries that are tried one by one in attention as long as the run's."""


def settle_exactness(stage: Stage, actor: Path) -> Exactness | None:
    """Return how the run makes training equal to generation; None where it leaves them a rounding apart.

    All ranks call it. Raises UserError where equality is asked for and impossible.
    """
    settings, device = stage.config.rlhf, stage.ranks.device
    if not expects_exactness(settings, stage.dtype, device):
        return None
    model = meta_model(AutoConfig.from_pretrained(actor, local_files_only=True))
    if device.type != "cpu":
        reason = "on a GPU a sum's order depends on what is computed beside it"
    elif generation_degree(settings) > 1:
        reason = TENSOR_PARALLEL
    elif not can_pack(model):
        reason = f"models of the family {model.config.model_type} do not run without padding here"
    else:
        exact = find_exactness(model, settings.actor.lora, stage.dtype, stage.config.data.longest, stage.ranks)
        if exact is not None:
            return exact
        reason = f"this processor's products in {stage.dtype} depend on what is computed beside them"
    if settings.exact is True:
        raise UserError(f"rlhf.exact=true, but {reason}; take rlhf.exact=auto.")
    stage.display.say(f"PPO: generation and training will be a rounding apart: {reason}")
    return None


def find_exactness(
    model: PreTrainedModel, lora: LoRASettings | None, dtype: torch.dtype, longest: int, ranks: Ranks
) -> Exactness | None:
    """Find what makes decoding, prefill, scoring and training agree to the bit on the processors of all ranks; None
    where nothing known does. Tried with random weights on the first layers of the model's shape, and with attention
    over `longest` tokens; `model` itself is left alone. All ranks call it."""
    candidates = CANDIDATES.get(dtype, ()) if ranks.device.type == "cpu" and can_pack(model) else ()
    if not candidates:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = first_layers(model, lora, dtype)
        return next((exact for exact in candidates if all(ranks.gather(agrees(shape, exact, longest)))), None)


def first_layers(model: PreTrainedModel, lora: LoRASettings | None, dtype: torch.dtype) -> PreTrainedModel:
    """Make a small model of the same family and sizes, with adapters that are not 0."""
    config: PreTrainedConfig = copy.deepcopy(model.config)
    keep_layers(config, min(LAYERS, text_config(config).num_hidden_layers))
    with quiet_transformers():
        small: Any = type(model)(config)
    if lora is not None and lora.rank:
        add_lora(small, lora)
    for parameter in small.parameters():
        if parameter.dim() > 1:  # the adapters' second half begins at 0
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    set_attention(small.config, PACKED_ATTENTION)
    return small.to(dtype).eval()


def agrees(model: PreTrainedModel, exact: Exactness, longest: int) -> bool:
    """Try whether all passes give the same bits: prefill, decoding in batches that change, and training's forward pass
    over samples that begin alike, over some of like length and over all."""
    most = min(longest, longest_text(model.config) or longest)
    steps = min(DECODED, most // 2)
    lengths = [min(length, most - steps) for length in PROMPTS]
    rows = [torch.randint(text_config(model.config).vocab_size, (length + steps,)) for length in lengths]
    rows[1][: lengths[1]] = rows[0][: lengths[0]]
    cache = KVCache(len(rows), exact.seen(max(lengths) + steps), exact=exact)
    passes = PackedPasses(model, cache, exact)
    generated: dict[tuple[int, int], Tensor] = {}  # (slot, step) -> logits
    weights = BlockedWeights(model).in_use() if exact.blocked else nullcontext()
    with torch.inference_mode(), weights:
        for slots in ([0], range(1, len(rows))):
            prompts = [rows[slot][: lengths[slot]] for slot in slots]
            generated |= zip([(slot, 0) for slot in slots], passes.prefill(prompts, list(slots)), strict=True)
        for step in range(steps):
            slots = range(max(1, len(rows) - step))
            tokens = torch.stack([rows[slot][lengths[slot] + step] for slot in slots])
            logits = passes.decode(tokens, [lengths[slot] + step for slot in slots])
            generated |= zip([(slot, step + 1) for slot in slots], logits, strict=True)
    for count in (2, len(rows)):
        batch = TokenBatch.of([(row[:1], row[1:]) for row in rows[:count]], torch.device("cpu"))
        starts = [sum(batch.lengths[:slot]) + lengths[slot] - 1 for slot in range(count)]
        decoded = {key: logits for key, logits in generated.items() if key[0] < count}
        at = torch.tensor([starts[slot] + step for slot, step in decoded])
        if not torch.equal(torch.stack(list(decoded.values())), call_on_tokens(model, batch, at, exact)):
            return False
    return attention_agrees(cache, text_config(model.config).num_attention_heads, exact, longest)


def attention_agrees(cache: KVCache, heads: int, exact: Exactness, longest: int) -> bool:
    """Try whether single queries, over as many keys as they see and over all of them, give what whole sequences give;
    key heads are those that filled `cache`."""
    keys = next(iter(cache.keys.values()))
    groups, head, dtype = keys.shape[1], keys.shape[-1], keys.dtype
    sharing = heads // groups
    length = max(longest, 2)
    key, value = (torch.randn(1, groups, exact.seen(length), head).to(dtype) for _ in range(2))
    query = torch.randn(1, groups, sharing, length, head).to(dtype)
    key[:, :, length:], value[:, :, length:] = 0, 0
    scale = head**-0.5
    whole = CausalAttention.apply(query, key[:, :, :length], value[:, :, :length], scale, None, exact)
    for position in torch.randint(length, (QUERIES,)).tolist():
        one_query = query[..., position, :] * scale
        for seen in (exact.seen(position + 1), exact.seen(length)):
            mask = torch.zeros(seen, dtype=dtype)
            mask[position + 1 :] = -torch.inf
            alone = plain_attention(one_query, key[:, :, :seen], value[:, :, :seen], mask, exact)
            if not torch.equal(alone, whole[..., position, :]):
                return False
    return True
