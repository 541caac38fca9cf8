"""VGG with batch-norm (Simonyan and Zisserman, 2015) for 32x32 images: 13 convolutions, one linear layer."""

from __future__ import annotations

from torch import Tensor, nn

POOL = "pool"
VGG16 = (64, 64, POOL, 128, 128, POOL, 256, 256, 256, POOL, 512, 512, 512, POOL, 512, 512, 512, POOL)


class VGG(nn.Module):
    """Five halvings: the input must be at least 32 pixels high and wide."""

    def __init__(self, plan: tuple[int | str, ...], num_classes: int, in_channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for width in plan:
            if width == POOL:
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [
                nn.Conv2d(channels, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            channels = width
        self.features = nn.Sequential(*layers)
        self.linear = nn.Linear(channels, num_classes)
        self.classifier = "linear"

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.features(x).mean((2, 3)))
