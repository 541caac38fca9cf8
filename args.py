"""Every option of the program: frozen dataclasses, one per owner; defaults < YAML file < command line.

The YAML file and the command line are flat: one key per option, whatever its group. This file holds the names of all
choices, declares the options and says which methods read them and which values contradict each other.
`utils/options.py` does with these declarations all that is done; `utils/option_text.py` reads and writes text.
"""

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from utils.choices import (
    ARCHS,
    DRAWN,
    ESTIMATED,
    ESTIMATORS,
    FALLING,
    GATE_ESTIMATORS,
    GRADUAL,
    MASKED,
    METHODS,
    OWN_ARCH,
    OWN_ARCH_WORDS,
    SCORED,
    SETS,
    TWO_PHASE,
    catalogue,
    is_own,
)
from utils.errors import UserError
from utils.option_text import CommandLine, read_dict, read_yaml, to_yaml
from utils.options import (
    AUTO,
    Given,
    Removed,
    Rule,
    Setting,
    assemble,
    check_effect,
    check_together,
    flag_of,
    flatten,
    option,
    options_of,
    resolve,
    why_unread,
    worded,
)

FROM_FILES = {"set": ("ImageFolder", "ImageNet")}
NOT_BUNDLED = {"set": tuple(name for name in SETS if name != "FashionMNIST-mini")}
CUBIC = {"budget_schedule": ("cubic",)}
DECIDED = {"search_until": ("decided",)}
AFTERWARDS = {"finetune": (True,), "search_until": ("epochs",)}  # a phase of its own after the search
KAIMING = ("kaiming_normal", "kaiming_uniform")
INITS = (*KAIMING, "xavier_normal", "xavier_uniform", "orthogonal")
NOT_A_PERCENTAGE = "it is a fraction, not a percentage"
NO = ("false", "no", "off")

REMOVED = {
    "conv_type": Removed(
        ("VRPGE", "DenseConv"),
        "pass --method dense for the plain network, or leave it out",
        implies={"VRPGE": ("method", MASKED), "DenseConv": ("method", ("dense",))},
        flag=True,
    ),
    "trainer": Removed(("default",), "there is one trainer; leave it out", flag=True),
    "bn_type": Removed(
        ("LearnedBatchNorm", "NonAffineBatchNorm", "None"),
        "its networks have PyTorch's batch-norm whatever it says; leave it out",
        flag=True,
    ),
    "semantics": Removed(("unit",), "use method released instead"),
    "weight_samples": Removed(("1",), "use method released, which trains the weights on all masks of a step"),
    "clip_jointly": Removed(NO, "use method released, which clips weights and scores by one norm"),
    "sync_bn": Removed(NO, "batch-norm reads the part of each process; leave it out"),
    "subbatch": Removed(("0",), "docs/estimators.md names the last version that had it; leave it out"),
    "bad_images": Removed(("error",), "look for damaged files with python -m data.check; leave it out"),
    "gauge_every": Removed(("0",), "measure on checkpoints with python -m tools.gauge; leave it out"),
}

# Names by which a command or file is known to be made for the released code, and the options that mean something else
# there: by key, the value for which that makes no difference, and what is different.
RELEASED_NAMES = {"prune_rate", "lr", "weight_opt_lr", "conv_type", "trainer", "bn_type"}
ONLY_OF_SCORES = "drives weights and scores, and in the released code the scores alone (--method released does that)"
MEANS_OTHERWISE = {
    "weight_decay": (
        5e-4,
        "acts on the weights, and in the released code on the scores, whose weights have 5e-4 (--method released does "
        "that)",
    ),
    "lr_policy": ("cosine_lr", ONLY_OF_SCORES),
    "warmup_length": (0, ONLY_OF_SCORES),
    "width_mult": (1.0, "scales the network, and in the released code it only names a folder"),
}


# ---- the options ----


def _check_image_size(size: int) -> str | None:
    return None if size == 0 or 8 <= size <= 512 else "0 (as stored) or in [8, 512]"


def _check_device(device: str) -> str | None:
    return None if re.fullmatch(r"auto|cpu|cuda(:(0|[1-9]\d*))?", device) else "auto, cpu, cuda or cuda:N"


def _check_multigpu(ids: str) -> str | None:
    if not re.fullmatch(r"(0|[1-9]\d*)(,(0|[1-9]\d*))*", ids):
        return "GPU ids that are not negative, such as 0 or 0,1"
    return None if len(set(ids.split(","))) == len(ids.split(",")) else "GPU ids that are distinct, such as 0,1"


