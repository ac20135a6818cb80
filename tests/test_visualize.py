"""Pictures: maps that are the model's own weights, in their place, under any caption."""

import io

import matplotlib as mpl
import numpy as np
import pytest
import torch
from helpers import small_models
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from blip2_edu.blip2 import Blip2
from blip2_edu.images import ImageError
from blip2_edu.seeing import attention_maps
from blip2_edu.visualize import (
    FROZEN,
    LEARNS,
    SIDE,
    architecture_figure,
    attention_figure,
    count,
    gallery_figure,
    matrix_figure,
    overlay,
    plain,
    qformer_figure,
    show,
)

PHOTO = Image.effect_noise((90, 60), 80).convert("RGB")
ODD = "costs $5$ or $\\frac{$ <b>\x00\n\udce9 \u4e2d_^{ " + "very " * 200


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Blip2:
    return small_models.blip2(tmp_path_factory.mktemp("blip2"))


def draw(figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def test_maps_are_the_weights_on_the_patches(model):
    maps = attention_maps(model, [PHOTO, PHOTO.rotate(90)])
    heads, queries = small_models.QFORMER.num_heads, small_models.QFORMER.num_queries
    assert maps.shape == (2, heads, queries, 3, 3)
    weights = model.bridge.look(model.encode_images([PHOTO])).cross_attention
    for row in range(3):
        for column in range(3):
            expected = weights[-1][0, :, :, 1 + 3 * row + column]  # the class token is first
            torch.testing.assert_close(maps[0, :, :, row, column], expected, atol=1e-6, rtol=0)
    assert not torch.equal(attention_maps(model, PHOTO, layer=0)[0], maps[0])
    assert (maps.sum(dim=(-2, -1)) < 1).all()  # the class token has its share


def test_looking_does_not_change_the_model(model):
    before = model.bridge(model.encode_images(PHOTO))
    attention_maps(model, PHOTO)
    assert torch.equal(model.bridge(model.encode_images(PHOTO)), before)
    assert not attention_maps(model, PHOTO).requires_grad


def test_a_bad_image_is_an_image_error(model):
    with pytest.raises(ImageError):
        attention_maps(model, b"no image")


@pytest.mark.parametrize("size", [(90, 60), (60, 90), (2000, 500), (1, 300)])
def test_an_overlay_keeps_the_aspect_ratio(size):
    picture = overlay(Image.new("RGB", size, "grey"), torch.rand(3, 3))
    scale = min(1, SIDE / max(size))
    assert picture.size == tuple(max(1, round(side * scale)) for side in size)


@pytest.mark.parametrize("row, column", [(0, 0), (0, 2), (2, 0), (1, 2)])
def test_an_overlay_is_brightest_where_the_map_is_highest(row, column):
    attention = torch.zeros(3, 3)
    attention[row, column] = 0.2
    picture = overlay(Image.new("RGB", (300, 150), "grey"), attention).convert("L")
    y, x = np.unravel_index(np.asarray(picture).argmax(), (150, 300))
    assert (y // 50, x // 100) == (row, column)


def test_an_overlay_of_nothing_is_dark():
    assert max(np.asarray(overlay(Image.new("RGB", (9, 9)), torch.zeros(3, 3))).ravel()) < 10


def test_the_attention_figure(model):
    figure = attention_figure(model, PHOTO, "a caption", num_queries=2)
    titles = [ax.get_title() for ax in figure.axes]
    maps = attention_maps(model, PHOTO)[0].mean(dim=0)
    peaks = maps.flatten(1).amax(dim=1)
    best, second = peaks.topk(2).indices.tolist()
    assert titles[:3] == [
        "photograph",
        f"maximum over queries, up to {peaks.max():.2f}",
        f"mean over queries, up to {maps.mean(dim=0).max():.2f}",
    ]
    assert titles[3].startswith(f"query {best},") and titles[4].startswith(f"query {second},")
    assert len([ax for ax in figure.axes if ax.images]) == 5
    shown = overlay(PHOTO, maps[best])
    assert np.array_equal(figure.axes[3].images[0].get_array(), np.asarray(shown))


@pytest.mark.parametrize("count, grid", [(1, (1, 1)), (3, (1, 3)), (5, (2, 4))])
def test_a_gallery(count, grid):
    photos = [PHOTO.resize((20 + i, 30)) for i in range(count)]
    figure = gallery_figure(photos, [f"${i} a_{{" for i in range(count)])
    draw(figure)
    assert figure.axes[0].get_gridspec().get_geometry() == grid
    for i, ax in enumerate(figure.axes):
        assert ax.get_title() == (f"${i} a_{{" if i < count else "")
        assert len(ax.images) == (i < count)
        if i < count:
            assert np.array_equal(ax.images[0].get_array(), np.asarray(photos[i]))


def test_matrices_share_one_scale_and_nan_stands_out():
    mask = torch.tensor([[True, False, True], [True, True, True]])
    weights = torch.tensor([[0.5, float("nan")], [0.0, 0.25]])
    figure = matrix_figure([mask, weights], ["mask", "$weights_{"], rows=["a", "$b_{"])
    draw(figure)
    left, right = (ax.collections[0].get_facecolors() for ax in figure.axes)
    blue, orange, white = (mpl.colors.to_rgba(color) for color in (FROZEN, LEARNS, "white"))
    np.testing.assert_allclose(left, [blue, white, blue, blue, blue, blue], atol=0.01)
    halfway = (np.array(white) + blue) / 2
    np.testing.assert_allclose(right[:3], [halfway, orange, white], atol=0.01)
    assert [ax.get_title() for ax in figure.axes] == ["mask", "$weights_{"]
    for ax in figure.axes:
        assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "$b_{"]
        assert not ax.get_xticklabels()


def test_a_mask_that_forbids_everything():
    draw(matrix_figure([torch.zeros(2, 2).bool()], ["empty"], columns=["a", "b"]))


@pytest.mark.filterwarnings("ignore:Glyph:UserWarning")
@pytest.mark.parametrize("caption", ["", "$", "$x$", "100% \\alpha_{", ODD])
def test_a_caption_is_plain_text(model, caption):
    figure = attention_figure(model, PHOTO, caption, num_queries=1)
    draw(figure)
    assert figure.get_suptitle() == plain(caption)
    assert not figure._suptitle.get_parse_math()


def test_plain():
    assert plain("a $cat$") == "a $cat$"
    assert plain("a\nb\x07c\udce9d") == "a b c d"
    assert len(plain(ODD).split("\n")) == 3 and plain(ODD).endswith(" ...")


def words(figure) -> str:
    return "\n".join(text.get_text() for text in figure.axes[0].texts)


def test_the_architecture_has_the_sizes_of_the_model(model):
    figure = architecture_figure(model)
    said = words(figure)
    for part in (
        "10 features\nof 20",  # 3 x 3 patches and a class token
        f"{small_models.QFORMER.num_layers} blocks",
        f"{small_models.QFORMER.num_queries} learned queries of {small_models.QFORMER.width}",
        f"{small_models.QFORMER.num_queries} vectors\nof 24",
    ):
        assert part in said, part
    assert said.count("frozen") == said.count("learns\n") == 2
    inside = draw(figure).shape[1::-1]
    for text in figure.axes[0].texts:
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= inside[0] and box.y1 <= inside[1], text


def test_no_words_overlap_in_the_architecture(model):
    figure = architecture_figure(model)
    draw(figure)
    boxes = [text.get_window_extent() for text in figure.axes[0].texts if text.get_text()]
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_the_blocks_of_the_qformer_are_drawn_apart():
    figure = qformer_figure()
    said = words(figure)
    inside = draw(figure).shape[1::-1]
    for part, times in (("self-attention", 2), ("cross-attention", 1), ("feed-forward", 4)):
        assert said.count(part) == times
    boxes = [text.get_window_extent() for text in figure.axes[0].texts if text.get_text()]
    for i, box in enumerate(boxes):
        assert 0 <= box.x0 and 0 <= box.y0 and box.x1 <= inside[0] and box.y1 <= inside[1]
        assert not any(box.overlaps(other) for other in boxes[:i])


@pytest.mark.parametrize("number, said", [(0, "0.0"), (150_000, "0.1"), (12_340_000, "12.3")])
def test_count(number, said):
    assert count(torch.nn.ParameterList([torch.empty(number, device="meta")])) == f"{said} million"


def test_count_billions():
    assert count(torch.nn.Linear(50_000, 54_000, False, "meta")) == "2.7 billion"


def test_show_is_a_small_jpeg_with_a_description(model):
    shown = show(architecture_figure(model), "the parts of the model")
    assert Image.open(io.BytesIO(shown.data)).format == "JPEG" and len(shown.data) < 100_000
    assert shown.alt == "the parts of the model"
