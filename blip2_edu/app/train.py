"""The commands that train: `python -m blip2_edu train stage1|stage2`."""

import os
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from blip2_edu.app.options import Stage1Options, Stage2Options, takes
from blip2_edu.errors import TrainingError
from blip2_edu.paths import CHECKPOINTS

if TYPE_CHECKING:
    from blip2_edu.blip2 import Blip2
    from blip2_edu.data.batches import Joined, Source
    from blip2_edu.data.examples import Examples
    from blip2_edu.data.features import FeatureCache
    from blip2_edu.stage1 import Blip2Stage1
    from blip2_edu.vision import ImageEncoder

# What sets the direction of the letters around it.
TURNING = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"

train = typer.Typer(help="Train the Q-Former: stage 1, then stage 2.", rich_markup_mode=None)


def say(text: str, to_stderr: bool = False) -> None:
    """Print one line; what could move the cursor or turn letters around becomes a `?`.

    Names may hold both. Joiners and spaces of every width are letters of a name like others.
    """
    shown = []
    for c in text:
        harmless = unicodedata.category(c) in ("Zs", "Cf") and c not in TURNING
        shown.append(c if c.isprintable() or harmless else " " if c.isspace() else "?")
    typer.echo("".join(shown), err=to_stderr)


def same_file(path: Path, other: str | Path) -> bool:
    """Are these one file, by whatever way, or would be where letter case makes no difference?"""
    if path.exists() and os.path.exists(other) and path.samefile(other):
        return True
    return os.path.realpath(path).casefold() == os.path.realpath(other).casefold()


@train.command()
@takes(Stage1Options)
def stage1(context: typer.Context, options: Stage1Options) -> None:
    """Teach the Q-Former what of an image a text would say (paper, section 3.2).

    The best model, by retrieval on the validation data, ends up in the folder, ready for stage 2.
    """
    if options.start_from:
        keep_apart(options.folder, options.start_from)
        leave_out(context, "--start-from", "queries", "size")
    import torch
    from accelerate import PartialState

    from blip2_edu.checkpoints.runs import load_best
    from blip2_edu.data.batches import Source
    from blip2_edu.stage1 import load_stage1, parse_objectives, save_stage1
    from blip2_edu.training import train_stage1
    from blip2_edu.vision import load_image_encoder

    try:  # before the minutes that reading takes
        parse_objectives(options.objectives)
    except TrainingError as error:
        raise typer.BadParameter(str(error)) from error
    encoder = load_image_encoder(options.encoder).to(PartialState().device)
    torch.manual_seed(options.seed)
    if options.start_from:
        model = load_stage1(options.start_from)
        encoder.check_width(model.config.qformer.image_width)
    else:
        model = new_stage1(options.size, options.queries, encoder.width)
    sources = []
    for name in options.data:
        pair = read(name, encoder, views=options.views, limit=options.limit, need="captions")
        sources.append(
            Source(*pair, options.batch_size, options.seed, keep_features=options.keep_features)
        )
    batches = weighed(sources, options.weight, options.batch_size, "--weight")
    held_out = [
        read(name, encoder, options.validation_split, need="captions")
        for name in options.validation
    ]
    say(f"Stage 1: {options.objectives} on {batches.images} images.")
    train_stage1(model, batches, held_out, options, options.resume)
    if PartialState().is_main_process:
        load_best(model, options.folder)
        save_stage1(model, options.folder)
        say(f"The best model is in {options.folder}.")


@train.command()
@takes(Stage2Options)
def stage2(context: typer.Context, options: Stage2Options) -> None:
    """Teach the Q-Former to speak to a frozen language model (paper, section 3.3).

    The best model, by CIDEr and VQA accuracy on the validation data, ends up in the folder; name
    that folder as the --model of other commands.
    """
    if sum(map(bool, (options.stage1, options.without_stage1, options.start_from))) != 1:
        raise typer.BadParameter("give --stage1 FOLDER, --without-stage1 or --start-from FOLDER.")
    if not options.data and not options.questions:
        raise typer.BadParameter("give --data with captions, --questions or both.")
    if options.start_from:
        mini = options.start_from == "mini"
        keep_apart(options.folder, CHECKPOINTS / "mini" if mini else options.start_from)
        leave_out(context, "--start-from", "queries", "encoder", "language_model", "bridge")
    if options.stage1:
        keep_apart(options.folder, options.stage1)
        leave_out(context, "--stage1", "queries", "bridge")
    import torch
    from accelerate import PartialState

    from blip2_edu.blip2 import Blip2
    from blip2_edu.checkpoints.runs import load_best
    from blip2_edu.data.batches import Mixture
    from blip2_edu.training import train_stage2

    torch.manual_seed(options.seed)
    model = Blip2.from_pretrained(options.start_from) if options.start_from else new_blip2(options)
    many = options.data and options.captions_per_image > 1
    if many and model.language_model.is_encoder_decoder:
        raise typer.BadParameter("an encoder-decoder takes --captions-per-image 1.")
    encoder = model.image_encoder.to(PartialState().device)
    joined = stage2_sources(options, encoder)
    held_out = [
        read(name, encoder, options.validation_split, limit=options.validation_limit)
        for name in options.validation
    ]
    count, images = sum(len(kind.sources) for kind in joined), sum(kind.images for kind in joined)
    say(f"Stage 2: {count} sources, {images} images, {len(model.pretrained)} tensors to go on.")
    batches = Mixture(joined, options.share, options.seed)
    train_stage2(model, batches, held_out, options, options.resume)
    if PartialState().is_main_process:
        load_best(model, options.folder)
        model.save_pretrained(options.folder)
        say(f"The best model is in {options.folder}: try `caption --model {options.folder}`.")


