"""Every option of the program: frozen dataclasses, one per owner; defaults < YAML file < command line.

The YAML file and the command line are flat: one key per option, whatever its group. `utils/options.py`
reads text; this file declares the options and says which values do not go together.
"""

import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields

from utils.errors import UserError
from utils.options import (
    CommandLine,
    Setting,
    assemble,
    flatten,
    option,
    options_of,
    read_dict,
    read_yaml,
    resolve,
    to_yaml,
)

SETS = ("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "FashionMNIST-mini", "ImageFolder", "ImageNet")
ARCHS = (
    *("resnet20", "resnet32", "resnet44", "resnet56", "resnet110"),
    *("resnet8_he", "resnet20_he", "resnet32_he", "resnet44_he", "resnet56_he", "resnet110_he"),
    *("vgg11", "vgg13", "vgg16", "vgg19", "wrn28_10", "wrn16_8", "mobilenet_v1"),
    *("resnet18", "resnet34", "resnet50", "resnet101"),
)
from typing import NamedTuple


class Entry(NamedTuple):
    help: str
    path: str


METHODS = {
    n: Entry("", p)
    for n, p in {
        "vrpge": "trainers.methods.vrpge:PolicyGradient",
        "released": "trainers.methods.released:Released",
        "coin": "trainers.methods.vrpge:Coin",
        "dense": "trainers.methods.scratch:Dense",
        "thin": "trainers.methods.scratch:Thin",
        "random": "trainers.methods.scratch:RandomMask",
        "l1": "trainers.methods.pruning:FilterNorm",
        "slimming": "trainers.methods.pruning:Slimming",
        "sfp": "trainers.methods.pruning:SoftPruning",
        "gumbel": "trainers.methods.gumbel:Gumbel",
    }.items()
}
ESTIMATORS = {
    n: Entry("", "utils.algorithm.estimators." + p)
    for n, p in {
        "vrpge": "vrpge:VRPGEEstimator",
        "reinforce": "reinforce:Reinforce",
        "linear_cv_gates": "linear_cv_gates:LinearControlVariate",
        "taylor": "taylor:Taylor",
    }.items()
}
PAIR_ESTIMATORS = ()
GATE_ESTIMATORS = ("linear_cv_gates", "taylor")
LEARNING_ESTIMATORS = GATE_ESTIMATORS
ONE_PHASE = ("dense", "thin", "random")  # methods without a search: one schedule over all epochs
INITS = ("kaiming_normal", "kaiming_uniform", "xavier_normal", "xavier_uniform", "orthogonal")
NOT_A_PERCENTAGE = "it is a fraction, not a percentage"


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

    config: str | None = option(None, "YAML file with options as lines 'key: value'", metavar="PATH")
    name: str | None = option(None, "name of the run's folder", check=_check_name, default_text="the arch")
    log_dir: str = option("runs", "folder of all runs", metavar="PATH")
    seed: int = option(0, "seed of every random generator", within="[0, 2147483647]")
    device: str = option("auto", "auto, cpu, cuda or cuda:N", check=_check_device, metavar="DEVICE")
    multigpu: str | None = option(
        None,
        "GPU ids, as in the released code: 0, or 0,1,2 for a process on each, which train one network together",
        check=_check_multigpu,
        metavar="IDS",
    )
    resume: str | None = option(
        None, "go on with the newest run of this path, or with the one at PATH", metavar="PATH", bare="auto"
    )
    evaluate: bool = option(False, "evaluate the run given by --resume and exit")
    print_freq: int = option(50, "steps between log lines", within="[1, inf)")
    save_every: int = option(
        0,
        "also keep a numbered checkpoint every this many epochs; 0: only last and best",
        within="[0, inf)",
    )
    test_every: int = option(
        1,
        "epochs between evaluations on test images, which choose nothing; 0: only of what may be the result",
        within="[0, inf)",
    )
    trainer: str = option("default", "the trainer", choices=("default",))
    print_config: bool = option(False, "print the resolved options as YAML and exit")
    dry_run: bool = option(False, "build everything, run one batch and exit")


@dataclass(frozen=True)
class DataConfig:
    """which images, and how they are read."""

    set: str = option("FashionMNIST-mini", "the data set", choices=SETS)
    data: str = option("dataset", "root folder of the data sets", metavar="PATH")
    holdout: float = option(
        0.1,
        "fraction of the training images held out to choose subnets and checkpoints",
        within="[0, 0.5]",
        hint=NOT_A_PERCENTAGE,
    )
    train_images: int = option(
        0,
        "train on so many of the images that are not held out, the same for every seed, classes in proportion; 0: all",
        within="[0, inf)",
    )
    image_size: int = option(
        0,
        "ImageFolder: resize to this many pixels, 8 to 512, from 128 on streamed from the files; 0: as stored. "
        "ImageNet: 0 is 224",
        check=_check_image_size,
    )
    workers: int = option(
        2, "ImageFolder, ImageNet: threads that check and decode images, or processes that stream", within="[0, 64]"
    )
    bad_images: str = option(
        "error",
        "ImageFolder, ImageNet: refuse files that are no whole images, or leave them out and name them",
        choices=("error", "skip"),
    )


@dataclass(frozen=True)
class ModelConfig:
    """the network and its first weights."""

    arch: str = option("resnet32", "the network", choices=ARCHS)
    conv_type: str = option(
        "VRPGE",
        "VRPGE: convs with masks; DenseConv: plain ones, no masks anywhere",
        choices=("VRPGE", "DenseConv"),
    )
    width_mult: float = option(1.0, "factor on all channel counts", within="[0.01, 16]")
    init: str = option("kaiming_normal", "how conv weights start", choices=INITS)
    mode: str = option("fan_in", "kaiming inits: the fan used", choices=("fan_in", "fan_out"))
    nonlinearity: str = option("relu", "kaiming inits: the gain used", choices=("relu", "leaky_relu", "linear"))
    first_layer_dense: bool = option(False, "never mask the first conv")
    last_layer_dense: bool = option(
        False, "never mask the last conv before the classifier (the classifier itself never is)"
    )
    pretrained: str | None = option(
        None,
        "weights that start the run: a checkpoint, a state dict, or torchvision's such as ResNet50_Weights.DEFAULT",
        metavar="PATH",
    )


@dataclass(frozen=True)
class SparsityConfig:
    """how many units are kept, and how they are searched."""

    method: str = option(
        "vrpge",
        "vrpge: ours; dense: the plain network; thin: narrower layers; random: random units; coin: vrpge with tossed "
        "coins for losses; l1, slimming, sfp: train dense, prune by filters or batch-norm, fine-tune; gumbel: scores "
        "by backward through soft gates",
        choices=tuple(METHODS),
    )
    keep_ratio: float = option(
        0.5,
        "fraction of units KEPT, as in the released code",
        within="(0, 1]",
        hint=NOT_A_PERCENTAGE,
        aliases=("prune_rate",),
    )
    budget: str = option(
        "channels",
        "what keep_ratio counts, on average over the masks: channels, or what they cost in params or flops",
        choices=("channels", "params", "flops"),
    )
    score_init_constant: float | None = option(
        None,
        "start value of every score; for a budget of params or flops the default is what meets it",
        within="(0, 1]",
        hint=NOT_A_PERCENTAGE,
        default_text="keep_ratio; 1 with budget_schedule cubic",
    )
    K: int = option(2, "masks drawn a step; 1 with estimator taylor", within="[1, 64]")
    weight_samples: int = option(1, "how many of the K masks feed the weight gradient; at most K", within="[1, 64]")
    alpha: float = option(0.5, "exponent of the estimator's preconditioner", within="[0.5, 1)")
    estimator: str = option(
        "vrpge",
        "how the gradient of the scores is estimated, see docs/estimators.md; subbatch is asked for by --subbatch N",
        choices=tuple(ESTIMATORS),
    )
    score_gradient: str = option(
        "raw",
        "raw; tangent: without the part that would exceed the budget, which the projection undoes but Adam scales up",
        choices=("raw", "tangent"),
    )
    constrain_by_layer: bool = option(False, "a budget per layer instead of one for all")
    semantics: str = option(
        "unit",
        "unit: a dropped unit is exactly zero; released: only its conv weight is",
        choices=("unit", "released"),
    )
    execution: str = option(
        "compact",
        "compact: compute kept channels only; masked: compute all, multiply by masks",
        choices=("compact", "masked"),
    )
    residual_masks: str = option(
        "free",
        "free: all layers that add into a residual stream draw their own masks; tied: they share one",
        choices=("free", "tied"),
        aliases=("stream",),
    )
    retire: str = option(
        "on",
        "on: units whose scores provably stay 0 leave parameters and optimizer (compact execution); off: they stay",
        choices=("on", "off"),
    )
    score_every: int = option(
        1, "update the scores every this many steps; the other steps run one forward pass", within="[1, inf)"
    )
    gauge_every: int = option(
        0,
        "measure the share of signal in the scores' gradient every this many steps, for K more passes; 0: never",
        within="[0, inf)",
    )
    subbatch: int = option(
        0,
        "this many extra masks, each on its part of the batch, instead of the second mask on all of it; 0: off",
        within="[0, 64]",
    )
    rank_masks: str = option(
        "shared",
        "several processes: all draw the same masks, or each its own, which makes the scores' gradient less noisy",
        choices=("shared", "independent"),
    )
    budget_schedule: str = option(
        "constant",
        "constant: keep_ratio from the first step; cubic: falls from 1 to it",
        choices=("constant", "cubic"),
    )
    budget_start: float = option(
        0.0,
        "cubic: where the fall begins, as a fraction of the steps",
        within="[0, 1]",
        hint=NOT_A_PERCENTAGE,
    )
    budget_end: float = option(
        0.4, "cubic: where the fall ends, as a fraction of the steps", within="[0, 1]", hint=NOT_A_PERCENTAGE
    )

    slimming_penalty: float = option(1e-4, "slimming: weight of the sum of batch-norm scales", within="[0, inf)")

    @property
    def least_gauged_batch(self) -> int:
        """Images of one process that `gauge_every` needs: two in each part of each half of a batch."""
        return 4 * max(1, self.subbatch)

    @property
    def retires(self) -> bool:
        """Whether units leave the parameters: an exact saving that only compact execution can make."""
        return self.retire == "on" and self.execution == "compact"

    @property
    def score_init(self) -> float:
        """The start value of every score, with the default filled in; for params and flops the network has its own."""
        if self.score_init_constant is not None:
            return self.score_init_constant
        return 1.0 if self.budget_schedule == "cubic" else self.keep_ratio


@dataclass(frozen=True)
class TrainConfig:
    """the search: weights and scores together."""

    epochs: int = option(300, "epochs of the search", within="[1, inf)")
    batch_size: int = option(256, "images a step, of all processes together", within="[2, inf)")
    optimizer: str = option("adam", "optimizer of the scores (weights: SGD)", choices=("adam", "sgd"))
    score_lr: float = option(12e-3, "learning rate of the scores", within="(0, inf)", aliases=("lr",))
    weight_lr: float = option(0.1, "learning rate of the weights", within="(0, inf)", aliases=("weight_opt_lr",))
    momentum: float = option(0.9, "momentum of SGD", within="[0, 1)")
    weight_decay: float = option(5e-4, "weight decay of the weights", within="[0, inf)")
    nesterov: bool = option(False, "Nesterov's momentum in SGD")
    lr_policy: str = option(
        "cosine_lr",
        "cosine to 0, constant, or a tenth from 50 % and again from 75 % of the epochs",
        choices=("cosine_lr", "constant_lr", "multistep_lr"),
    )
    warmup_length: int = option(0, "epochs over which learning rates rise; below epochs", within="[0, inf)")
    label_smoothing: float = option(0.0, "label smoothing of the training loss", within="[0, 1)")
    clip_norm: float = option(3.0, "largest gradient norm", within="(0, inf)")
    clip_jointly: bool = option(False, "one norm over weights and scores, as in the released code; off: one each")
    precision: str = option("fp32", "number format of the passes", choices=("fp32", "bf16"))
    sync_bn: bool = option(False, "several GPUs: batch-norm over the whole batch instead of each process's part of it")


@dataclass(frozen=True)
class FinetuneConfig:
    """the choice of the subnet, and training its weights alone."""

    finetune: bool = option(True, "train the chosen subnet's weights after the search; off: --no-finetune")
    finetune_epochs: int = option(40, "epochs of fine-tuning", within="[1, inf)")
    finetune_lr: float = option(1e-3, "learning rate of fine-tuning", within="(0, inf)")
    finetune_policy: str = option(
        "constant",
        "constant: finetune_lr; continue: weight_lr by lr_policy, which then runs over search and fine-tuning as one",
        choices=("constant", "continue"),
    )
    finetune_batch_size: int = option(128, "images a step of fine-tuning", within="[2, inf)")
    num_subnets: int = option(
        10, "subnets drawn as candidates beside the one of the highest scores", within="[0, 1000]"
    )
    sample_from_training_set: bool = option(
        False, "choose among candidates on training images instead of held-out ones"
    )
    bn_batches: int = option(50, "training batches used to re-estimate batch-norm statistics", within="[1, 10000]")


@dataclass(frozen=True)
class Config:
    """All options, by owner: `config.sparsity.keep_ratio`."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    sparsity: SparsityConfig = SparsityConfig()
    train: TrainConfig = TrainConfig()
    finetune: FinetuneConfig = FinetuneConfig()

    @property
    def method(self) -> str:
        """The method, by whichever of two names a dense network was asked for."""
        return "dense" if self.model.conv_type == "DenseConv" else self.sparsity.method

    @property
    def shrinks(self) -> bool:
        return self.sparsity.retires and self.method != "released"

    @property
    def finetunes(self) -> bool:
        """Whether the run has a second phase with learning rate and batch size of its own."""
        return self.finetune.finetune and self.method not in ONE_PHASE

    @property
    def total_epochs(self) -> int:
        """Epochs of all phases: methods without a search and fine-tuning train as long in one."""
        return self.train.epochs + (self.finetune.finetune_epochs if self.finetune.finetune else 0)


@dataclass(frozen=True)
class Arguments:
    """A config and, for every key, its origin: "default", "file" or "command line"."""

    config: Config
    origin: dict[str, str]


OPTIONS = options_of(Config)

DESCRIPTION = """\
Trains a channel-sparse CNN with VR-PGE: searches which units to keep while
training the weights, chooses one subnet, fine-tunes and evaluates it.

  python main.py --config configs/quickstart.yaml      a first run, no download
  python main.py --config FILE.yaml --keep-ratio 0.3   FILE, one option changed
  python main.py --resume PATH                         go on where a run stopped

The command line wins over the file, the file over the defaults. The file has
lines such as keep_ratio: 0.3. Dashes and underscores are the same; a switch is
turned on by --name and off by --no-name."""

FINETUNE_KEYS = {"finetune_epochs", "finetune_lr", "finetune_policy", "finetune_batch_size"}

# A dense network reads none of these: it has no masks to search and no subnet to choose and fine-tune.
MASKING_KEYS = {field.name for group in (SparsityConfig, FinetuneConfig) for field in fields(group)} | {
    *("first_layer_dense", "last_layer_dense", "optimizer", "score_lr", "clip_jointly"),
}
MASKING_KEYS -= {"method", "finetune", "finetune_epochs"}  # the last two say for how many epochs it trains

# What trains scores and chooses among subnets drawn from them.
POLICY_KEYS = {
    *("K", "weight_samples", "alpha", "estimator", "score_gradient", "score_every", "gauge_every", "subbatch"),
    "rank_masks",
}
SCORE_KEYS = POLICY_KEYS | {
    *("score_init_constant", "budget_schedule", "budget_start", "budget_end", "num_subnets"),
    *("sample_from_training_set", "optimizer", "score_lr", "clip_jointly"),
}
# What a network that is thin from the first step does not read: it has no second phase, and nothing left to retire.
SCRATCH_KEYS = {"retire", "bn_batches", "finetune_lr", "finetune_policy", "finetune_batch_size"}

USELESS_KEYS = {  # by method
    "vrpge": {"slimming_penalty"},
    "coin": {"slimming_penalty"},
    "gumbel": {"slimming_penalty", *POLICY_KEYS},
    "thin": {"slimming_penalty", "constrain_by_layer", "residual_masks", *SCORE_KEYS, *SCRATCH_KEYS},
    "random": {"slimming_penalty", *SCORE_KEYS, *SCRATCH_KEYS},
    "l1": {"slimming_penalty", "constrain_by_layer", *SCORE_KEYS},
    "sfp": {"slimming_penalty", "constrain_by_layer", *SCORE_KEYS},
    "slimming": SCORE_KEYS,
}

# What concerns one command, never the run that is resumed.
COMMAND_KEYS = {"resume", "evaluate", "dry_run", "print_config"}
MAY_CHANGE = COMMAND_KEYS | {
    "device", "multigpu", "sync_bn", "workers", "print_freq", "save_every", "test_every", "data", "log_dir", "name",
    "config",
}  # fmt: skip


def parse_args(argv: Sequence[str] | None = None) -> Arguments:
    """Read the command line (`sys.argv` if argv is None) and the YAML file it names.

    An option that has no effect is refused when the command line gives it; in a YAML file it is tolerated, so
    that one file serves all methods. With `resume` only single values are checked here: whether
    they go together depends on the stored config, so `check_resume` does the rest.

    Raises: UserError for every mistake. `--help` prints and exits with code 0.
    """
    command_line = CommandLine(Config, "python main.py [--config FILE.yaml] [options]", DESCRIPTION)
    written = resolve(OPTIONS, command_line.read(sys.argv[1:] if argv is None else argv))
    flags = _by_both_names(written)
    path = flags["config"].value if "config" in flags else None
    file = _by_both_names(resolve(OPTIONS, read_yaml(path))) if path else {}

    given = _with_one_mask({**file, **flags})
    origin = {key: "command line" if key in flags else "file" if key in file else "default" for key in OPTIONS}
    config = assemble(Config, {key: setting.value for key, setting in given.items()})
    if config.run.resume is None:
        check_together(config, {key: setting.where for key, setting in given.items()})
        check_effect(config, written)
    return Arguments(config, origin)


def config_from_dict(flat: Mapping[str, object], where: str) -> Config:
    """A config from a flat dictionary, checked like a file; missing keys get their defaults.

    Args:
        flat: plain Python values by key, as `config_to_dict` returns them.
        where: what messages call the dictionary, such as the path of a checkpoint.
    """
    settings = _with_one_mask(_by_both_names(resolve(OPTIONS, read_dict(flat, where))))
    config = assemble(Config, {key: setting.value for key, setting in settings.items()})
    check_together(config, dict.fromkeys(settings, where))
    return config


def _with_one_mask(given: dict[str, Setting]) -> dict[str, Setting]:
    """All that is given, and the K that goes with estimator taylor, unless it is."""
    estimator = given.get("estimator")
    if estimator and estimator.value == "taylor" and "K" not in given:
        return given | {"K": Setting(1, estimator.where)}
    return given


def _by_both_names(given: dict[str, Setting]) -> dict[str, Setting]:
    """What one place gives, and the other name of what has two.

    With `method` comes the `conv_type` that goes with it, or the other way round; with `subbatch` the estimator.
    """
    subbatch = given.get("subbatch")
    if subbatch and subbatch.value and "estimator" not in given:
        given = given | {"estimator": Setting("subbatch", subbatch.where)}
    method, conv_type = given.get("method"), given.get("conv_type")
    if method and not conv_type:
        return given | {"conv_type": Setting("DenseConv" if method.value == "dense" else "VRPGE", method.where)}
    if conv_type and not method and conv_type.value == "DenseConv":
        return given | {"method": Setting("dense", conv_type.where)}
    return given


def config_to_dict(config: Config) -> dict[str, object]:
    """The flat dictionary of plain Python values; `config_from_dict` reads it back."""
    return flatten(config)


def config_to_yaml(config: Config, origin: Mapping[str, str] | None = None) -> str:
    """The config as a YAML file by groups, each key followed by its origin if given; parses back to the same.

    `print_config` is left out: a file made by --print-config should train, not print again.
    """
    return to_yaml(config, origin or {}, leave_out=["print_config"])


def check_resume(stored: Config, arguments: Arguments) -> Config:
    """The config to go on with: the stored one, and from the arguments only what may change.

    Raises: UserError that lists every explicitly given key which differs from the stored run.
    """
    before, now = config_to_dict(stored), config_to_dict(arguments.config)
    explicit = {key for key, origin in arguments.origin.items() if origin != "default"}
    conflicts = [key for key in OPTIONS if key in explicit - MAY_CHANGE and before[key] != now[key]]
    if conflicts:
        listed = "; ".join(
            f"{key}: stored {before[key]}, given {now[key]} ({arguments.origin[key]})" for key in conflicts
        )
        raise UserError(
            f"these options differ from the run to resume: {listed}. Leave them out, because the stored "
            "values are used, or start a new run without --resume"
        )
    taken = COMMAND_KEYS | (explicit & MAY_CHANGE)
    if taken & {"device", "multigpu"}:
        taken |= {"device", "multigpu"}  # two ways to say one thing: a new answer replaces both
    config = config_from_dict({**before, **{key: now[key] for key in taken}}, "resumed run")
    check_effect(config, {key for key, origin in arguments.origin.items() if origin == "command line"})
    return config


def check_together(config: Config, where: Mapping[str, str]) -> None:
    """Refuse values that contradict each other; `where` says for the keys given who gave them."""
    values = config_to_dict(config)

    def told(key: str) -> str:
        return f"{key} {values[key]} ({where.get(key, 'default')})"

    sparsity, run, method = config.sparsity, config.run, config.method
    if (sparsity.method == "dense") != (config.model.conv_type == "DenseConv"):
        raise UserError(
            f"{told('method')} and {told('conv_type')} contradict each other: DenseConv is the conv_type of method "
            "dense alone; leave one of them out"
        )
    if method in ("thin", "random") and sparsity.execution != "compact":
        raise UserError(
            f"{told('method')} needs compact execution, because the channels that it leaves out do not exist, got "
            f"{told('execution')}; leave it out"
        )
    if method in ("thin", "random") and config.model.pretrained is not None:
        raise UserError(
            f"{told('method')} starts with new weights of its own widths, so {told('pretrained')} cannot be used; "
            "leave it out"
        )
    if method == "gumbel" and sparsity.semantics == "released":
        raise UserError(
            f"{told('method')} needs semantics unit, because batch-norm undoes a gate in front of it, got "
            f"{told('semantics')}; leave it out"
        )
    if sparsity.weight_samples > sparsity.K:
        raise UserError(f"{told('weight_samples')} is more than {told('K')}: only K masks are drawn; pass at most K")
    if (sparsity.estimator == "subbatch") != (sparsity.subbatch > 0):
        raise UserError(
            f"{told('estimator')} and {told('subbatch')} contradict each other: masks for parts of the batch, one or "
            "more, are those of estimator subbatch and of no other; pass --subbatch N alone, or --subbatch 0 with "
            "another estimator"
        )
    if sparsity.estimator in PAIR_ESTIMATORS and sparsity.K != 2:
        raise UserError(f"{told('estimator')} draws masks in pairs, so it needs K 2, got {told('K')}; leave K out")
    if sparsity.estimator in LEARNING_ESTIMATORS and sparsity.rank_masks != "shared":
        raise UserError(
            f"{told('estimator')} learns from losses under masks that all processes share, got {told('rank_masks')}; "
            "leave one of them out"
        )
    if (sparsity.estimator == "taylor") != (sparsity.K == 1):
        raise UserError(
            f"{told('estimator')} and {told('K')} contradict each other: estimator taylor compares no masks and draws "
            "one, the others two or more; leave K out"
        )
    if sparsity.estimator in GATE_ESTIMATORS and sparsity.weight_samples != 1:
        raise UserError(
            f"{told('estimator')} reads the gradients of one mask, so it needs weight_samples 1, got "
            f"{told('weight_samples')}; leave one of them out"
        )
    if sparsity.estimator in GATE_ESTIMATORS and method == "coin":
        raise UserError(
            f"{told('estimator')} learns from gradients, which no coin tosses, so {told('method')} would be no "
            "control; leave one of them out"
        )
    if sparsity.estimator in GATE_ESTIMATORS and sparsity.semantics == "released":
        raise UserError(
            f"{told('estimator')} reads gates behind batch-norm, but with {told('semantics')} a dropped unit leaves "
            "the shift of its batch-norm; leave one of them out"
        )
    if sparsity.gauge_every and sparsity.estimator == "taylor":
        raise UserError(
            f"{told('gauge_every')} compares estimates from two draws, but {told('estimator')} reads no masks; leave "
            "one of them out"
        )
    if sparsity.subbatch and (sparsity.K, sparsity.weight_samples) != (2, 1):
        raise UserError(
            f"{told('subbatch')} needs K 2 and weight_samples 1, got {told('K')} and {told('weight_samples')}: "
            "its extra masks take the place of the second one"
        )
    if sparsity.subbatch > config.train.batch_size // 2:
        raise UserError(
            f"{told('subbatch')} leaves parts of less than two images of {told('batch_size')}; pass fewer masks"
        )
    if sparsity.gauge_every and config.train.batch_size < sparsity.least_gauged_batch:
        raise UserError(
            f"{told('gauge_every')} measures on halves of a batch, which {told('batch_size')} leaves too small; pass "
            f"--batch-size {sparsity.least_gauged_batch} or more"
        )
    if sparsity.budget_start >= sparsity.budget_end:
        raise UserError(f"{told('budget_start')} must be below {told('budget_end')}: the budget falls between them")
    if sparsity.semantics == "released" and sparsity.execution != "masked":
        raise UserError(
            f"{told('semantics')} cannot run with {told('execution')}, because its dropped channels are not "
            "zero; pass --execution masked"
        )
    if sparsity.constrain_by_layer and sparsity.budget != "channels":
        raise UserError(
            f"{told('constrain_by_layer')} needs budget channels, got {told('budget')}: what a layer costs depends on "
            "its neighbours; leave one of them out"
        )
    trains_scores = method in ("vrpge", "coin", "gumbel")
    overspent = sparsity.budget_schedule == "constant" and sparsity.score_init > sparsity.keep_ratio and trains_scores
    if overspent and sparsity.budget == "channels":  # other budgets: once there is a network
        raise UserError(
            f"{told('score_init_constant')} is above {told('keep_ratio')}: the start would overspend the "
            f"budget; pass --score-init-constant {sparsity.keep_ratio} or less, or --budget-schedule cubic"
        )
    if config.train.sync_bn and sparsity.rank_masks != "shared":
        raise UserError(f"{told('sync_bn')} needs rank_masks shared, got {told('rank_masks')}; leave one of them out")
    if config.train.sync_bn and (config.model.conv_type == "DenseConv" or sparsity.execution != "compact"):
        raise UserError(
            f"{told('sync_bn')} needs compact execution, got {told('conv_type')} and {told('execution')}; leave it out"
        )
    if config.train.warmup_length >= config.train.epochs:
        raise UserError(f"{told('warmup_length')} must be below {told('epochs')}: both count epochs")
    if config.train.nesterov and config.train.momentum == 0:
        raise UserError(f"{told('nesterov')} needs a momentum above 0, got {told('momentum')}")
    if config.train.sync_bn and method == "gumbel":
        raise UserError(f"{told('sync_bn')} needs compact execution, but {told('method')} trains dense; leave it out")
    if trains_scores and config.data.holdout == 0 and not config.finetune.sample_from_training_set:
        raise UserError(
            f"{told('holdout')} leaves no images to choose the subnet with; "
            "pass --sample-from-training-set to choose on training images, or a holdout above 0"
        )
    if run.evaluate and run.resume is None:
        raise UserError(f"{told('evaluate')} needs a trained run; pass --resume PATH")
    if run.multigpu is not None and run.device not in ("auto", "cuda", f"cuda:{run.multigpu}"):
        raise UserError(f"{told('device')} and {told('multigpu')} contradict each other; pass one of them")


def check_effect(config: Config, flags: Collection[str]) -> None:
    """Refuse keys on the command line (`flags`) that this config never reads."""
    method, init, data_set = config.method, config.model.init, config.data.set
    rules = [
        (
            config.sparsity.execution == "masked",
            {"retire"},
            "execution is masked, where all parameters stay; pass --execution compact",
        ),
        (
            method == "dense",
            MASKING_KEYS,
            "conv_type is DenseConv (no masks, no subnet); pass another --method",
        ),
        (
            method != "dense",
            USELESS_KEYS.get(method, set()),
            f"method is {method}; pass another --method",
        ),
        (not config.finetune.finetune, FINETUNE_KEYS, "finetune is off; pass --finetune"),
        (
            config.finetune.finetune_policy == "continue",
            {"finetune_lr"},
            "finetune_policy is continue; pass --finetune-policy constant",
        ),
        (
            config.sparsity.budget_schedule == "constant",
            {"budget_start", "budget_end"},
            "budget_schedule is constant; pass --budget-schedule cubic",
        ),
        (not init.startswith("kaiming"), {"mode", "nonlinearity"}, f"init is {init}; pass a kaiming init"),
        (
            data_set == "FashionMNIST-mini",
            {"data"},
            f"set {data_set} is in the repository; pass another --set",
        ),
        (
            data_set not in ("ImageFolder", "ImageNet"),
            {"image_size", "workers", "bad_images"},
            f"set is {data_set}; pass --set ImageFolder",
        ),
    ]
    for applies, keys, reason in rules:
        useless = [f"--{key.replace('_', '-')}" for key in OPTIONS if applies and key in keys and key in flags]
        if useless:
            verb = "has" if len(useless) == 1 else "have"
            raise UserError(f"{', '.join(useless)} (command line) {verb} no effect: {reason}, or leave it out")
