"""Published U-Net configs of the latent families, as diffusers writes them, and small ones of the same layout."""

SD15 = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
}
LCM_DREAMSHAPER = SD15 | {"sample_size": 96, "time_cond_proj_dim": 256}
SD15_INPAINT = SD15 | {"in_channels": 9}
SD21 = SD15 | {
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
    "upcast_attention": True,
}
SDXL = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
LCM_SDXL = SDXL | {"time_cond_proj_dim": 256}
SSD_1B = SDXL | {
    "transformer_layers_per_block": [1, [2, 2], [4, 4]],
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
    "mid_block_type": "UNetMidBlock2D",
}
LCM_SSD_1B = SSD_1B | {"time_cond_proj_dim": 256}

# config, parameters, tensors
PUBLISHED = {
    "SD1.5": (SD15, 859_520_964, 686),
    "SD1.5 inpainting": (SD15_INPAINT, 859_535_364, 686),
    "LCM Dreamshaper": (LCM_DREAMSHAPER, 859_602_884, 687),
    "SD2.1": (SD21, 865_910_724, 686),
    "SDXL": (SDXL, 2_567_463_684, 1680),
    "LCM-SDXL": (LCM_SDXL, 2_567_545_604, 1681),
    "SSD-1B": (SSD_1B, 1_331_334_404, 944),
    "LCM-SSD-1B": (LCM_SSD_1B, 1_331_416_324, 945),
}


def shrink(config: dict) -> dict:
    """The same layout at a sixteenth of the width, with narrow conditions."""
    small = config | {
        "block_out_channels": [width // 16 for width in config["block_out_channels"]],
        "norm_num_groups": 4,
        "cross_attention_dim": 24,
    }
    if small["attention_head_dim"] == 8:  # does not divide 320 / 16
        small["attention_head_dim"] = 4
    if "time_cond_proj_dim" in config:
        small["time_cond_proj_dim"] = 12
    if "addition_embed_type" in config:
        small |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 20 + 6 * 8}
    return small