def stage2_sources(options: Stage2Options, encoder: "ImageEncoder") -> "list[Joined]":
    """Captions, then questions: of people, and what the captions answer."""
    from blip2_edu.data.batches import Source
    from blip2_edu.data.features import FeatureCache
    from blip2_edu.data.questions import with_questions

    views, whole = options.views, min(options.views, 2)  # a crop may have lost what is asked about
    told = [
        read(name, encoder, views=views, limit=options.limit, need="captions")
        for name in options.data
    ]
    asked = [
        read(name, encoder, views=whole, limit=options.limit, need="questions")
        for name in options.questions
    ]
    if options.ask_captions:
        asked += [
            (with_questions(examples), FeatureCache(features.views[:whole]))
            for examples, features in told
        ]
    captions = [
        Source(
            *pair,
            options.batch_size,
            options.seed,
            options.captions_per_image,
            keep_features=options.keep_features,
        )
        for pair in told
    ]
    questions = [
        Source(*pair, options.questions_per_step, options.seed, ask=True) for pair in asked
    ]
    joined = []
    if captions:
        joined.append(weighed(captions, options.weight, options.batch_size, "--weight"))
    if questions:
        size, weights = options.questions_per_step, options.question_weight
        joined.append(weighed(questions, weights, size, "--question-weight"))
    return joined


def weighed(
    sources: "list[Source]", weights: list[float], batch_size: int, option: str
) -> "Joined":
    """Join sources by the weights that an option gave, or all alike."""
    from blip2_edu.data.batches import join

    if weights and len(weights) != len(sources):
        raise typer.BadParameter(
            f"{option} is given {len(weights)} times for {len(sources)} sources."
        )
    return join(sources, weights or [1.0] * len(sources), batch_size)


def new_stage1(size: str, num_queries: int, image_width: int) -> "Blip2Stage1":
    """A stage-1 model that knows words and no images yet."""
    from dataclasses import replace

    from blip2_edu.checkpoints.embedded import embedded_file
    from blip2_edu.checkpoints.published import checkpoint_folder
    from blip2_edu.qformer import QFormerConfig
    from blip2_edu.stage1 import Blip2Stage1

    if size == "mini":
        sizes, folder = QFormerConfig.mini(), embedded_file("minilm-l6").parent
    else:
        sizes, folder = QFormerConfig.base(), checkpoint_folder("google-bert/bert-base-uncased")
    sizes = replace(sizes, num_queries=num_queries, image_width=image_width)
    return Blip2Stage1.from_bert(sizes, folder)


def new_blip2(options: Stage2Options) -> "Blip2":
    """A BLIP-2 that knows what stage 1 taught, or, without one, what MiniLM knows.

    Another bridge than the Q-Former starts at random.
    """
    from accelerate import PartialState

    from blip2_edu.blip2 import Blip2, Blip2Config, Prompts
    from blip2_edu.bridges import make_bridge
    from blip2_edu.language import load_language_model
    from blip2_edu.stage1 import load_stage1
    from blip2_edu.vision import load_image_encoder

    encoder = load_image_encoder(options.encoder)
    with PartialState().main_process_first():  # it may have to be unpacked
        writer = load_language_model(options.language_model)
    if options.bridge != "qformer":
        description = {"kind": options.bridge, "image_width": encoder.width}
        bridge = make_bridge(description, writer.words)
        config = Blip2Config(encoder.name, writer.name, Prompts.for_model(writer))
        return Blip2(config, encoder, bridge, writer)
    if options.stage1:
        reader = load_stage1(options.stage1)
    else:
        reader = new_stage1("mini", options.queries, encoder.width)
    model = Blip2.from_stage1(reader, encoder, writer)
    if not options.stage1:
        model.stage1 = None  # it has learned nothing that could match or retrieve
    return model


def keep_apart(folder: Path, checkpoint: str | Path) -> None:
    """Refuse to write into the checkpoint that is read."""
    if same_file(folder, checkpoint):
        raise typer.BadParameter(f"training starts from {checkpoint}: name another --folder.")


def leave_out(context: typer.Context, checkpoint: str, *options: str) -> None:
    """Refuse options that a checkpoint decides, rather than not heed them."""
    for option in options:
        source = context.get_parameter_source(option)
        if source and source.name == "COMMANDLINE":
            name = option.replace("_", "-")
            raise typer.BadParameter(f"the checkpoint of {checkpoint} decides --{name}.")


def read(
    source: str,
    encoder: "ImageEncoder",
    split: str = "train",
    views: int = 1,
    limit: int | None = None,
    need: str | None = None,
) -> "tuple[Examples, FeatureCache]":
    """Examples and their features; raises DataError if they have none of what is needed."""
    from accelerate import PartialState

    from blip2_edu.data.examples import DataError, load_examples
    from blip2_edu.data.features import open_features

    examples = load_examples(source, split, limit)
    if need and not any(getattr(examples, need)):
        raise DataError(f"{source} has no {need}.")
    with PartialState().main_process_first():  # the others find the features in the cache
        # Mirrored, a drawn scene would not be what its captions and answers say.
        features = open_features(examples, encoder, 1 if source.startswith("scenes:") else views)
    return examples, features
