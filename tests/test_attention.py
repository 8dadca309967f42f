"""Attention with masks: the back end's one function against torch, and against itself between kinds of mask."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from parity import relative_error

from mlx_cm import backend

FLOATS = [mx.float32, mx.float16, mx.bfloat16]


def heads(seed: int, batch: int, tokens: int) -> torch.Tensor:
    return torch.randn((batch, 3, tokens, 8), generator=torch.Generator().manual_seed(seed))


def masks(batch: int, queries: int, keys: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    seen = torch.rand((batch, 1, queries, keys), generator=generator) > 0.4
    seen[..., 0] = True
    return {
        "boolean": seen,
        "added": torch.where(seen, 0.5, -1e9),
        "infinite": torch.where(seen, 0.0, -torch.inf),
        "per key": torch.randn((batch, 1, 1, keys), generator=generator),
    }


@pytest.mark.parametrize("kind", masks(1, 1, 1))
def test_masks_agree_with_torch(kind):
    q, k, v = heads(0, 2, 5), heads(1, 2, 7), heads(2, 2, 7)
    mask = masks(2, 5, 7)[kind]
    ours = backend.attention(*(mx.array(part.numpy()) for part in (q, k, v)), 0.3, mx.array(mask.numpy()))
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)
    assert relative_error(ours.reshape(2, -1), theirs.reshape(2, -1)) < 1e-5


def test_causal_agrees_with_torch():
    q, k, v = (heads(seed, 2, 6) for seed in range(3))
    ours = backend.attention(*(mx.array(part.numpy()) for part in (q, k, v)), 0.3, "causal")
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    assert relative_error(ours.reshape(2, -1), theirs.reshape(2, -1)) < 1e-5


@pytest.mark.parametrize("mask_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_row_that_sees_nothing_stays_finite(dtype, mask_dtype):
    q, k, v = ((mx.array(heads(seed, 2, 6).numpy()) * 20).astype(dtype) for seed in range(3))
    mask = mx.zeros((2, 1, 6, 6))
    mask[0, 0, 3] = -mx.inf
    mask[1, 0, :, 4] = -1e9  # beyond float16
    out = backend.attention(q, k, v, 1.0, mask.astype(mask_dtype))
    assert out.dtype == dtype
    assert np.isfinite(np.array(out.astype(mx.float32))).all()
    boolean = backend.attention(q, k, v, 1.0, mask == 0)
    assert mx.array_equal(out[1], boolean[1])
