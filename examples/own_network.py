"""Makes any convolutional network channel-sparse and trains it: `python -m examples.own_network`.

Two calls prepare a network of your own. `sparsify` gives every convolution scores, one for each output channel;
depthwise convolutions follow the channels that they filter. `SparseNetwork` traces how channels flow through additions
and concatenations, and refuses by name what it cannot follow. The rest is a training loop around `train_step`.
"""

from __future__ import annotations

import torch
from torchvision.models import mobilenet_v2

from args import Config, SparsityConfig
from trainers.build import make_estimator
from trainers.default import StepSettings, draw_masks, train_step
from trainers.session import load_data
from trainers.state import Search
from utils.channels.budget import Budget
from utils.channels.network import SparseNetwork
from utils.conv_type import sparsify

KEEP_RATIO, STEPS, BATCH_SIZE = 0.5, 30, 64


def main() -> None:
    """Trains torchvision's MobileNetV2 on the bundled images for some steps and prints what is kept."""
    torch.manual_seed(0)
    model = mobilenet_v2(num_classes=10, width_mult=0.5, dropout=0.0)
    model.features[0][0] = torch.nn.Conv2d(1, 16, 3, padding=1, bias=False)  # grey images, too small to halve at once

    model = sparsify(model, score_init=KEEP_RATIO).to(memory_format=torch.channels_last)
    network = SparseNetwork(model, image_shape=(1, 32, 32))

    config = Config(sparsity=SparsityConfig(keep_ratio=KEEP_RATIO))
    search = Search(
        network,
        Budget(network),  # at most KEEP_RATIO of all channels, on average over the masks
        weight_optimizer=torch.optim.SGD(network.weight_parameters(), lr=0.05, momentum=0.9),
        score_optimizer=torch.optim.Adam([network.scores], lr=0.02),
        generator=torch.Generator().manual_seed(0),
        estimator=make_estimator(network, config),
    )
    search.masks = draw_masks(search, config)

    data = load_data(config, torch.device("cpu"))
    now = StepSettings(weight_lr=0.05, score_lr=0.02, keep_ratio=KEEP_RATIO)
    batches = data.train.train_batches(BATCH_SIZE, seed=0, epoch=0)
    for step, (images, labels) in zip(range(1, STEPS + 1), batches, strict=False):
        result = train_step(search, images, labels, now, config)
        if step % 10 == 0:
            plan = search.masks.plans(network)[0]
            print(
                f"step {step}: loss {result.metrics['loss'] / len(labels):.3f}, the next mask keeps "
                f"{plan.mask_U.sum()} of {network.num_units} channels and "
                f"{100 * network.subnet_macs(plan) / network.dense_macs:.1f} % of the FLOPs"
            )


if __name__ == "__main__":
    main()
