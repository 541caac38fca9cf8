"""Wide residual networks (Zagoruyko and Komodakis, 2016): pre-activation basic blocks, no dropout."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from models.resnet_cifar import conv3x3
from utils.conv_type import PlainConv


class PreActivationBlock(nn.Module):
    """Batch-norm and ReLU come before each convolution; a projection reads the activated input."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)
        self.shortcut = None
        if stride != 1 or in_channels != channels:
            self.shortcut = PlainConv(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x), inplace=True)
        stream = x if self.shortcut is None else self.shortcut(activated)
        out = F.relu(self.bn2(self.conv1(activated)), inplace=True)
        return self.conv2(out) + stream


class WideResNet(nn.Module):
    """Stem, three stages of blocks, a last batch-norm, global average pooling and a linear layer."""

    def __init__(self, blocks_per_stage: int, widths: tuple[int, ...], num_classes: int, in_channels: int) -> None:
        """widths: of the stem and of the three stages."""
        super().__init__()
        self.conv1 = conv3x3(in_channels, widths[0])
        stages = []
        for stage, (channels, width) in enumerate(pairwise(widths)):
            first = PreActivationBlock(channels, width, 1 if stage == 0 else 2)
            stages.append(
                nn.Sequential(first, *(PreActivationBlock(width, width, 1) for _ in range(blocks_per_stage - 1)))
            )
        self.layer1, self.layer2, self.layer3 = stages
        self.bn = nn.BatchNorm2d(widths[-1])
        self.linear = nn.Linear(widths[-1], num_classes)
        self.head_name = "linear"

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.linear(F.relu(self.bn(out), inplace=True).mean((2, 3)))