def _check_name(name: str) -> str | None:
    return None if name not in (".", "..") and not set(name) & set("/\\") else "the name of one folder, not a path"


@dataclass(frozen=True)
class RunConfig:
    """what to do, where it runs and what it writes."""

    DEFAULTS: ClassVar = {"resumed": "may change"}

    config: str | None = option(None, "YAML file with options as lines 'key: value'", is_path=True, common=True)
    name: str | None = option(None, "name of the run's folder", check=_check_name, default_text="the arch", common=True)
    log_dir: str = option("runs", "folder of all runs", is_path=True)
    seed: int = option(0, "seed of every random generator", within="[0, 2147483647]", common=True, resumed="stored")
    device: str = option("auto", "auto, cpu, cuda or cuda:N", check=_check_device, metavar="DEVICE", common=True)
    multigpu: str | None = option(
        None,
        "GPU ids, as in the released code: 0 for one GPU, or 0,1,2 for a process on each, which train one network",
        check=_check_multigpu,
        metavar="IDS",
    )
    resume: str | None = option(
        None,
        "go on with the newest run at PATH, or without PATH with the newest run of these options; --epochs and "
        "--finetune-epochs may be raised, and --finetune may be added to a run without: learning rates and budget are "
        "then those of a run that had this length from the start, and a search that has ended stays ended",
        is_path=True,
        bare="auto",
        common=True,
        resumed="this command",
    )
    evaluate: bool = option(False, "evaluate the run given by --resume and exit", common=True, resumed="this command")
    print_freq: int = option(50, "steps between log lines", within="[1, inf)")
    save_interval: float = option(
        300.0, "seconds of training between checkpoints within an epoch; 0 for none", within="[0, inf)"
    )
    save_steps: int = option(0, "steps between checkpoints within an epoch; 0 for none", within="[0, inf)")
    save_every: int = option(
        0, "epochs between numbered checkpoints beside the last and the best; 0 for none", within="[0, inf)"
    )
    test_every: int = option(
        1, "epochs between evaluations on test images; 0 evaluates only what may be the result", within="[0, inf)"
    )
    print_config: bool = option(
        False, "print the resolved options as YAML and exit", common=True, resumed="this command"
    )
    dry_run: bool = option(False, "build everything, run one batch and exit", common=True, resumed="this command")
    doctor: bool = option(
        False,
        "say what there is here to train with, whether a training could start, and exit",
        common=True,
        resumed="this command",
    )

    RULES: ClassVar = (
        Rule(lambda r: r.evaluate and r.resume is None, "{evaluate} needs a trained run; pass --resume PATH"),
        Rule(
            lambda r: r.multigpu is not None and r.device not in ("auto", "cuda", f"cuda:{r.multigpu}"),
            "{device} and {multigpu} contradict each other; pass one of them",
        ),
    )


@dataclass(frozen=True)
class DataConfig:
    """which images, and how they are read."""

    set: str = option("FashionMNIST-mini", "the data set", choices=SETS, common=True)
    data: str = option(
        "dataset", "folder of the data sets", is_path=True, needs=NOT_BUNDLED, common=True, resumed="may change"
    )
    holdout: float | Literal["auto"] = option(
        0.1,
        "fraction of the training images held out to choose subnets; auto: by their number",
        within="[0, 0.5]",
        hint=NOT_A_PERCENTAGE,
    )
    train_images: int = option(
        0, "use N training images, the same for every seed, classes in proportion; 0 takes all", within="[0, inf)"
    )
    image_size: int = option(
        0,
        "ImageFolder: resize to this many pixels, 8 to 512; images of 128 or more are streamed from their files. 0 "
        "leaves them as stored. ImageNet: 0 means 224",
        check=_check_image_size,
        needs=FROM_FILES,
        common=True,
    )
    workers: int = option(
        2,
        "threads or processes that read images",
        within="[0, 64]",
        needs=FROM_FILES,
        common=True,
        resumed="may change",
    )
    rand_augment: int = option(
        0, "operations of RandAugment on each training image; 0 for none, 2 is usual", within="[0, 14]"
    )
    mixup: float = option(
        0.0, "MixUp of the training images with this alpha; 0 for none, 0.2 is usual", within="[0, 100]"
    )
    cutmix: float = option(
        0.0,
        "CutMix of the training images with this alpha; 0 for none, 1 is usual. With mixup, each batch takes one of "
        "the two at random",
        within="[0, 100]",
    )


