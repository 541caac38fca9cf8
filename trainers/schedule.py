"""What a whole run consists of, and learning rates and budget of every step."""

from __future__ import annotations

from args import Config
from data import DataSplits
from trainers.default import StepSettings
from trainers.methods import make_method
from trainers.state import RunState
from utils.algorithm.schedules import falling_keep_ratio, learning_rate_factor
from utils.run.progress import Stage


def stages(run: RunState, config: Config, data: DataSplits) -> list[Stage]:
    """What the whole recipe consists of, whatever is done of it already."""
    first = make_method(config).first_phase
    parts = [(first, config.total_epochs, config.train.batch_size)]
    if config.finetunes:
        searched = config.search_epochs
        if run.phase == "finetune":  # it may have ended early, or the run became longer after its search
            searched = sum(row["phase"] == first for row in run.history)
        tuned = ("finetune", config.total_epochs - searched, config.finetune_batch_size)
        parts = [(first, searched, config.train.batch_size), tuned]
    return [Stage(name, epochs, data.train.num_train_batches(size), size) for name, epochs, size in parts]


def step_settings(run: RunState, config: Config, step: int, steps_per_epoch: int) -> StepSettings:
    """Learning rates and budget of a step of the epoch under way (counted from 0)."""
    sparsity, train = config.sparsity, config.train
    epochs = config.search_epochs if run.phase == "search" else config.total_epochs
    now, total = run.epoch * steps_per_epoch + step, epochs * steps_per_epoch
    warmup = train.warmup_length * steps_per_epoch
    span = config.total_epochs * steps_per_epoch if config.one_curve else total
    # In the released code policy and warm-up drive the scores alone.
    weights, drop = (("cosine_lr", 0), 30) if config.method == "released" else ((train.lr_policy, warmup), 0)
    weight_lr = train.weight_lr * learning_rate_factor(weights[0], now, span, weights[1])
    if run.phase == "finetune":
        return StepSettings(weight_lr if config.one_curve else config.finetune.finetune_lr)
    fall = (sparsity.budget_start, sparsity.budget_end)
    keep_ratio = sparsity.keep_ratio
    if config.budget_falls:
        top = min(sparsity.budget_top, run.start_share)
        keep_ratio = falling_keep_ratio(now / total, keep_ratio, *fall, highest=top)
    if run.search is None:  # score_lr, which nothing reads, may still be auto
        return StepSettings(weight_lr, keep_ratio=keep_ratio, progress=now / total)
    return StepSettings(
        weight_lr=weight_lr,
        score_lr=train.score_lr * learning_rate_factor(train.lr_policy, now, total, warmup, drop * steps_per_epoch),
        keep_ratio=keep_ratio,
        update_scores=now % sparsity.score_every == 0,
        progress=now / total,
    )
