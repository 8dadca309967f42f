"""Guidance: how strongly the prompt pulls, either baked into the network through w or applied to its outputs."""

import mlx.core as mx

from mlx_cm.models.layers import sinusoidal_embedding


def w_from_guidance_scale(guidance_scale: float | mx.array) -> float | mx.array:
    """The w of a guidance-distilled network.

    [LCM] section 4.2 writes eps = (1 + w) eps_cond - w eps_uncond; what users set is guidance_scale = 1 + w.
    """
    return guidance_scale - 1


def guidance_embedding(w: mx.array, width: int) -> mx.array:
    """Sinusoids of 1000 w, sines first, frequencies from 1 to exactly 1/10000.

    The embedding of [LCM]'s released code, after Kingma et al., Variational Diffusion Models, arXiv 2107.00630.

    Args:
        w: `w_from_guidance_scale`, shape (B,).
        width: the network's `time_cond_proj_dim`.

    Returns:
        float32, shape (B, width).
    """
    return sinusoidal_embedding(1000 * w.astype(mx.float32), width, flip_sin_to_cos=False, freq_shift=1)


def classifier_free_guidance(cond: mx.array, uncond: mx.array, scale: float) -> mx.array:
    """uncond + scale (cond - uncond): 1 is no guidance.

    Ho, Salimans: Classifier-Free Diffusion Guidance, arXiv 2207.12598, equation 6 with scale = 1 + w.

    Args:
        cond, uncond: outputs of the network with the prompt, and with the negative or empty one; the same shape.
    """
    return uncond + scale * (cond - uncond)