@dataclass(frozen=True)
class ModelConfig:
    """the network and its first weights."""

    arch: str = option(
        "resnet32", "the network", choices=ARCHS, besides=(OWN_ARCH, OWN_ARCH_WORDS), metavar="NAME", common=True
    )
    width_mult: float = option(1.0, "factor on all channel counts", within="[0.01, 16]")
    init: str = option(
        "kaiming_normal",
        "how the weights of convolutions start; a network of your own starts as your code makes it",
        choices=INITS,
        needs={"arch": tuple(ARCHS)},
    )
    mode: str = option("fan_in", "kaiming inits: the fan used", choices=("fan_in", "fan_out"), needs={"init": KAIMING})
    nonlinearity: str = option(
        "relu", "kaiming inits: the gain used", choices=("relu", "leaky_relu", "linear"), needs={"init": KAIMING}
    )
    first_layer_dense: bool = option(False, "never mask the first convolution", read_by=MASKED)
    last_layer_dense: bool = option(
        False, "never mask the last convolution before the classifier, which itself is never masked", read_by=MASKED
    )
    pretrained: str | None = option(
        None,
        "first weights: a run folder, a checkpoint, a state dict, or a name of torchvision weights, such as "
        "ResNet50_Weights.DEFAULT",
        is_path=True,
        common=True,
    )
    widths_of: str | None = option(
        None,
        "a run folder or a best.pt: the thin network has the channels that the subnet of this run kept, and weights of "
        "its own; keep_ratio and budget must be those of that run",
        is_path=True,
        read_by=("thin",),
    )


