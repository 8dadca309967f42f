"""Latent consistency models: from a prompt to pictures, through text encoders, a U-Net and an autoencoder."""

from dataclasses import dataclass

SAMPLERS = ("lcm", "tcd")


@dataclass(frozen=True)
class LatentSettings:
    """How a checkpoint is to be used; the `sampler` section of its model index."""

    sampler: str | None = None  # of SAMPLERS; None: a base model, which needs an adapter that distils it
    guidance_scale: float = 1.0  # the default; 1 is no guidance
    steps: int = 4  # the default
    force_zeros_for_empty_prompt: bool = False  # SDXL: the empty negative prompt is zeros, not its encoding

    def __post_init__(self):
        if self.sampler is not None and self.sampler not in SAMPLERS:
            raise ValueError(f"sampler {self.sampler!r}, expected one of {list(SAMPLERS)}")
        if self.steps < 1:
            raise ValueError(f"steps {self.steps}, expected at least 1")
