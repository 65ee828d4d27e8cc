import torch

from inference.generation.cpu import Exactness
from inference.generation.kv_cache import CachePositions, KVCache

EXACT = Exactness(keys=4)
HEADS, HEAD = 2, 3


def test_a_cache_in_one_piece_is_as_long_as_its_longest_row_and_keeps_them_all():
    cache, rows = KVCache(3, 16, exact=EXACT), [torch.randn(HEADS, length, HEAD) for length in (3, 6)]
    cache.write_prompts(0, torch.cat(rows, dim=1), -torch.cat(rows, dim=1), [0, 1], [3, 6])
    lengths = []
    for step in range(8):
        if step == 4:  # the longer one has ended
            rows.pop()
        if step == 6:
            rows.append(torch.randn(HEADS, 13, HEAD))
            cache.write(1, 13, torch.cat([rows[1].flatten(), -rows[1].flatten()]))
        new = torch.randn(len(rows), HEADS, 1, HEAD)
        positions = CachePositions.of([row.shape[1] for row in rows], new.device, EXACT)
        cached, values = cache.append(0, new, -new, positions)
        rows = [torch.cat([row, token], dim=1) for row, token in zip(rows, new, strict=True)]
        for index, row in enumerate(rows):
            assert torch.equal(cached[index, :, : row.shape[1]], row)
        assert torch.equal(values, -cached)
        assert cached.is_contiguous() and cached.isfinite().all()
        lengths.append(cached.shape[2])
    assert lengths == [8, 8, 12, 12, 8, 12, 16, 16]
