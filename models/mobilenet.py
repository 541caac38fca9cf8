"""MobileNetV1 (Howard et al., 2017, table 1): depthwise-separable convolutions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models.resnet_cifar import conv3x3

STEM_WIDTH = 32
# Width and stride of each block. The paper gives the last one stride 2 but an output as large as its input: it is 1.
BLOCKS = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *((512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1)),
)


class SeparableBlock(nn.Module):
    """A 3x3 filter for each channel, then a 1x1 convolution that mixes them."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(in_channels, in_channels, 3, stride, padding=1, groups=in_channels, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.pointwise = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.depthwise(x)), inplace=True)
        return F.relu(self.bn2(self.pointwise(out)), inplace=True)


class MobileNetV1(nn.Module):
    """Stem, 13 blocks, global average pooling and a linear layer.

    For small images the stem and the first block of stride 2 have stride 1: 32x32 images end as 4x4 maps, not as 1x1.
    """

    def __init__(
        self, stem_width: int, widths: tuple[int, ...], num_classes: int, in_channels: int, large_images: bool
    ) -> None:
        """widths: of the 13 blocks, at least 2: a depthwise convolution of one channel would be an ordinary one."""
        super().__init__()
        self.conv1 = conv3x3(in_channels, stem_width, 2 if large_images else 1)
        self.bn = nn.BatchNorm2d(stem_width)
        strides = [stride for _, stride in BLOCKS]
        if not large_images:
            strides[strides.index(2)] = 1
        channels = (stem_width, *widths)
        self.blocks = nn.Sequential(
            *(SeparableBlock(*shape) for shape in zip(channels, widths, strides, strict=False))  # one input too many
        )
        self.linear = nn.Linear(widths[-1], num_classes)
        self.head_name = "linear"

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn(self.conv1(x)), inplace=True)
        return self.linear(self.blocks(out).mean((2, 3)))