@dataclass(frozen=True)
class SparsityConfig:
    """how many units are kept, and how they are searched."""

    DEFAULTS: ClassVar = {"read_by": MASKED}

    method: str = option("vrpge", "what is trained; --list describes them", choices=METHODS, read_by=(), common=True)
    keep_ratio: float = option(
        0.5,
        "fraction that is KEPT, as in the released code",
        within="(0, 1]",
        hint=NOT_A_PERCENTAGE,
        aliases=("prune_rate",),
        common=True,
    )
    budget: str = option(
        "channels",
        "what keep_ratio is a fraction of: the channels, or the parameters or FLOPs of the network",
        choices=("channels", "params", "flops"),
        common=True,
    )
    score_init_constant: float | None = option(
        None,
        "start value of every score; with a budget of params or flops the default is the value that meets it",
        within="(0, 1]",
        hint=NOT_A_PERCENTAGE,
        default_text="keep_ratio; budget_top with budget_schedule cubic",
        read_by=SCORED,
    )
    K: int = option(2, "masks drawn in a step; estimator taylor draws 1", within="[1, 64]", read_by=DRAWN)
    alpha: float = option(0.5, "exponent of the estimator's preconditioner", within="[0.5, 1)", read_by=DRAWN)
    estimator: str = option(
        "vrpge",
        "how the gradient of the scores is estimated, see docs/estimators.md",
        choices=ESTIMATORS,
        read_by=ESTIMATED,
        common=True,
    )
    score_gradient: str = option(
        "raw", "tangent leaves out the part that would exceed the budget", choices=("raw", "tangent"), read_by=ESTIMATED
    )
    constrain_by_layer: bool = option(
        False, "a budget per layer instead of one for all", read_by=(*SCORED, "random", "slimming", "taylor_cut")
    )
    execution: str = option(
        "compact",
        "compact computes the kept channels only; masked computes all of them and multiplies by masks",
        choices=("compact", "masked"),
        read_by=tuple(name for name in MASKED if name != "released"),
    )
    residual_masks: str = option(
        "free",
        "free: all layers that add into a residual stream have masks of their own; tied: they share one",
        choices=("free", "tied"),
        aliases=("stream",),
        read_by=tuple(name for name in MASKED if name not in ("released", "thin")),
    )
    shrink: bool = option(
        True,
        "units whose scores provably stay 0 leave the parameters and the optimizer",
        aliases=("retire",),
        read_by=tuple(name for name in TWO_PHASE if name != "released"),
        needs={"execution": ("compact",)},
    )
    shapes: str = option(
        "auto",
        "drawn: the tensors of a pass are as wide as its mask wants them; fixed: as wide as nearly all masks need, so "
        "that all steps of an epoch run the same operations; auto: drawn",
        choices=("auto", "drawn", "fixed"),
        read_by=ESTIMATED,
        needs={"execution": ("compact",)},
    )
    cuda_graphs: str = option(
        "auto",
        "on: record the long parts of a step of the search in CUDA graphs and replay them; auto: off",
        choices=("auto", "on", "off"),
        read_by=ESTIMATED,
        needs={"shapes": ("fixed",)},
        resumed="may change",
    )
    score_every: int = option(
        1, "steps between updates of the scores; the others run one pass", within="[1, inf)", read_by=ESTIMATED
    )
    rank_masks: str = option(
        "shared",
        "several processes draw the same masks, or each its own, which makes the gradient of the scores less noisy",
        choices=("shared", "independent"),
        read_by=ESTIMATED,
    )
    budget_schedule: str = option(
        "constant",
        "constant: keep_ratio holds from the first step, and pruning methods prune once, at the end; cubic: the budget "
        "falls to it from 1, and they prune after every epoch",
        choices=("constant", "cubic"),
        read_by=FALLING,
    )
    budget_top: float = option(
        1.0,
        "where a falling budget starts, as a fraction of what keep_ratio counts",
        within="(0, 1]",
        hint=NOT_A_PERCENTAGE,
        read_by=FALLING,
        needs=CUBIC,
    )
    budget_start: float = option(
        0.0,
        "start of the fall of the budget, as a fraction of the search",
        within="[0, 1]",
        hint=NOT_A_PERCENTAGE,
        read_by=FALLING,
        needs=CUBIC,
    )
    budget_end: float = option(
        0.4,
        "end of the fall of the budget, as a fraction of the search",
        within="[0, 1]",
        hint=NOT_A_PERCENTAGE,
        read_by=FALLING,
        needs=CUBIC,
    )
    spend_budget: bool = option(
        False,
        "scores and subnets spend the whole budget, so that as much is kept as keep_ratio says; otherwise it is a "
        "bound, as in the paper, and a search may end below it",
        read_by=tuple(name for name in SCORED if name != "released"),
    )
    slimming_penalty: float = option(
        1e-4, "weight of the sum of batch-norm scales in the loss", within="[0, inf)", read_by=("slimming",)
    )

    RULES: ClassVar = (
        Rule(
            lambda s: (s.estimator == "taylor") != (s.K == 1),
            "{estimator} and {K} contradict each other: estimator taylor compares no masks and draws one, the others "
            "draw two or more; leave K out",
        ),
        Rule(
            lambda s: s.method == "released" and s.K == 1,
            "{method} compares masks, so it needs two or more, got {K}; leave K out",
        ),
        Rule(
            lambda s: s.method == "released" and s.budget != "channels",
            "{method} counts channels only, got {budget}; leave one of them out",
        ),
        Rule(
            lambda s: s.estimator in GATE_ESTIMATORS and s.rank_masks != "shared",
            "{estimator} learns from losses under masks that all processes share, got {rank_masks}; leave one of them "
            "out",
        ),
        Rule(
            lambda s: s.estimator in GATE_ESTIMATORS and s.method == "coin",
            "{estimator} learns from gradients, which no coin tosses, so {method} would be no control; leave one of "
            "them out",
        ),
        Rule(
            lambda s: s.method in ("thin", "random") and s.execution != "compact",
            "{method} needs compact execution, because the channels that it leaves out do not exist, got {execution}; "
            "leave it out",
        ),
        Rule(
            lambda s: s.method in GRADUAL and s.budget_schedule == "cubic" and not s.cuts,
            "{method} with {budget_schedule} takes units out of the network while the budget falls, which needs "
            "compact execution and shrink; leave --execution masked and --no-shrink out, or pass --budget-schedule "
            "constant",
        ),
        Rule(
            lambda s: s.budget_start >= s.budget_end,
            "{budget_start} must be below {budget_end}: the budget falls between them",
        ),
        Rule(
            lambda s: s.budget_schedule == "cubic" and s.budget_top < s.keep_ratio,
            "{budget_top} is below {keep_ratio}: the budget falls from the first to the second",
        ),
        Rule(
            lambda s: s.constrain_by_layer and s.budget != "channels",
            "{constrain_by_layer} needs budget channels, got {budget}: what a layer costs depends on its neighbours; "
            "leave one of them out",
        ),
        Rule(  # other budgets are checked once there is a network
            lambda s: (s.budget, s.budget_schedule) == ("channels", "constant") and s.score_init > s.keep_ratio,
            "{score_init_constant} is above {keep_ratio}: the start would overspend the budget; pass at most the "
            "keep_ratio, or --budget-schedule cubic",
        ),
    )

    @property
    def cuts(self) -> bool:
        """Whether units may leave the parameters: an exact saving that only compact execution can make."""
        return self.shrink and self.execution == "compact"

    @property
    def score_init(self) -> float:
        """The start value of every score, with the default filled in; for params and flops the network has its own."""
        if self.score_init_constant is not None:
            return self.score_init_constant
        return self.budget_top if self.budget_schedule == "cubic" else self.keep_ratio


