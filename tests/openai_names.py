"""A diffusers U-Net's weights under the names of OpenAI's code. Imports torch alone."""

import torch


def openai_state_dict(unet: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The U-Net's weights under the names of OpenAI's code, q, k and v joined in one 1x1 convolution.

    Written from the modules in the order in which OpenAI's `UNetModel` makes them, not from the table under test.
    """
    state: dict[str, torch.Tensor] = {}

    def put(name: str, module: torch.nn.Module | None) -> None:
        for kind, value in module.named_parameters() if module is not None else ():
            state[f"{name}.{kind}"] = value

    def put_resnet(name: str, block: torch.nn.Module) -> None:
        leaves = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection")
        ours = (block.norm1, block.conv1, block.time_emb_proj, block.norm2, block.conv2, block.conv_shortcut)
        for leaf, module in zip(leaves, ours, strict=True):
            put(f"{name}.{leaf}", module)
        put(f"{name}.emb_layers_s.1", getattr(block, "time_emb_proj_s", None))  # CTM's

    def put_attention(name: str, block: torch.nn.Module) -> None:
        put(f"{name}.norm", block.group_norm)
        projections = (block.to_q, block.to_k, block.to_v)
        state[f"{name}.qkv.weight"] = torch.cat([one.weight for one in projections])[:, :, None, None]
        state[f"{name}.qkv.bias"] = torch.cat([one.bias for one in projections])
        state[f"{name}.proj_out.weight"] = block.to_out[0].weight[:, :, None, None]
        state[f"{name}.proj_out.bias"] = block.to_out[0].bias

    def put_sequence(name: str, modules: list[torch.nn.Module]) -> None:
        for position, module in enumerate(modules):
            place = f"{name}.{position}"
            (put_attention if hasattr(module, "to_q") else put_resnet)(place, module)

    put("time_embed.0", unet.time_embedding.linear_1)
    put("time_embed.2", unet.time_embedding.linear_2)
    if hasattr(unet, "time_embedding_s"):
        put("time_embed_s.0", unet.time_embedding_s.linear_1)
        put("time_embed_s.2", unet.time_embedding_s.linear_2)
    put("label_emb", unet.class_embedding)
    put("input_blocks.0.0", unet.conv_in)
    down = []
    for block in unet.down_blocks:
        attentions = getattr(block, "attentions", [None] * len(block.resnets))
        down += [[one for one in pair if one is not None] for pair in zip(block.resnets, attentions, strict=True)]
        down += [[one] for one in block.downsamplers or []]
    for number, modules in enumerate(down, start=1):
        put_sequence(f"input_blocks.{number}", modules)
    mid = unet.mid_block
    put_sequence("middle_block", [mid.resnets[0], mid.attentions[0], mid.resnets[1]])
    up = []
    for block in unet.up_blocks:
        attentions = getattr(block, "attentions", [None] * len(block.resnets))
        up += [[one for one in pair if one is not None] for pair in zip(block.resnets, attentions, strict=True)]
        up[-1] += list(block.upsamplers or [])
    for number, modules in enumerate(up):
        put_sequence(f"output_blocks.{number}", modules)
    put("out.0", unet.conv_norm_out)
    put("out.2", unet.conv_out)
    return state
