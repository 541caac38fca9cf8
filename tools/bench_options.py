"""The command line of the bench."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from args import ESTIMATED, Arguments, Config, config_from_dict, config_to_dict, parse_args
from models import allow
from tools.bench_measures import WARM_UP_STEPS
from tools.bench_networks import EVERY_NETWORK, FURTHER
from tools.bench_scores import MADE_SCORES
from tools.command_line import ToolParser, whole_number
from trainers.automatic import check_settled
from trainers.methods import make_method
from utils.errors import UserError
from utils.options import flag_of
from utils.run import checkpoint
from utils.run.folder import resolve_run

REPEATS = 7
OF_TIMES = ("--repeats", "--warm-up", "--no-memory", "--beside")  # have no effect on a count
NOT_COUNTED = ("batch_size", "shapes", "cuda_graphs")  # nor have these of training


def make_parser() -> ToolParser:
    about = "Times a training step against a dense and a thin network. Takes the options of main.py as well."
    parser = ToolParser("tools.bench", about)
    about = f"steps that are timed (default: {REPEATS})"
    parser.add_argument("--repeats", type=whole_number(1, 10000), metavar="N", help=about)
    about = (
        f"steps before them, which do not count (default: {WARM_UP_STEPS}); a GPU needs about 100 until it has seen "
        "the shapes of the draws, and the output tells how many of the shapes were new"
    )
    parser.add_argument("--warm-up", type=whole_number(1, 10000), metavar="N", help=about)
    about = "pad kept channels of compact and thin to a multiple of N (default: what suits the device)"
    parser.add_argument("--multiple", type=whole_number(1, 128), metavar="N", help=about)
    parser.add_argument("--input-size", type=whole_number(8, 512), default=32, metavar="N", help="pixels of an image")
    parser.add_argument("--num-classes", type=whole_number(2, 10**6), default=10, metavar="N", help="classes")
    about = "uniform: all equal; late: most are 0; or those of a run or checkpoint, which brings its configuration"
    parser.add_argument("--scores", default="uniform", metavar="uniform|late|RUN", help=about)
    about = (
        "further networks: the dense one compiled by torch.compile, which takes a minute or more (compiled), dense and "
        "thin in CUDA graphs (graphs), compact with other values of --shapes and --cuda-graphs (shapes), or none; "
        "default: compiled and graphs on a GPU, none on a CPU"
    )
    parser.add_argument("--beside", nargs="+", choices=(*FURTHER, "none"), help=about)
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    about = "count the operations of a step instead, of these networks (default: that of --arch)"
    parser.add_argument("--count-ops", nargs="*", metavar="ARCH", help=about)
    parser.add_argument("--peak", choices=EVERY_NETWORK, help=argparse.SUPPRESS)
    return parser


def read_command_line(argv: Sequence[str]) -> tuple[argparse.Namespace, Config]:
    """The options of the bench, and the configuration that all others make, as in `main.py`.

    Raises: UserError for every mistake.
    """
    settings, others = make_parser().parse_known_args(argv)
    if settings.beside is not None and "none" in settings.beside and len(settings.beside) > 1:
        raise UserError(f"--beside {' '.join(settings.beside)}: none goes with nothing else")
    settings.repeats, settings.warm_up = settings.repeats or REPEATS, settings.warm_up or WARM_UP_STEPS
    arguments = parse_args(others)
    if settings.count_ops is not None:
        check_counting(argv, arguments)
    config = arguments.config
    allow(config.model.arch, arguments.origin["arch"])
    if config.run.resume is not None:
        raise UserError("--resume (command line) goes on with a run, which the bench never does; pass --scores RUN")
    if settings.scores not in MADE_SCORES:
        settings.scores = str(resolve_run(settings.scores)[1])
        stored = checkpoint.load(settings.scores)["config"] | {"device": "auto", "multigpu": None}
        given = {key: config_to_dict(config)[key] for key, origin in arguments.origin.items() if origin != "default"}
        config = config_from_dict(stored | given, settings.scores)
    if not make_method(config).has_scores:
        raise UserError(f"method {config.method} has no scores to draw masks from; pass --method vrpge")
    check_settled(config, "the bench")
    two_shapes = settings.count_ops is not None or "shapes" in (settings.beside or ())
    if two_shapes and (config.method not in ESTIMATED or config.sparsity.execution != "compact"):
        what = "--count-ops" if settings.count_ops is not None else "--beside shapes"
        raise UserError(
            f"{what} runs compact with either value of --shapes, which method {config.method} with "
            f"{config.sparsity.execution} execution does not read; pass --method vrpge --execution compact"
        )
    return settings, replace(config, model=replace(config.model, pretrained=None, widths_of=None))


def check_counting(argv: Sequence[str], arguments: Arguments) -> None:
    """Raises UserError for what the command line says about times, or about what is counted anyway."""
    flags = [flag_of(key) for key in NOT_COUNTED if arguments.origin[key] == "command line"]
    flags += [word for word in argv if word.partition("=")[0] in OF_TIMES]
    if flags:
        raise UserError(
            f"{flags[0]} (command line) has no effect with --count-ops, which counts a step of two images with either "
            "value of --shapes, and times nothing; leave it out"
        )