@dataclass(frozen=True)
class TrainConfig:
    """the search: weights and scores together."""

    epochs: int | Literal["auto"] = option(
        300,
        "epochs of the search, or of the whole training with search_until decided; auto: by the number of training "
        "images",
        within="[1, inf)",
        common=True,
        resumed="may grow",
    )
    search_until: str = option(
        "epochs",
        "epochs: the search lasts for all epochs, and finetune_epochs come after it; decided: it ends as soon as the "
        "scores are decided, or at the end of search_epochs, and the chosen subnet is trained for the rest of the "
        "epochs on the same learning rate curve",
        choices=("epochs", "decided"),
        common=True,
    )
    search_epochs: int | Literal["auto"] = option(
        AUTO,
        "epochs that the search lasts at most, over which its budget and score_lr fall; auto: by the number of steps",
        within="[1, inf)",
        read_by=TWO_PHASE,
        needs=DECIDED,
    )
    batch_size: int | Literal["auto"] = option(
        256,
        "images in a step, of all processes together; auto: by the number of training images",
        within="[2, inf)",
        common=True,
    )
    optimizer: str = option(
        "adam", "optimizer of the scores (that of the weights is SGD)", choices=("adam", "sgd"), read_by=SCORED
    )
    score_lr: float | Literal["auto"] = option(
        12e-3,
        "learning rate of the scores; auto: by the number of steps",
        within="(0, inf)",
        aliases=("lr",),
        read_by=SCORED,
        common=True,
    )
    weight_lr: float = option(
        0.1, "learning rate of the weights", within="(0, inf)", aliases=("weight_opt_lr",), common=True
    )
    momentum: float = option(0.9, "momentum of SGD", within="[0, 1)")
    weight_decay: float = option(
        5e-4,
        "weight decay of the weights; with method released, as in that code, it is that of the scores by Adam, and "
        "weights have 5e-4",
        within="[0, inf)",
    )
    nesterov: bool = option(False, "Nesterov's momentum in SGD")
    lr_policy: str = option(
        "cosine_lr",
        "cosine to 0, constant, or divided by 10 at 50 % and at 75 % of the epochs; with method released it is that of "
        "the scores alone, divided every 30 epochs, and weights follow the cosine",
        choices=("cosine_lr", "constant_lr", "multistep_lr"),
    )
    warmup_length: int = option(0, "epochs over which learning rates rise; below epochs", within="[0, inf)")
    label_smoothing: float = option(
        0.0, "label smoothing of the training loss; losses of held-out and test images have none", within="[0, 1)"
    )
    clip_norm: float = option(3.0, "largest gradient norm, of the weights and of the scores each", within="(0, inf)")
    precision: str = option("fp32", "number format of the passes", choices=("fp32", "bf16"), common=True)
    ema: float = option(
        0.0,
        "decay of a moving average of the weights, kept while a fixed network is trained, so not in a search; it is "
        "what is evaluated and stored in best.pt. 0 for none",
        within="[0, 1)",
    )

    RULES: ClassVar = (
        Rule(
            lambda t: t.epochs != AUTO and t.warmup_length >= t.epochs,
            "{warmup_length} must be below {epochs}: both count epochs",
        ),
        Rule(
            lambda t: AUTO not in (t.epochs, t.search_epochs) and t.search_epochs >= t.epochs,
            "{search_epochs} must be below {epochs}: the rest of the epochs trains the chosen subnet",
        ),
        Rule(lambda t: t.nesterov and t.momentum == 0, "{nesterov} needs a momentum above 0, got {momentum}"),
    )


