"""LPIPS in torch, written after the `lpips` and `piq` packages: their names, layers and order of operations."""

import mlx.core as mx
import torch
import torch.nn.functional as F
from parity import channels_last
from torch import nn

WIDTHS = (6, 10, 12, 14, 9)  # no two alike, none a power of two
VGG16 = (64, 128, 256, 512, 512)
DEPTHS = (2, 2, 3, 3, 3)
SLICE_ENDS = (4, 9, 16, 23, 30)  # of the `lpips` package: a slice begins with the pooling before its stage
STAGE_ENDS = ("3", "8", "15", "22", "29")  # of `piq`: relu1_2, relu2_2, relu3_3, relu4_3, relu5_3

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def vgg16_features(widths: tuple[int, ...] = WIDTHS, depths: tuple[int, ...] = DEPTHS, seed: int = 0) -> nn.Sequential:
    """torchvision's `vgg16().features`, of any width, all weights random and of the size that keeps signals alive."""
    layers: list[nn.Module] = []
    channels = 3
    for width, depth in zip(widths, depths, strict=True):
        for _ in range(depth):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2, 2))
    features = nn.Sequential(*layers)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in features:
            if isinstance(layer, nn.Conv2d):
                fan_in = layer.weight[0].numel()
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * (2 / fan_in) ** 0.5)
                layer.bias.copy_(0.1 * torch.randn(layer.bias.shape, generator=generator))
    return features.eval().requires_grad_(False)


class Vgg16(nn.Module):
    """The network in slices, each module under torchvision's number."""

    def __init__(self, features: nn.Sequential):
        super().__init__()
        start = 0
        for number, end in enumerate(SLICE_ENDS, 1):
            part = nn.Sequential()
            for index in range(start, end):
                part.add_module(str(index), features[index])
            setattr(self, f"slice{number}", part)
            start = end

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        outputs = []
        for number in range(1, len(SLICE_ENDS) + 1):
            x = getattr(self, f"slice{number}")(x)
            outputs.append(x)
        return outputs


class ScalingLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[None, :, None, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.shift) / self.scale


class NetLinLayer(nn.Module):
    def __init__(self, channels: int, dropout: bool = True):
        super().__init__()
        self.model = nn.Sequential(*[nn.Dropout()] * dropout, nn.Conv2d(channels, 1, 1, bias=False))


def normalize_tensor(x: torch.Tensor, eps: float = 1e-10) -> torch.Tensor:
    return x / (torch.sqrt(torch.sum(x**2, dim=1, keepdim=True)) + eps)


class LPIPSReference(nn.Module):
    """The `lpips` package's `LPIPS(net="vgg")`: every head twice in its state dict, by attribute and by list."""

    def __init__(self, widths: tuple[int, ...] = WIDTHS, seed: int = 0, dropout: bool = True):
        super().__init__()
        self.scaling_layer = ScalingLayer()
        self.net = Vgg16(vgg16_features(widths, seed=seed))
        heads = [NetLinLayer(width, dropout) for width in widths]
        for number, head in enumerate(heads):
            setattr(self, f"lin{number}", head)
        self.lins = nn.ModuleList(heads)
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for head in heads:  # the published ones are not negative
                weight = head.model[-1].weight
                weight.copy_(torch.rand(weight.shape, generator=generator) + 0.05)
        self.eval().requires_grad_(False)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        total = 0
        stages = zip(self.net(self.scaling_layer(a)), self.net(self.scaling_layer(b)), self.lins, strict=True)
        for one, other, head in stages:
            difference = (normalize_tensor(one) - normalize_tensor(other)) ** 2
            total = total + head.model(difference).mean([2, 3], keepdim=True)
        return total[:, 0, 0, 0]

    @property
    def features(self) -> nn.Sequential:
        """torchvision's network again."""
        return nn.Sequential(*[layer for number in range(1, 6) for layer in getattr(self.net, f"slice{number}")])

    @property
    def heads(self) -> list[torch.Tensor]:
        """What `piq` publishes: five tensors (1, C, 1, 1)."""
        return [head.model[-1].weight.detach().clone() for head in self.lins]

    def native_weights(self) -> dict[str, mx.array]:
        """The weights under the names they have here."""
        weights = {f"features.{name}": channels_last(value) for name, value in self.features.state_dict().items()}
        heads = {f"lins.{number}.weight": mx.array(head[:, :, 0, 0].numpy()) for number, head in enumerate(self.heads)}
        return weights | heads

    def vgg16_state(self) -> dict[str, torch.Tensor]:
        """torchvision's `vgg16` with its classifier."""
        state = {f"features.{name}": value for name, value in self.features.state_dict().items()}
        for number, shape in {0: (11, 7), 3: (11, 11), 6: (5, 11)}.items():
            state |= {
                f"classifier.{number}.weight": torch.ones(shape),
                f"classifier.{number}.bias": torch.ones(shape[0]),
            }
        return state


def piq_lpips(features: nn.Sequential, heads: list[torch.Tensor], a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`piq.LPIPS(replace_pooling=True, reduction="none")` of pictures in [0, 1]."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))

    def normalised_features(x: torch.Tensor) -> list[torch.Tensor]:
        x = (x - mean) / std
        found = []
        for name, layer in features._modules.items():
            x = F.avg_pool2d(x, 2, 2) if isinstance(layer, nn.MaxPool2d) else layer(x)
            if name in STAGE_ENDS:
                found.append(normalize_tensor(x))
        return found

    pairs = zip(normalised_features(a), normalised_features(b), heads, strict=True)
    return torch.cat([((x - y) ** 2 * w).mean(dim=[2, 3]) for x, y, w in pairs], dim=1).sum(dim=1)


def openai_lpips(
    features: nn.Sequential,
    heads: list[torch.Tensor],
    a: torch.Tensor,
    b: torch.Tensor,
    size: int = 224,
    below: int = 256,
) -> torch.Tensor:
    """The perceptual loss of OpenAI's consistency models, pictures in [-1, 1]."""
    if a.shape[-1] < below:
        a = F.interpolate(a, size=size, mode="bilinear")
        b = F.interpolate(b, size=size, mode="bilinear")
    return piq_lpips(features, heads, (a + 1) / 2.0, (b + 1) / 2.0)
