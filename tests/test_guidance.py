"""Guidance against diffusers' latent consistency pipeline and against its definition."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import LatentConsistencyModelPipeline
from parity import relative_error

from mlx_cm.guidance import classifier_free_guidance, guidance_embedding, w_from_guidance_scale

SCALES = (1.0, 1.5, 4.0, 7.5, 8.5)


@pytest.mark.parametrize("width", [256, 32, 7])
def test_embedding_is_the_pipelines(width):
    ours = guidance_embedding(w_from_guidance_scale(mx.array(SCALES)), width)
    theirs = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, torch.tensor(SCALES) - 1, width)
    assert ours.dtype == mx.float32
    assert relative_error(ours, theirs) < 1e-4


def test_embedding_is_float32_whatever_w_is():
    scales = [2.0, 8.5]  # exact in half precision
    half = guidance_embedding(mx.array(scales, mx.float16), 16)
    assert half.dtype == mx.float32
    assert mx.array_equal(half, guidance_embedding(mx.array(scales), 16))


def test_no_guidance_is_w_zero():
    assert w_from_guidance_scale(1.0) == 0
    assert np.array_equal(np.array(guidance_embedding(mx.zeros(1), 6)), [[0, 0, 0, 1, 1, 1]])


def test_classifier_free_guidance_is_linear_in_the_scale():
    cond, uncond = mx.array([1.0, -2.0, 0.5]), mx.array([0.5, 1.0, 0.5])
    assert mx.array_equal(classifier_free_guidance(cond, uncond, 1.0), cond)
    assert mx.array_equal(classifier_free_guidance(cond, uncond, 0.0), uncond)
    w = w_from_guidance_scale(7.5)
    published = (1 + w) * cond - w * uncond
    assert mx.allclose(classifier_free_guidance(cond, uncond, 7.5), published, atol=1e-5)