@dataclass(frozen=True)
class FinetuneConfig:
    """the choice of the subnet, and training its weights alone."""

    DEFAULTS: ClassVar = {"read_by": TWO_PHASE, "needs": {"finetune": (True,)}}

    finetune: bool = option(
        True, "train the chosen subnet's weights after the search", read_by=(), needs={}, resumed="may grow"
    )
    finetune_epochs: int | Literal["auto"] = option(
        40,
        "epochs of fine-tuning; methods without a search add them to epochs; auto: half as many as the search",
        within="[1, inf)",
        read_by=(),
        needs=AFTERWARDS,
        common=True,
        resumed="may grow",
    )
    finetune_policy: str = option(
        "constant",
        "constant: finetune_lr; continue: weight_lr by lr_policy, which then runs over search and fine-tuning as one",
        choices=("constant", "continue"),
        needs=AFTERWARDS,
    )
    finetune_lr: float = option(
        1e-3, "learning rate of fine-tuning", within="(0, inf)", needs={"finetune_policy": ("constant",)}
    )
    finetune_batch_size: int | Literal["auto"] = option(
        128, "images in a step of fine-tuning; auto: batch_size", within="[2, inf)", needs=AFTERWARDS
    )
    num_subnets: int = option(
        10,
        "subnets drawn as candidates beside the one of the highest scores",
        within="[0, 1000]",
        read_by=SCORED,
        needs={},
    )
    sample_from_training_set: bool | Literal["auto"] = option(
        False,
        "choose among candidates on training images instead of held-out ones; auto: if none are held out",
        read_by=SCORED,
        needs={},
    )
    bn_batches: int = option(
        50, "training batches used to re-estimate batch-norm statistics", within="[1, 10000]", needs={}
    )


@dataclass(frozen=True)
class Config:
    """All options, by owner: `config.sparsity.keep_ratio`."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    sparsity: SparsityConfig = SparsityConfig()
    train: TrainConfig = TrainConfig()
    finetune: FinetuneConfig = FinetuneConfig()

    RULES: ClassVar = (
        Rule(
            lambda c: c.method in ("thin", "random") and c.model.pretrained is not None,
            "{method} starts with new weights of its own widths, so {pretrained} cannot be used; leave it out",
        ),
        Rule(
            lambda c: c.data.holdout == 0 and not c.finetune.sample_from_training_set,
            "{holdout} and {sample_from_training_set} leave no images to choose the subnet with; pass "
            "--sample-from-training-set to choose on training images, or a holdout above 0",
        ),
        Rule(
            lambda c: c.train.ema > 0 and c.method in TWO_PHASE and not c.finetune.finetune,
            "{ema} averages weights while a fixed network is trained, and with {finetune} {method} never does "
            "that; pass --ema 0, or leave finetune on",
        ),
        Rule(
            lambda c: c.train.search_until == "decided" and c.method in TWO_PHASE and not c.finetune.finetune,
            "with {search_until} the chosen subnet is trained for the rest of the epochs, so {finetune} cannot be off; "
            "leave one of them out",
        ),
    )

    @property
    def method(self) -> str:
        """The name of the method."""
        return self.sparsity.method

    @property
    def shrinks(self) -> bool:
        """Whether units leave the parameters."""
        return self.sparsity.cuts and self.method != "released"

    @property
    def fixes_shapes(self) -> bool:
        """Whether the tensors of a search are as wide as nearly all masks need, and not as each mask wants them."""
        return self.sparsity.shapes == "fixed" and self.sparsity.execution == "compact" and self.method in ESTIMATED

    @property
    def replays_steps(self) -> bool:
        """Whether the steps of a search are recorded in CUDA graphs."""
        return self.sparsity.cuda_graphs == "on" and self.fixes_shapes

    @property
    def budget_falls(self) -> bool:
        """Whether the budget falls to `keep_ratio` during the search."""
        return self.sparsity.budget_schedule == "cubic" and self.method in FALLING

    @property
    def widths_of(self) -> str | None:
        """The run whose kept channels are trained from fresh weights, if there is one."""
        return self.model.widths_of if self.method == "thin" else None

    @property
    def independent_masks(self) -> bool:
        """Whether every process draws masks of its own."""
        return self.sparsity.rank_masks == "independent" and self.method in ESTIMATED

    @property
    def finetunes(self) -> bool:
        """Whether the run has a second phase with learning rate and batch size of its own."""
        return self.finetune.finetune and self.method in TWO_PHASE

    @property
    def ends_when_decided(self) -> bool:
        """Whether `epochs` counts the whole training, of which the search takes what it needs."""
        return self.train.search_until == "decided"

    @property
    def one_curve(self) -> bool:
        """Whether the learning rate of the weights follows one curve through all phases."""
        return self.ends_when_decided or self.finetune.finetune_policy == "continue"

    @property
    def search_epochs(self) -> int:
        """Epochs of the search, which may end earlier if it ends when it is decided."""
        return self.train.search_epochs if self.ends_when_decided else self.train.epochs

    @property
    def finetune_batch_size(self) -> int:
        """Images in a step after the search."""
        return self.train.batch_size if self.ends_when_decided else self.finetune.finetune_batch_size

    @property
    def total_epochs(self) -> int:
        """Epochs of all phases: methods without a search and fine-tuning train as long in one."""
        added = self.finetune.finetune and not self.ends_when_decided
        return self.train.epochs + (self.finetune.finetune_epochs if added else 0)


@dataclass(frozen=True)
class Arguments:
    """A config and, for every key, its origin: "default", "file" or "command line".

    Attributes:
        notices: what a user of the released code may not expect, a sentence each.
    """

    config: Config
    origin: dict[str, str]
    notices: tuple[str, ...] = ()


OPTIONS = options_of(Config, REMOVED)

USAGE = "python main.py [--config FILE.yaml] [options]"
DESCRIPTION = """\
Trains a channel-sparse CNN with VR-PGE: searches which units to keep while
training the weights, chooses one subnet, fine-tunes and evaluates it.

  python main.py --config configs/quickstart.yaml      a first run, no download
  python main.py --config FILE.yaml --keep-ratio 0.3   FILE, one option changed
  python main.py --resume PATH                         go on where a run stopped
  python main.py --list                                what there is to choose
  python main.py --doctor                              is this machine ready?
  python main.py --help all                            every option

