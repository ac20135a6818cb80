"""What can be set in a training: every option once, with its default, its bounds and its words.

The command line is made of these dataclasses, and so are the calls of a notebook. Nothing heavy is
imported here.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_type_hints

import typer

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


class Setting(NamedTuple):
    """What the command line says of a setting, and the bounds that it keeps."""

    help: str
    min: float | None = None
    max: float | None = None


SOURCE = "table, image folder, archive, hub id, or scenes:N for N drawn scenes"
AGAIN = SOURCE + "; again for more"
# With a default of its own in each stage.
Epochs = Annotated[float, Setting("how often to go through the data", 0)]
Rate = Annotated[float, Setting("learning rate of what starts pretrained", 0)]
RateNew = Annotated[float, Setting("learning rate of what starts at random", 0)]
BatchSize = Annotated[int, Setting("images a step, on each process", 1)]


@dataclass
class TrainingConfig:
    """How a run learns. `folder` receives `metrics.jsonl`, the last state and the best model."""

    folder: Annotated[Path, Setting("for states, metrics and the model")]
    epochs: Epochs = 10
    learning_rate: Rate = 1e-4
    learning_rate_new: RateNew = 3e-4
    weight_decay: Annotated[float, Setting("weight decay, on matrices only", 0)] = 0.05
    warmup: Annotated[float, Setting("share of the steps to warm up in", 0, 1)] = 0.05
    max_grad_norm: Annotated[float, Setting("a longer gradient is shortened to it", 0)] = 1.0
    gradient_accumulation: Annotated[int, Setting("batches to a step", 1)] = 1
    average: Annotated[
        float, Setting("evaluate and keep a running mean of the weights, with this decay", 0, 1)
    ] = 0.0
    evaluate_every: Annotated[int, Setting("steps between evaluations and states", 1)] = 200
    seed: Annotated[int, Setting("of everything that is drawn at random", 0, 2**63 - 1)] = 0
    tensorboard: Annotated[bool, Setting("write metrics for it, too")] = False


@dataclass
class Stage1Training(TrainingConfig):
    """How stage 1 learns (paper, section 3.2)."""

    objectives: Annotated[str, Setting("of itc, itm and itg")] = "itc,itm,itg"
    itm_pairs: Annotated[
        int | None, Setting("positives a batch for ITM, the most costly; default: all", 1)
    ] = None
    itg_pairs: Annotated[int | None, Setting("pairs a batch for ITG; default: all", 1)] = None
    random_negatives: Annotated[
        int, Setting("first steps in which ITM's negatives are random, then similar ones", 0)
    ] = 0
    spread: Annotated[
        float, Setting("weight of the cosine between queries; not in the paper", 0)
    ] = 0.0


@dataclass(kw_only=True)
class Reading:
    """What both stages ask of the data and of the run."""

    encoder: Annotated[
        str, Setting("efficientnet-lite2 or its smaller -lite0, a folder, or a hub id")
    ] = "efficientnet-lite2"
    queries: Annotated[int, Setting("learned queries, as many as in the paper", 1)] = 32
    weight: Annotated[
        list[float],
        Setting("how often the images of a --data are seen, one for each; default: 1", 0),
    ] = field(default_factory=list)
    views: Annotated[int, Setting("1: the images, 2: and mirrored, more: and random crops", 1)] = 2
    keep_features: Annotated[
        int | None, Setting("features of an image to learn from a step; default: all", 1)
    ] = None
    limit: Annotated[int | None, Setting("use the first N examples only", 1)] = None
    validation_split: Annotated[
        str, Setting("which part, of a hub data set or a divided folder")
    ] = "validation"
    resume: Annotated[bool, Setting("go on where a stopped run was")] = False


@dataclass(kw_only=True)
class Stage1Options(Stage1Training, Reading):
    """`train stage1`."""

    data: Annotated[list[str], Setting(AGAIN)]
    validation: Annotated[list[str], Setting(AGAIN)]
    size: Annotated[
        Literal["mini", "base"], Setting("start from MiniLM-L6, or as the paper from BERT-base")
    ] = "mini"
    start_from: Annotated[Path | None, Setting("folder of an earlier stage 1; default: --size")] = (
        None
    )
    batch_size: BatchSize = 64


@dataclass(kw_only=True)
class Stage2Options(TrainingConfig, Reading):
    """`train stage2`."""

    validation: Annotated[list[str], Setting(AGAIN)]
    data: Annotated[list[str], Setting("with captions; sources as for stage 1, again for more")] = (
        field(default_factory=list)
    )
    questions: Annotated[
        list[str], Setting("with questions; sources as for stage 1, again for more")
    ] = field(default_factory=list)
    ask_captions: Annotated[bool, Setting("and what the captions of --data answer")] = False
    question_weight: Annotated[
        list[float],
        Setting("as --weight, for each --questions, then for what --ask-captions asks", 0),
    ] = field(default_factory=list)
    share: Annotated[float, Setting("batches of questions for one of captions", 0)] = 0.5
    stage1: Annotated[Path | None, Setting("folder of a finished stage 1")] = None
    bridge: Annotated[str, Setting("qformer, or another that bridges.py has")] = "qformer"
    without_stage1: Annotated[bool, Setting("start from MiniLM, to see what stage 1 buys")] = False
    start_from: Annotated[
        str | None, Setting("go on from a finished stage 2: mini, or a folder")
    ] = None
    captions_per_image: Annotated[
        int, Setting("that share the reading of one image in a step", 1)
    ] = 3
    questions_per_step: Annotated[int, Setting("each about another image", 1)] = 32
    language_model: Annotated[str, Setting("smollm2-135m, a folder, or a hub id")] = "smollm2-135m"
    validation_limit: Annotated[
        int, Setting("images of each validation source to write about", 1)
    ] = 150
    epochs: Epochs = 5
    batch_size: BatchSize = 16
    learning_rate: Rate = 3e-4
    learning_rate_new: RateNew = 2e-3


KEYWORD = inspect.Parameter.KEYWORD_ONLY


def takes(options: "type[DataclassInstance]") -> Callable:
    """Make a command of a function (context, options): its parameters are the fields of `options`.

    What is required comes first, then what is the command's own.
    """
    hints = get_type_hints(options, include_extras=True)
    required = [x for x in fields(options) if x.default is x.default_factory is MISSING]
    others = [x for x in fields(options) if x not in required]
    others.sort(key=lambda x: x.name not in options.__annotations__)
    context = inspect.Parameter("context", KEYWORD, annotation=typer.Context)
    parameters = [context, *(_parameter(x, hints[x.name]) for x in required + others)]

    def decorate(function: Callable[[typer.Context, object], None]) -> Callable:
        @wraps(function)
        def command(context: typer.Context, **values: object) -> None:
            function(context, options(**values))

        command.__dict__["__signature__"] = inspect.Signature(parameters)
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


def _parameter(setting: Field, hint: Any) -> inspect.Parameter:
    """A field of an options dataclass as typer wants it."""
    words = hint.__metadata__[0]
    default = setting.default
    if setting.default_factory is not MISSING:
        default = setting.default_factory()
    names = [f"--{setting.name.replace('_', '-')}"] if default is False else []  # no --no-... twin
    option = typer.Option(
        *names,
        help=words.help,
        min=words.min,
        max=words.max,
        callback=_finite if hint.__origin__ in (float, list[float]) else None,
        file_okay=setting.name != "folder",
    )
    return inspect.Parameter(
        setting.name,
        KEYWORD,
        default=inspect.Parameter.empty if default is MISSING else default,
        annotation=Annotated[hint.__origin__, option],
    )


def _finite(value: float | list[float]) -> float | list[float]:
    """ "nan" and "inf" are floats, too, and refused."""
    for number in value if isinstance(value, list) else [value]:
        if not math.isfinite(number):
            raise typer.BadParameter(f"{number} is no number to train with.")
    return value
