"""Pictures: maps over photographs, matrices, and what the whole model is made of."""

import io
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, Polygon, Rectangle
from PIL import Image
from torch import Tensor, nn

from blip2_edu.blip2 import Blip2, ImageSource
from blip2_edu.bridges import QFormerBridge
from blip2_edu.images import open_image
from blip2_edu.seeing import attention_maps

if TYPE_CHECKING:
    from IPython.display import Image as NotebookImage

FROZEN, LEARNS, INK = "#0072B2", "#D55E00", "#333333"  # a blue and an orange that all can tell
TEXT = "#009E73"  # a green, for text beside queries
SIDE = 480  # pixels of the longer side of an overlay


def overlay(image: Image.Image, attention: Tensor) -> Image.Image:
    """Lay a map (R, K) over a photograph, at the photograph's own aspect ratio.

    The photograph turns grey and the map colours it, brightest where the map is highest. Every
    picture has its own scale: compare places within one, not brightness between two.
    """
    image = image.copy()
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    heat = Image.fromarray((attention / attention.max().clamp(min=1e-12)).float().cpu().numpy())
    heat = np.asarray(heat.resize(image.size, Image.Resampling.BICUBIC)).clip(0, 1)
    colors = 255 * colormaps["inferno"](heat)[..., :3]
    grey = np.asarray(image.convert("L"))[..., None]
    return Image.fromarray((0.4 * grey + 0.6 * colors).astype(np.uint8))


def attention_figure(
    model: Blip2,
    image: ImageSource,
    caption: str = "",
    layer: int = -1,
    num_queries: int = 5,
) -> Figure:
    """The photograph, the maximum over all queries, their mean, and the most peaked queries.

    Maps are means over the heads. A title tells the highest weight in its map; a query that looks
    everywhere alike has 1 / (R x K). The caption is drawn as it is, `$` and all.
    """
    image = open_image(image)
    maps = attention_maps(model, image, layer)[0].mean(dim=0)  # (Q, R, K)
    peaks = maps.flatten(1).amax(dim=1)
    panels = {"maximum over queries": maps.amax(dim=0), "mean over queries": maps.mean(dim=0)}
    for query in peaks.argsort(descending=True)[:num_queries].tolist():
        panels[f"query {query}"] = maps[query]
    titles = [f"{name}, up to {attention.max():.2f}" for name, attention in panels.items()]
    overlays = [overlay(image, attention) for attention in panels.values()]
    figure = gallery_figure([image, *overlays], ["photograph", *titles], fontsize=9)
    figure.suptitle(plain(caption), fontsize=13, parse_math=False)
    return figure


def gallery_figure(
    images: Sequence[ImageSource],
    titles: Sequence[str],
    columns: int = 4,
    width: float = 2.6,
    fontsize: int = 10,
) -> Figure:
    """Pictures in rows, `width` inches each, under their titles, which are drawn as they are."""
    images = [open_image(image) for image in images]
    columns = min(columns, len(images))
    aspects = [min(image.height / image.width, 1.5) for image in images]
    titles = [plain(title, int(115 * width / fontsize)) for title in titles]
    lines = [title.count("\n") + 1 for title in titles]
    heights = [  # of the rows, with titles
        width * max(aspects[i : i + columns]) + 0.02 * fontsize * max(lines[i : i + columns]) + 0.1
        for i in range(0, len(images), columns)
    ]
    figure = Figure(figsize=(width * columns, sum(heights) + 0.1), layout="constrained")
    axes = figure.subplots(len(heights), columns, squeeze=False, height_ratios=heights).flatten()
    for ax in axes:
        ax.axis("off")
        ax.set_anchor("N")  # else pictures of unlike height and their titles stand out of line
    for ax, image, title in zip(axes, images, titles, strict=False):
        ax.imshow(image)
        ax.set_title(title, fontsize=fontsize, parse_math=False)
    return figure