The command line wins over the file, the file over the defaults. The file has
lines such as keep_ratio: 0.3. Dashes and underscores are the same; a switch is
turned on by --name or --name on, and off by --no-name or --name off.
--help shows the options that are needed first, --help all shows the rest too."""


# ---- what the program calls ----


def parse_args(argv: Sequence[str] | None = None) -> Arguments:
    """Read the command line (`sys.argv` if argv is None) and the YAML file it names.

    An option that has no effect is refused when the command line gives it; in a YAML file it is tolerated, so
    that one file serves all methods. With `resume` only single values are checked here: whether
    they go together depends on the stored config, so `check_resume` does the rest.

    Raises: UserError for every mistake. `--help` and `--list` print and exit with code 0.
    """
    about = "print every network, data set, method, estimator and shipped config"
    command_line = CommandLine(OPTIONS, Config, USAGE, DESCRIPTION, {"list": (about, catalogue)})
    written = command_line.read(sys.argv[1:] if argv is None else argv)
    path = resolve(OPTIONS, written).get("config")
    # What the command line replaces may be wrong in the file, such as the arch in that of the released code.
    replaced = {name for key in _keys(written) for name in OPTIONS[key].names}
    lines = [given for given in read_yaml(path.value) if given.name not in replaced] if path and path.value else []
    file = resolve(OPTIONS, lines)
    flags = resolve(OPTIONS, written, below=file)
    origin = {key: "command line" if key in flags else "file" if key in file else "default" for key in OPTIONS}
    config, where = _config_of({**file, **flags})
    if config.run.resume is None:
        check_together(OPTIONS, config, where)
        if not config.run.doctor:  # it looks for all sets, for example, whichever the options name
            check_effect(OPTIONS, config, flags)
    return Arguments(config, origin, _notices(config, origin, {given.name for given in (*written, *lines)}))


def _keys(given: Iterable[Given]) -> set[str]:
    """The keys of the options that are given, by whatever name."""
    names = {item.name for item in given}
    return {entry.key for entry in OPTIONS.values() if names & set(entry.names)}


def _notices(config: Config, origin: Mapping[str, str], names: set[str]) -> tuple[str, ...]:
    """What options do here that do something else in the released code, for which this was written by its names."""
    if not names & RELEASED_NAMES:
        return ()
    values = config_to_dict(config)
    return tuple(
        f"{key} {worded(values[key])} ({origin[key]}) {difference}"
        for key, (same, difference) in MEANS_OTHERWISE.items()
        if origin[key] != "default"
        and values[key] != same
        and (config.method != "released" or key == "width_mult")
        and not why_unread(OPTIONS, values, key)
    )


def config_from_dict(flat: Mapping[str, object], where: str) -> Config:
    """A config from a flat dictionary, checked like a file; missing keys get their defaults.

    Args:
        flat: plain Python values by key, as `config_to_dict` returns them.
        where: what messages call the dictionary, such as the path of a checkpoint.
    """
    config, places = _config_of(resolve(OPTIONS, read_dict(flat, where)))
    check_together(OPTIONS, config, places)
    return config


def config_from_file(path: str) -> Config:
    """The config of a YAML file alone. Raises: UserError for every mistake."""
    config, places = _config_of(resolve(OPTIONS, read_yaml(path)))
    check_together(OPTIONS, config, places)
    return config


def _config_of(given: dict[str, Setting]) -> tuple[Config, dict[str, str]]:
    """The config of all that is given, and where each key is from. With estimator taylor K is 1 unless it is given."""
    estimator, method = given.get("estimator"), given.get("method")
    reads_it = method is None or method.value in ESTIMATED
    if estimator and estimator.value == "taylor" and reads_it and "K" not in given:
        given = {**given, "K": Setting(1, estimator.where)}
    config = assemble(Config, {key: setting.value for key, setting in given.items()})
    return config, {key: setting.where for key, setting in given.items()}


def config_to_dict(config: Config) -> dict[str, object]:
    """The flat dictionary of plain Python values; `config_from_dict` reads it back."""
    return flatten(config)


def config_to_yaml(config: Config, origin: Mapping[str, str] | None = None) -> str:
    """The config as a YAML file by groups, each key followed by its origin if given; parses back to the same.

    `print_config` is left out: a file made by --print-config should train, not print again. So is `doctor`.
    """
    return to_yaml(config, origin or {}, leave_out=["print_config", "doctor"])


def check_resume(stored: Config, arguments: Arguments) -> Config:
    """The config to go on with: the stored one, and from the arguments only what may change or grow.

    The command line may raise the length of a run (`epochs`, `finetune_epochs`, `finetune` from off to on). It may also
    give options that the run has not read so far, such as those of fine-tuning to a run that had none.

    What is `auto` was settled when the run began, so it agrees with any stored value.

    Raises: UserError that lists every explicitly given key which differs from the stored run.
    """
    before, now = config_to_dict(stored), config_to_dict(arguments.config)
    origin = arguments.origin
    explicit = {key for key in OPTIONS if origin[key] != "default"}
    flags = {key for key in OPTIONS if origin[key] == "command line"}
    longer = [key for key in flags if OPTIONS[key].resumed == "may grow" and now[key] != AUTO]
    grown = {key for key in longer if now[key] > before[key]}
    if "arch" in explicit and is_own(before["arch"]) and is_own(now["arch"]):
        grown.add("arch")  # code may have moved; weights that do not fit are noticed
    new = {key for key in flags if OPTIONS[key].resumed != "this command" and why_unread(OPTIONS, before, key)}
    kept = [key for key in OPTIONS if OPTIONS[key].resumed in ("stored", "may grow") and key not in grown | new]
    conflicts = [key for key in kept if key in explicit and now[key] not in (before[key], AUTO)]
    if conflicts:
        listed = "; ".join(f"{key}: stored {before[key]}, given {now[key]} ({origin[key]})" for key in conflicts)
        lengths = [flag_of(key) for key in conflicts if OPTIONS[key].resumed == "may grow"]
        may_grow = f" ({' and '.join(lengths)} on the command line may make a run longer, not shorter)"
        raise UserError(
            f"these options differ from the run to resume: {listed}. Leave them out, because the stored "
            f"values are used{may_grow if lengths else ''}, or start a new run without --resume"
        )
    taken = grown | new | {key for key in explicit if OPTIONS[key].resumed == "may change"}
    if taken & {"device", "multigpu"}:
        taken |= {"device", "multigpu"}  # two ways to say one thing: a new answer replaces both
    taken |= {key for key, entry in OPTIONS.items() if entry.resumed == "this command"}
    config = config_from_dict({**before, **{key: now[key] for key in taken}}, "resumed run")
    check_effect(OPTIONS, config, flags, resumed=True)
    return config
