"""Makes any convolutional network channel-sparse and trains it: `python -m examples.own_network`.

`sparsify` gives every convolution scores (depthwise ones follow the channels that they filter); `SparseNetwork` traces
how channels flow through additions and concatenations, and refuses by name what it cannot follow. The rest is a
training loop of your own around `train_step`.
"""

from __future__ import annotations

import torch
from torchvision.models import mobilenet_v2

from args import Config, SparsityConfig
from data import build_data
from trainers.default import SearchState, StepSettings, draw_masks, train_step
from utils.channels.network import SparseNetwork
from utils.conv_type import sparsify

KEEP_RATIO, STEPS, BATCH_SIZE = 0.5, 30, 64


def main() -> None:
    """Trains torchvision's MobileNetV2 on the bundled images for some steps and prints what is kept."""
    torch.manual_seed(0)
    data = build_data("FashionMNIST-mini", holdout=0.1)
    model = mobilenet_v2(num_classes=10, width_mult=0.5, dropout=0.0)
    model.features[0][0] = torch.nn.Conv2d(1, 16, 3, padding=1, bias=False)  # one channel, no halving: small images

    model = sparsify(model, score_init=KEEP_RATIO).to(memory_format=torch.channels_last)
    network = SparseNetwork(model, image_shape=(1, 32, 32))
    generator = torch.Generator().manual_seed(0)
    state = SearchState(
        network,
        weight_optimizer=torch.optim.SGD(network.weight_parameters(), lr=0.05, momentum=0.9, fused=True),
        score_optimizer=torch.optim.Adam([network.scores], lr=0.02),
        generator=generator,
        draw=draw_masks(network, generator, num_masks=2),
    )
    config = Config(sparsity=SparsityConfig(keep_ratio=KEEP_RATIO))
    settings = StepSettings(weight_lr=0.05, score_lr=0.02, kept_fraction=KEEP_RATIO)
    for step, (batch, labels) in zip(range(STEPS), data.train.train_batches(BATCH_SIZE, seed=0, epoch=0), strict=False):
        metrics = train_step(state, batch, labels, settings, config)
        if (step + 1) % 10 == 0:
            plan = state.draw.plans[0]
            flops = network.subnet_macs(plan) / network.dense_macs
            print(
                f"step {step + 1}: loss {metrics['loss'] / len(labels):.3f}, the next draw keeps {plan.mask_U.sum()} "
                f"of {network.num_units} units and {100 * flops:.1f} % of the FLOPs"
            )


if __name__ == "__main__":
    main()
