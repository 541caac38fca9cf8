"""Residual networks for small images (He et al., 2016, section 4.2), with projection shortcuts.

Without suffix: widths 32-64-128 of the released code, whose module names these are; `_he`: classical 16-32-64.
Plain modules: which channels are computed is decided outside (`utils/channels/compact.py`).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from utils.conv_type import PlainConv


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                PlainConv(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x), inplace=True)


class ResNetCifar(nn.Module):
    """Stem, three stages of basic blocks, global average pooling and a 1x1 convolution as classifier."""

    def __init__(self, blocks_per_stage: int, widths: tuple[int, ...], num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, widths[0])
        self.bn = nn.BatchNorm2d(widths[0])
        channels = widths[0]
        stages = []
        for stage, width in enumerate(widths):
            blocks = []
            for block in range(blocks_per_stage):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(BasicBlock(channels, width, stride))
                channels = width
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nn.Conv2d(channels, num_classes, 1, bias=False)
        self.head_name = "linear"

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn(self.conv1(x)), inplace=True)
        out = self.layer3(self.layer2(self.layer1(out)))
        out = out.mean((2, 3), keepdim=True)
        return self.linear(out).flatten(1)