def matrix_figure(
    matrices: Sequence[Tensor],
    titles: Sequence[str],
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    cell: float = 0.34,
) -> Figure:
    """Masks or attention weights (L, S) side by side: a row asks, a column is asked.

    The darker, the higher, on one scale for all, from 0 to the highest finite value; what is not a
    number is orange. rows and columns name the positions; a cell is `cell` inches wide.
    """
    matrices = [matrix.detach().float().cpu() for matrix in matrices]
    highest = max(matrix.nan_to_num().max().item() for matrix in matrices)
    colors = LinearSegmentedColormap.from_list("frozen", ["white", FROZEN]).with_extremes(
        bad=LEARNS
    )
    widths = [matrix.shape[1] for matrix in matrices]
    size = (cell * sum(widths) + 1.2 * len(widths), cell * max(map(len, matrices)) + 1.1)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(matrices), squeeze=False, width_ratios=widths)[0]
    for ax, matrix, title in zip(axes, matrices, titles, strict=True):
        ax.pcolormesh(matrix, cmap=colors, vmin=0, vmax=highest or 1, edgecolors="0.6", lw=0.3)
        ax.set(aspect="equal", ylim=(len(matrix), 0))
        ax.tick_params(length=0, labelsize=9)
        for axis, names in ((ax.xaxis, columns), (ax.yaxis, rows)):
            axis.set_ticks([i + 0.5 for i in range(len(names))], names, parse_math=False)
        ax.tick_params(axis="x", rotation=90)
        ax.set_title(plain(title, 28), fontsize=10, parse_math=False)
    return figure


def plain(text: str, width: int = 90) -> str:
    """Any string as at most three lines that can be drawn; what cannot becomes a space."""
    printable = "".join(character if character.isprintable() else " " for character in text)
    return "\n".join(textwrap.wrap(printable, width, max_lines=3, placeholder=" ..."))


def architecture_figure(model: Blip2) -> Figure:
    """BLIP-2 from image to text (paper, figures 1 and 3), with the sizes of this model."""
    encoder, bridge, language = model.image_encoder, model.bridge, model.language_model
    figure = Figure(figsize=(11, 3.9), dpi=100)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, 110), ylim=(0, 39))
    ax.axis("off")

    def write(x: float, y: float, text: str, size: float = 9, color: str = INK, **style) -> None:
        ax.text(x, y, text, size=size, color=color, ha="center", va="center", **style)

    def arrow(start: tuple[float, float], end: tuple[float, float]) -> None:
        style = {"arrowstyle": "-|>", "color": INK, "lw": 1.4, "mutation_scale": 13}
        ax.annotate("", end, start, arrowprops=style | {"shrinkA": 0, "shrinkB": 0})

    def box(x: float, width: float, name: str, color: str, details: str) -> None:
        place, style = (x - width / 2, 14), "round,pad=0,rounding_size=1.6"
        ax.add_patch(FancyBboxPatch(place, width, 16, style, fc=color + "22", ec=color, lw=2))
        write(x, 26, name, 11.5, weight="bold")
        write(x, 21, details)
        write(x, 16.2, "frozen" if color == FROZEN else "learns", 10, color, weight="bold")

    def tokens(x: float, y: float, dx: float, dy: float, color: str) -> None:
        for i in range(-3, 4):
            place = (x + i * dx - 0.7, y + i * dy - 0.7)
            ax.add_patch(Rectangle(place, 1.4, 1.4, fc=color + "55", ec=color, lw=1))

    ax.add_patch(Rectangle((1.5, 17), 11, 10, fc="#CFE6F5", ec=INK, lw=1))
    ax.add_patch(Circle((10, 24.8), 1, fc="#F0E442"))
    hills = [(1.5, 17), (1.5, 19), (5.5, 23.5), (8, 20.5), (10, 22), (12.5, 19), (12.5, 17)]
    ax.add_patch(Polygon(hills, fc="#009E73"))
    write(7, 14.5, "image", 10)
    box(24, 15, "Image encoder", FROZEN, f"{plain(encoder.name, 18)}\n{count(encoder)}")
    tokens(36.5, 22, 0, 1.9, FROZEN)
    write(36.5, 12, f"{encoder.num_features} features\nof {encoder.width}")
    if isinstance(bridge, QFormerBridge):
        sizes = bridge.config.qformer
        box(48, 14, "Q-Former", LEARNS, f"{sizes.num_layers} blocks\n{count(bridge.qformer)}")
        tokens(48, 7.5, 1.9, 0, LEARNS)
        write(48, 3.5, f"{sizes.num_queries} learned queries of {sizes.width}")
        projection = nn.ModuleList([bridge.language_projection, bridge.soft_prompt_norm])
        box(64, 10.5, "Projection", LEARNS, f"linear\n{count(projection)}")
        arrow((48, 8.8), (48, 13.7))
        arrow((55.3, 22), (58.4, 22))
    else:
        box(55, 28, type(bridge).__name__, LEARNS, count(bridge))
    tokens(74, 22, 0, 1.9, LEARNS)
    write(74, 12, f"soft prompt:\n{bridge.num_queries} vectors\nof {language.width}")
    box(87, 17, "Language model", FROZEN, f"{plain(language.name, 18)}\n{count(language)}")
    write(87, 6, "words of the prompt\nor a question", 10)
    write(104, 22, "a caption\nor an answer", 10, style="italic")
    for start, end in ((12.5, 16.2), (31.8, 35.2), (37.8, 40.7), (69.5, 72.7), (75.3, 78.2)):
        arrow((start, 22), (end, 22))
    arrow((95.8, 22), (98.8, 22))
    arrow((87, 8.6), (87, 13.7))
    write(55, 35.5, "BLIP-2: the bridge learns, the models on either side stay as they are", 13)
    return figure


