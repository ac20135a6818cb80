"""The commands that train: `python -m blip2_edu train stage1|stage2`."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blip2_edu.checkpoints.embedded import embedded_file

if TYPE_CHECKING:
    from blip2_edu.blip2 import Blip2
    from blip2_edu.data.examples import Examples
    from blip2_edu.data.features import FeatureCache
    from blip2_edu.stage1 import Blip2Stage1
    from blip2_edu.text import Tokenizer
    from blip2_edu.vision import ImageEncoder

train = typer.Typer(help="Train the Q-Former: stage 1, then stage 2.", rich_markup_mode=None)


def number(help: str, max: float | None = None) -> object:
    """An option that is a number from 0 to `max`; "nan" and "inf" are floats, too, and refused."""

    def finite(value: float) -> float:
        if not math.isfinite(value):
            raise typer.BadParameter(f"{value} is no number to train with.")
        return value

    return typer.Option(min=0, max=max, help=help, callback=finite)


SOURCE = "parquet file, image folder, hub id, or scenes:N for N drawn scenes"
Data = Annotated[str, typer.Option(help=SOURCE)]
Sources = Annotated[list[str], typer.Option(help=SOURCE + "; again for more")]
Split = Annotated[str, typer.Option(help="which part, of a hub data set or a divided folder")]
Limit = Annotated[int | None, typer.Option(min=1, help="use the first N examples only")]
BatchSize = Annotated[int, typer.Option(min=1, help="images a step, on each process")]
Folder = Annotated[Path, typer.Option(file_okay=False, help="for states, metrics and the model")]
Encoder = Annotated[str, typer.Option(help="efficientnet-lite0, a folder, or a hub id")]
Queries = Annotated[int, typer.Option(min=1, help="learned queries; the paper has 32")]
Views = Annotated[
    int, typer.Option(min=1, help="1: the images, 2: and mirrored, more: and random crops")
]
Keep = Annotated[int | None, typer.Option(min=1, help="patches of an image to learn from a step")]
Share = Annotated[float, number("batches of each further source for one")]
Epochs = Annotated[float, number("how often to go through the data")]
Rate = Annotated[float, number("learning rate of what starts pretrained")]
RateNew = Annotated[float, number("learning rate of what starts at random")]
Decay = Annotated[float, number("weight decay, on matrices only")]
Warmup = Annotated[float, number("share of the steps to warm up in", max=1)]
Accumulate = Annotated[int, typer.Option(min=1, help="batches to a step")]
EvaluateEvery = Annotated[int, typer.Option(min=1, help="steps between evaluations and states")]
Seed = Annotated[
    int, typer.Option(min=0, max=2**63 - 1, help="of everything that is drawn at random")
]
Resume = Annotated[bool, typer.Option("--resume", help="go on where a stopped run was")]
TensorBoard = Annotated[bool, typer.Option("--tensorboard", help="write metrics for it, too")]


def say(text: str, to_stderr: bool = False) -> None:
    """Print one line; a control character, which a file name can hold, becomes a `?`."""
    shown = [c if c.isprintable() else " " if c.isspace() else "?" for c in text]
    typer.echo("".join(shown), err=to_stderr)


@train.command()
def stage1(
    context: typer.Context,
    data: Sources,
    validation: Data,
    folder: Folder,
    objectives: Annotated[str, typer.Option(help="of itc, itm and itg")] = "itc,itm,itg",
    itm_pairs: Annotated[
        int | None, typer.Option(min=1, help="positives a batch for ITM, the dearest; default: all")
    ] = None,
    hard_negatives: Annotated[
        bool, typer.Option(help="ITM's negatives by similarity, or at random: good to begin with")
    ] = True,
    start_from: Annotated[
        Path | None, typer.Option(help="folder of an earlier stage 1; default: MiniLM, a BERT")
    ] = None,
    queries: Queries = 16,
    encoder: Encoder = "efficientnet-lite0",
    views: Views = 2,
    keep_patches: Keep = None,
    share: Share = 0.5,
    limit: Limit = None,
    validation_split: Split = "validation",
    resume: Resume = False,
    epochs: Epochs = 10,
    batch_size: BatchSize = 64,
    learning_rate: Rate = 1e-4,
    learning_rate_new: RateNew = 3e-4,
    weight_decay: Decay = 0.05,
    warmup: Warmup = 0.05,
    gradient_accumulation: Accumulate = 1,
    evaluate_every: EvaluateEvery = 200,
    seed: Seed = 0,
    tensorboard: TensorBoard = False,
) -> None:
    """Teach the Q-Former what of an image a text would say (paper, section 3.1).

    The best model, by retrieval on the validation data, ends up in the folder, ready for stage 2.
    """
    chosen = [name.strip() for name in objectives.split(",")]
    if unknown := set(chosen) - {"itc", "itm", "itg"}:
        raise typer.BadParameter(f"there is no objective {', '.join(sorted(unknown))}.")
    if start_from:
        leave_out(context, "--start-from", "queries")
    import torch
    from accelerate import PartialState

    from blip2_edu.checkpoints.tensors import load_strictly, load_tensors
    from blip2_edu.data.batches import Mixture, Source
    from blip2_edu.stage1 import load_stage1, save_stage1
    from blip2_edu.training import TrainingConfig, train_stage1
    from blip2_edu.vision import load_image_encoder

    config = TrainingConfig(
        folder,
        epochs,
        learning_rate,
        learning_rate_new,
        weight_decay,
        warmup,
        gradient_accumulation=gradient_accumulation,
        evaluate_every=evaluate_every,
        seed=seed,
        tensorboard=tensorboard,
    )
    image_encoder = load_image_encoder(encoder).to(PartialState().device)
    torch.manual_seed(seed)
    if start_from:
        model, tokenizer = load_stage1(start_from)
        pretrained = set(model.state_dict())
        image_encoder.check_width(model.config.qformer.image_width)
    else:
        model, tokenizer, pretrained = stage1_from_minilm(queries, image_encoder.width)
    sources = []
    for name in data:
        pair = read(name, image_encoder, views=views, limit=limit, need="captions")
        sources.append(Source(*pair, batch_size, seed, keep_patches=keep_patches))
    held_out = read(validation, image_encoder, validation_split, need="captions")
    images = sum(len(source.usable) for source in sources)
    say(f"Stage 1: {', '.join(chosen)} on {images} images.")
    train_stage1(
        model,
        tokenizer,
        Mixture(sources, share, seed),
        held_out,
        pretrained,
        config,
        chosen,
        itm_pairs,
        hard_negatives,
        resume,
    )
    if PartialState().is_main_process:
        load_strictly(model, load_tensors(folder / "best.safetensors")[0])
        save_stage1(model, tokenizer, folder)
        say(f"The best model is in {folder}.")


@train.command()
def stage2(
    context: typer.Context,
    validation: Sources,
    folder: Folder,
    data: Annotated[
        list[str], typer.Option(help="with captions; sources as for stage 1, again for more")
    ] = [],  # noqa: B006 typer copies it
    questions: Annotated[
        list[str], typer.Option(help="with questions; sources as for stage 1, again for more")
    ] = [],  # noqa: B006
    ask_captions: Annotated[
        bool, typer.Option("--ask-captions", help="and what the captions of --data answer")
    ] = False,
    stage1: Annotated[Path | None, typer.Option(help="folder of a finished stage 1")] = None,
    without_stage1: Annotated[
        bool, typer.Option("--without-stage1", help="start from MiniLM, to see what stage 1 buys")
    ] = False,
    start_from: Annotated[
        str | None, typer.Option(help="go on from a finished stage 2: mini, or a folder")
    ] = None,
    captions_per_image: Annotated[
        int, typer.Option(min=1, help="that share the reading of one image in a step")
    ] = 3,
    questions_per_step: Annotated[int, typer.Option(min=1, help="each about another image")] = 32,
    queries: Queries = 16,
    encoder: Encoder = "efficientnet-lite0",
    language_model: Annotated[
        str, typer.Option(help="smollm2-135m, a folder, or a hub id")
    ] = "smollm2-135m",
    views: Views = 2,
    keep_patches: Keep = None,
    share: Share = 0.5,
    limit: Limit = None,
    validation_split: Split = "validation",
    validation_limit: Annotated[
        int, typer.Option(min=1, help="images of each validation source to write about")
    ] = 150,
    resume: Resume = False,
    epochs: Epochs = 5,
    batch_size: BatchSize = 16,
    learning_rate: Rate = 3e-4,
    learning_rate_new: RateNew = 2e-3,
    weight_decay: Decay = 0.05,
    warmup: Warmup = 0.05,
    gradient_accumulation: Accumulate = 1,
    evaluate_every: EvaluateEvery = 200,
    seed: Seed = 0,
    tensorboard: TensorBoard = False,
) -> None:
    """Teach the Q-Former to speak to a frozen language model (paper, section 3.2).

    The best model, by CIDEr and VQA accuracy on the validation data, ends up in the folder; name
    that folder as the --model of other commands.
    """
    if sum(map(bool, (stage1, without_stage1, start_from))) != 1:
        raise typer.BadParameter("give --stage1 FOLDER, --without-stage1 or --start-from FOLDER.")
    if not data and not questions:
        raise typer.BadParameter("give --data with captions, --questions or both.")
    if start_from:
        leave_out(context, "--start-from", "queries", "encoder", "language_model")
    if stage1:
        leave_out(context, "--stage1", "queries")
    import torch
    from accelerate import PartialState

    from blip2_edu.blip2 import Blip2, learned_state, load_learned
    from blip2_edu.checkpoints.tensors import load_tensors
    from blip2_edu.data.batches import Mixture, Source
    from blip2_edu.data.features import FeatureCache
    from blip2_edu.data.questions import with_questions
    from blip2_edu.training import TrainingConfig, train_stage2

    config = TrainingConfig(
        folder,
        epochs,
        learning_rate,
        learning_rate_new,
        weight_decay,
        warmup,
        gradient_accumulation=gradient_accumulation,
        evaluate_every=evaluate_every,
        seed=seed,
        tensorboard=tensorboard,
    )
    torch.manual_seed(seed)
    if start_from:
        model = Blip2.from_pretrained(start_from)
        pretrained = set(learned_state(model))
    else:
        model, pretrained = blip2_from_stage1(stage1, queries, encoder, language_model)
    if data and captions_per_image > 1 and model.language_model.is_encoder_decoder:
        raise typer.BadParameter("an encoder-decoder takes --captions-per-image 1.")
    image_encoder = model.image_encoder.to(PartialState().device)
    sources = []
    for name in data:
        pair = read(name, image_encoder, views=views, limit=limit, need="captions")
        sources.append(
            Source(*pair, batch_size, seed, captions_per_image, keep_patches=keep_patches)
        )
    whole = min(views, 2)  # a crop may have lost what is asked about
    asked = [
        read(name, image_encoder, views=whole, limit=limit, need="questions") for name in questions
    ]
    if ask_captions:
        asked += [
            (with_questions(source.examples), FeatureCache(source.features.views[:whole]))
            for source in sources
        ]
    sources += [Source(*pair, questions_per_step, seed, ask=True) for pair in asked]
    held_out = [
        read(name, image_encoder, validation_split, limit=validation_limit) for name in validation
    ]
    images = sum(len(source.usable) for source in sources)
    say(f"Stage 2: {len(sources)} sources, {images} images, {len(pretrained)} tensors to go on.")
    train_stage2(model, Mixture(sources, share, seed), held_out, pretrained, config, resume)
    if PartialState().is_main_process:
        load_learned(model, load_tensors(folder / "best.safetensors")[0])
        model.save_pretrained(folder)
        say(f"The best model is in {folder}: try `caption --model {folder}`.")


def leave_out(context: typer.Context, checkpoint: str, *options: str) -> None:
    """Refuse options that a checkpoint decides, rather than not heed them."""
    for option in options:
        if context.get_parameter_source(option).name == "COMMANDLINE":
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


def stage1_from_minilm(
    num_queries: int, image_width: int
) -> "tuple[Blip2Stage1, Tokenizer, set[str]]":
    """A stage-1 model that knows words and no images yet, and the names of what MiniLM gave."""
    from dataclasses import replace

    from blip2_edu.checkpoints.names import initialise_from_bert
    from blip2_edu.checkpoints.tensors import load_tensors
    from blip2_edu.qformer import QFormerConfig
    from blip2_edu.stage1 import Blip2Stage1, Stage1Config
    from blip2_edu.text import Tokenizer

    file = embedded_file("minilm-l6")
    sizes = replace(QFormerConfig.mini(), num_queries=num_queries, image_width=image_width)
    model = Blip2Stage1(Stage1Config(sizes))
    copied = initialise_from_bert(model.qformer, load_tensors(file)[0])
    tokenizer = Tokenizer(file.parent / "tokenizer.json")
    return model, tokenizer, {f"qformer.{name}" for name in copied}


def blip2_from_stage1(
    stage1: Path | None, num_queries: int, encoder: str, language_model: str
) -> "tuple[Blip2, set[str]]":
    """A BLIP-2 that knows what stage 1 taught, or without one MiniLM, and the names of that."""
    from accelerate import PartialState

    from blip2_edu.blip2 import Blip2, Blip2Config, Prompts
    from blip2_edu.language import load_language_model
    from blip2_edu.stage1 import load_stage1
    from blip2_edu.vision import load_image_encoder

    image_encoder = load_image_encoder(encoder)
    if stage1:
        reader, tokenizer = load_stage1(stage1)
        pretrained = set(reader.state_dict())
    else:
        reader, tokenizer, pretrained = stage1_from_minilm(num_queries, image_encoder.width)
    with PartialState().main_process_first():  # it may have to be unpacked
        writer = load_language_model(language_model)
    prompts = Prompts.t5() if writer.is_encoder_decoder else Prompts.opt()
    if language_model == "smollm2-135m":
        prompts = Prompts.smollm2()
    prompts.end_of_text = None  # as the writer has it; another is a habit of the published OPTs
    config = Blip2Config(reader.config.qformer, encoder, language_model, prompts)
    model = Blip2(config, image_encoder, writer, reader, tokenizer)
    pretrained &= model.start_from_stage1()
    if not stage1:
        model.stage1 = None  # it has learned nothing that could match or retrieve
    return model, pretrained
