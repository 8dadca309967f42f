"""[CTM]'s U-Net out of diffusers' `UNet2DModel`: a second level embedding, projected into every residual block.

As sony/ctm's `unet.py` has it (`time_embed_s`, `emb_layers_s`), with the names that diffusers' spelling would give.
"""

import torch
from diffusers import UNet2DModel
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D
from parity import copy_weights, randomise

from mlx_cm.config import config_from_dict
from mlx_cm.models.unet2d import UNet2D, UNet2DConfig


class TrajectoryUNet(UNet2DModel):
    """F(x, t, s)."""

    def forward_to(
        self, x: torch.Tensor, t: torch.Tensor, s: torch.Tensor, class_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One evaluation; t and s are conditioning values, of shape (B,)."""
        told = torch.nn.functional.silu(self.time_embedding_s(self.time_proj(s)))
        hooks = [
            block.time_emb_proj.register_forward_hook(
                lambda module, args, output, block=block: output + block.time_emb_proj_s(told)
            )
            for block in self.modules()
            if isinstance(block, ResnetBlock2D)
        ]
        try:
            return self(x, t, class_labels).sample
        finally:
            for hook in hooks:
                hook.remove()


def make_trajectory_unet(config: dict, seed: int = 0) -> TrajectoryUNet:
    """The reference, random but for the seed."""
    torch.manual_seed(seed)
    unet = TrajectoryUNet(**config)
    width = unet.time_embedding.linear_2.out_features
    unet.time_embedding_s = TimestepEmbedding(config["block_out_channels"][0], width)
    for block in unet.modules():
        if isinstance(block, ResnetBlock2D):
            block.time_emb_proj_s = torch.nn.Linear(width, block.time_emb_proj.out_features)
    return randomise(unet, seed)


def native_trajectory_unet(reference: TrajectoryUNet) -> UNet2D:
    """Our U-Net with the same config and weights."""
    config = config_from_dict(UNet2DConfig, dict(reference.config) | {"trajectory": True}, "test")
    return copy_weights(UNet2D(config), reference)