def qformer_figure() -> Figure:
    """Two neighbouring blocks of the Q-Former, from left to right (paper, figure 2, left)."""
    figure = Figure(figsize=(11, 3.6), dpi=100)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, 110), ylim=(0, 36))
    ax.axis("off")

    def write(x: float, y: float, text: str, size: float = 9.5, color: str = INK) -> None:
        ax.text(x, y, text, size=size, color=color, ha="center", va="center")

    def box(x: float, y: float, height: float, text: str, color: str) -> None:
        style = "round,pad=0,rounding_size=1.2"
        ax.add_patch(FancyBboxPatch((x, y), 13, height, style, fc=color + "22", ec=color, lw=2))
        write(x + 6.5, y + height / 2, text)

    def arrow(start: tuple[float, float], end: tuple[float, float], color: str) -> None:
        style = {"arrowstyle": "-|>", "color": color, "lw": 1.6, "shrinkA": 0, "shrinkB": 0}
        ax.annotate("", end, start, arrowprops=style)

    top, bottom = 21, 6.5  # where the queries go along, and the text
    for y, name, color in ((top, "queries", LEARNS), (bottom, "text", TEXT)):
        write(7, y + 3.6, name, 10.5, color)
        for i in range(4):
            ax.add_patch(Rectangle((2.4 + 2.4 * i, y - 1), 2, 2, fc=color + "55", ec=color))
        for start, end in ((12.5, 16), (46, 50), (63, 68), (81, 85), (98, 103)):
            arrow((start, y), (end, y), color)
    arrow((29, top), (33, top), LEARNS)
    arrow((29, bottom), (50, bottom), TEXT)  # the text passes by the cross-attention
    for x in (16, 68):
        box(x, 3, 22, "self-attention\nof all, as far as\nthe mask allows", INK)
    box(33, 17, 8, "cross-attention", FROZEN)
    ax.add_patch(Rectangle((33, 30), 13, 4, fc=FROZEN + "22", ec=FROZEN))
    write(39.5, 32, "image features", 9.5, FROZEN)
    arrow((39.5, 30), (39.5, 25.3), FROZEN)
    for x in (50, 85):
        box(x, 17, 8, "feed-forward\nof the queries", LEARNS)
        box(x, 2.5, 8, "feed-forward\nof the text", TEXT)
    ax.axvline(65.5, 0.06, 0.8, color=INK, lw=1, ls=":")
    write(22.5, 32, "block 0, 2, 4, ...", 11)
    write(83, 32, "block 1, 3, 5, ...", 11)
    return figure


def count(module: nn.Module) -> str:
    """The number of parameters in words."""
    millions = sum(p.numel() for p in module.parameters()) / 1e6
    return f"{millions / 1e3:.1f} billion" if millions >= 1e3 else f"{millions:.1f} million"


def show(picture: Figure, alt: str, dpi: int = 100) -> "NotebookImage":
    """A figure for a notebook: small, and with a description for those who cannot see it."""
    from IPython.display import Image as NotebookImage  # not needed outside of notebooks

    file = io.BytesIO()
    picture.savefig(file, format="jpeg", dpi=dpi, pil_kwargs={"quality": 85})
    return NotebookImage(file.getvalue(), format="jpeg", alt=alt)
