"""VGG with batch-norm (Simonyan and Zisserman, 2015, table 1), for small images and as torchvision builds it."""

from __future__ import annotations

from torch import Tensor, nn

POOL = "pool"
STAGE_WIDTHS = (64, 128, 256, 512, 512)
HIDDEN_WIDTH = 4096


def vgg_plan(convs_per_stage: tuple[int, ...]) -> tuple[int | str, ...]:
    """Widths of the convolutions in order, with a pooling behind each stage."""
    stages = zip(STAGE_WIDTHS, convs_per_stage, strict=True)
    return tuple(item for width, num_convs in stages for item in (*[width] * num_convs, POOL))


def feature_layers(plan: tuple[int | str, ...], in_channels: int, bias: bool) -> tuple[nn.Sequential, int]:
    """The convolutions of a plan, and the number of channels that they end with."""
    layers: list[nn.Module] = []
    channels = in_channels
    for width in plan:
        if width == POOL:
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [
            nn.Conv2d(channels, width, 3, padding=1, bias=bias),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        ]
        channels = width
    return nn.Sequential(*layers), channels


class VGG(nn.Module):
    """For small images: one linear layer behind global average pooling.

    Five halvings: the input must be at least 32 pixels high and wide.
    """

    def __init__(self, plan: tuple[int | str, ...], num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.features, channels = feature_layers(plan, in_channels, bias=False)
        self.linear = nn.Linear(channels, num_classes)
        self.head_name = "linear"

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.features(x).mean((2, 3)))


class VGGImageNet(nn.Module):
    """For large images: torchvision's `vgg*_bn` with its module names, without dropout.

    Dropout is left out because its noise would enter the differences of losses that the scores learn from.
    """

    def __init__(self, plan: tuple[int | str, ...], hidden: int, num_classes: int, in_channels: int) -> None:
        """hidden: width of the two hidden linear layers."""
        super().__init__()
        self.features, channels = feature_layers(plan, in_channels, bias=True)
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            nn.Linear(channels * 7 * 7, hidden),
            nn.ReLU(inplace=True),
            nn.Identity(),  # where torchvision has its dropout, so that the linear layers are 0, 3 and 6
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Identity(),
            nn.Linear(hidden, num_classes),
        )
        self.head_name = "classifier.6"

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))
