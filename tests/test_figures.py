"""The contents of the plots of a run whose metrics are known."""

from __future__ import annotations

import tracemalloc
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image
from report_runs import HOSTILE, PREDICTIONS, VAL_ACCURACY, first_layer, write_run

from toolkit.errors import UserError
from toolkit.report import data_plots, learning_curves, test_plots
from toolkit.report.conv_filters import (
    MAX_SHOWN,
    channel_products,
    choose,
    effect_figure,
    filter_image,
    filters_figure,
    tinted,
)
from toolkit.report.plot_style import CYCLE, SPLIT_COLORS, page_svg, plot_style, save
from toolkit.report.prediction_metrics import RunPredictions, calibration, confusions
from toolkit.report.run_data import ConvFilters, FilterEffect, Mistake, RunData, load_run_data
from toolkit.report.run_report import load_images
from toolkit.runs import Run

pytestmark = pytest.mark.usefixtures("pdf_figures")


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> RunData:
    return load_run_data(write_run(tmp_path_factory.mktemp("known"), images=False))


def predictions(facts: RunData) -> RunPredictions:
    assert facts.predictions is not None
    return facts.predictions


def many_classes(count: int) -> RunPredictions:
    """Return predictions for ten images per class, of which as many are correct as the last digit of its index."""
    labels = np.repeat(np.arange(count), 10)
    right = np.tile(np.arange(10), count) < labels % 10
    predicted = np.where(right, labels, (labels + 1) % count)
    names = [f"a rather long name of class {number}" for number in range(count)]
    return RunPredictions([str(i) for i in range(10 * count)], names, labels, predicted, np.full(10 * count, 0.5))


def test_learning_curves_show_the_metrics_and_mark_best_and_stopping_epoch(facts: RunData) -> None:
    for metric, scale, unit in (("loss", 1, "nats"), ("accuracy", 100, "%")):
        (axes,) = learning_curves.learning_curves(facts, metric).axes
        train, validation, best, stop = axes.lines
        expected = [1 - a for a in VAL_ACCURACY] if scale == 1 else [100 * a for a in VAL_ACCURACY]
        assert list(validation.get_xdata()) == [1, 2, 3, 4, 5]
        assert list(validation.get_ydata()) == pytest.approx(expected)
        assert (list(best.get_xdata()), best.get_label()) == ([3, 3], "best: epoch 3")
        assert (list(stop.get_xdata()), stop.get_label()) == ([5, 5], "stopped early: epoch 5")
        assert axes.get_xlabel() == "epoch"
        assert unit in axes.get_ylabel()
        assert train.get_linestyle() != validation.get_linestyle(), "also distinguishable without colors"
    (axes,) = learning_curves.learning_rate_curve(facts).axes
    assert list(axes.lines[0].get_xdata()) == [0, 1, 2, 3, 4], "an epoch's learning rate is the one at its start"
    assert list(axes.lines[0].get_ydata()) == pytest.approx([0.1, 0.1 / 2, 0.1 / 3, 0.1 / 4, 0.1 / 5])


def test_a_confusion_matrix_with_few_classes_shows_its_numbers(facts: RunData) -> None:
    axes = test_plots.confusion_figure("title", predictions(facts)).axes[0]
    cells = {(int(t.get_position()[1]), int(t.get_position()[0])): t.get_text() for t in axes.texts}
    assert cells == {(0, 0): "2", (0, 1): "1", (1, 1): "1", (1, 2): "1", (2, 2): "2"}
    assert [label.get_text() for label in axes.get_yticklabels()] == [HOSTILE[0][:23] + "…", *HOSTILE[1:]]
    shares = np.asarray(axes.images[0].get_array().filled(0))
    assert shares[0] == pytest.approx([200 / 3, 100 / 3, 0])


@pytest.mark.parametrize(("count", "size"), [(10, 8.0), (101, 5.5)])
def test_class_names_next_to_a_confusion_matrix_do_not_overlap(count: int, size: float) -> None:
    figure = test_plots.confusion_figure("title", many_classes(count))
    figure.draw_without_rendering()
    for labels, vertical in ((figure.axes[0].get_yticklabels(), True), (figure.axes[0].get_xticklabels(), False)):
        boxes = [label.get_window_extent() for label in labels]
        assert len(boxes) == count
        assert {label.get_fontsize() for label in labels} == {size}
        ends = [(box.y1, box.y0) if vertical else (-box.x0, -box.x1) for box in boxes]
        assert all(upper[1] >= lower[0] - 0.5 for upper, lower in pairwise(ends))


def test_class_accuracy_is_sorted_and_shows_the_number_of_images(facts: RunData) -> None:
    figure = test_plots.class_accuracy_figure("title", predictions(facts))
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([100, 200 / 3, 50])
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        f"{HOSTILE[2]}  (2)", f"{HOSTILE[0]}  (3)", f"{HOSTILE[1]}  (2)"
    ]  # fmt: skip
    assert axes.lines[0].get_label() == "mean over classes: 72.2 %"


def test_the_reliability_diagram_shows_the_calibration_metrics(facts: RunData) -> None:
    found = predictions(facts)
    measured = calibration(found.probabilities, found.correct)
    upper, lower = test_plots.reliability_figure("title", measured).axes
    assert f"{100 * measured.expected_error:.2f} %" in upper.get_title(), "equal to the page's text"
    assert sum(bar.get_height() for bar in lower.patches) == len(PREDICTIONS)
    filled = measured.counts > 0
    heights = [bar.get_height() for bar in upper.patches[: filled.sum()]]
    assert heights == pytest.approx(list(measured.accuracy[filled]))


def test_worst_mistakes_show_class_prediction_and_probability(facts: RunData) -> None:
    load_images(facts, None, ())
    worst = facts.mistakes
    assert [(one.label, one.prediction, one.probability) for one in worst] == [
        (HOSTILE[0], HOSTILE[1], 0.9),
        (HOSTILE[1], HOSTILE[2], 0.55),
    ]
    texts = [text.get_text() for text in test_plots.mistakes_figure("title", worst).axes[0].texts]
    assert texts[0].endswith("0.90")
    assert "image not available" in texts


# Filters


def known_filters(count: int = 4) -> ConvFilters:
    before, after = first_layer()
    return ConvFilters(
        "blocks.0.conv.weight", np.tile(before, (count // 4, 1, 1, 1)), np.tile(after, (count // 4, 1, 1, 1))
    )


def test_a_filter_is_drawn_on_its_own_scale_with_gray_for_zero() -> None:
    weights = np.zeros((3, 1, 3), dtype=np.float32)
    weights[:, 0, 0], weights[:, 0, 1] = 0.02, -0.01
    assert filter_image(weights, 3)[0].tolist() == [[255] * 3, [64] * 3, [128] * 3]
    weights[0] *= -1
    assert filter_image(weights, 3)[0, 0].tolist() == [0, 255, 255], "three channels are red, green and blue"
    assert filter_image(np.array([[[1.0]], [[0.0]]], dtype=np.float32), 1).tolist() == [[[255] * 3]], (
        "otherwise the mean over channels"
    )


def test_filters_before_and_after_training_are_shown_side_by_side_with_the_same_numbers() -> None:
    before, after = filters_figure("title", known_filters()).axes
    assert [(a.get_title(), [t.get_text() for t in a.texts]) for a in (before, after)] == [
        ("before training", ["1", "2", "3", "4"]),
        ("after training", ["1", "2", "3", "4"]),
    ]
    assert not np.array_equal(before.images[0].get_array(), after.images[0].get_array())
    many = filters_figure("title", known_filters(400))
    assert len(many.axes[0].texts) == MAX_SHOWN
    assert f"first {MAX_SHOWN} of 400" in many.texts[0].get_text()


def test_filters_to_show_are_chosen_by_change_or_number() -> None:
    filters = known_filters()
    assert choose(filters)[0][0] == 2, "the only filter that has changed"
    assert choose(filters, [4, 1])[0] == [3, 0], "numbers count from 1, indices from 0"
    unchanged = ConvFilters("conv.weight", filters.before, filters.before)
    strongest = int((filters.before**2).sum((1, 2, 3)).argmax())
    assert choose(unchanged)[0][0] == strongest
    assert "none has changed" in choose(unchanged)[1]
    with pytest.raises(UserError, match=r"--filters 5: .* has 4 filters, numbered from 1 to 4"):
        choose(filters, [5])
    with pytest.raises(UserError, match=r"--filters 0: .* has 4 filters, numbered from 1 to 4"):
        choose(filters, [0])


def test_the_products_of_a_filter_are_the_convolution_of_each_channel() -> None:
    image = np.random.default_rng(2).normal(size=(3, 9, 7)).astype(np.float32)
    weights = first_layer()[0]
    expected = torch.nn.functional.conv2d(torch.from_numpy(image)[None], torch.from_numpy(weights))[0].numpy()
    for number in range(4):
        products = channel_products(weights[number], image)
        assert products.shape == (3, 7, 5)
        assert products.sum(0) == pytest.approx(expected[number], abs=1e-5)
        alone = torch.nn.functional.conv2d(
            torch.from_numpy(image[1:2])[None], torch.from_numpy(weights[number, 1:2])[None]
        )
        assert products[1] == pytest.approx(alone[0, 0].numpy(), abs=1e-5)


def test_a_filter_that_passes_one_color_tints_the_image_with_it() -> None:
    weights = np.zeros((3, 3, 3), dtype=np.float32)
    weights[1] = 1 / 9
    tint = tinted(channel_products(weights, np.ones((3, 8, 8), dtype=np.float32)))
    assert tint.shape == (6, 6, 3)
    assert tint[0, 0] == pytest.approx([0.5, 1.0, 0.5]), "green, with red and blue at gray"


def test_the_effect_of_filters_shows_responses_and_products(facts: RunData) -> None:
    from PIL import Image

    image = np.random.default_rng(3).normal(size=(3, 300, 300)).astype(np.float32)
    figure = effect_figure("title", known_filters(), FilterEffect([2, 0], "", Image.new("L", (300, 300)), image))
    shown = {axes: axes.images[0].get_array().shape for axes in figure.axes if axes.images}
    assert len(shown) == 1 + 2 * 5, "the image, and for both filters: the filter, two responses, two images of products"
    assert max(side for shape in shown.values() for side in shape[:2]) <= 160, "large responses are subsampled"
    assert [axes.get_title() for axes in figure.axes if axes.get_title().startswith("filter")] == [
        "filter 3",
        "filter 1",
    ]
    gray = effect_figure("title", known_filters(), FilterEffect([0], "", Image.new("L", (300, 300)), image[:1]))
    assert len([axes for axes in gray.axes if axes.images]) == 1 + 3, "one channel has no tint"


@pytest.mark.parametrize("count", [1, 2, 8])
def test_the_title_of_an_effect_is_not_cut_off(count: int) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    image = np.random.default_rng(3).normal(size=(3, 32, 32)).astype(np.float32)
    effect = FilterEffect(list(range(count)), "", Image.new("RGB", (32, 32)), image)
    figure = effect_figure("giunta-convnet-with-a-long-name", known_filters(8), effect)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    box = figure._suptitle.get_window_extent(canvas.get_renderer())
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width
    assert box.y1 <= figure.bbox.height


LONG = "-".join(["a-name-as-long-as-a-recipe-may-have-without-a-space"] * 2)[:100]


def drawn(facts: RunData) -> dict[str, Figure]:
    """Return every plot of a run's report, with the longest name that a recipe may have."""
    found = predictions(facts)
    counts = {split: np.array([3, 2, 1]) for split in SPLIT_COLORS}
    image = np.zeros((3, 20, 20), dtype=np.float32)
    picture = Image.new("RGB", (20, 20))
    names = ["a", "b", "c"]
    long = replace(facts, recipe=None, run=Run(facts.run.path / ".." / ".." / LONG / "run"))
    assert long.name == LONG
    return {
        "loss": learning_curves.learning_curves(long, "loss"),
        "accuracy": learning_curves.learning_curves(long, "accuracy"),
        "learning rate": learning_curves.learning_rate_curve(long),
        "confusion": test_plots.confusion_figure(f"{LONG}: test images", found),
        "class accuracy": test_plots.class_accuracy_figure(f"{LONG}: test accuracy by class", found),
        "reliability": test_plots.reliability_figure(LONG, calibration(found.probabilities, found.correct)),
        "mistakes": test_plots.mistakes_figure(LONG, [Mistake("x.png", "a", "b", 0.9, None)]),
        "filters": filters_figure(LONG, known_filters()),
        "one filter": effect_figure(LONG, known_filters(), FilterEffect([1], "", picture, image)),
        "two filters": effect_figure(LONG, known_filters(), FilterEffect([0, 3], "", picture, image)),
        "histogram": data_plots.class_histogram(LONG, names, counts),
        "totals": data_plots.class_totals(LONG, names, np.array([3, 2, 1])),
        "samples": data_plots.contact_sheet(LONG, names[:1], [picture], [picture], (0, 1)),
    }


def test_no_title_is_cut_off(facts: RunData) -> None:
    for name, figure in drawn(facts).items():
        figure.draw_without_rendering()
        titles = [*figure.texts, *(axes.title for axes in figure.axes)]
        titles += [] if figure._suptitle is None else [figure._suptitle]
        boxes = {title.get_text(): title.get_window_extent() for title in titles if title.get_text()}
        assert any(LONG[:10] in text for text in boxes), name
        for text, box in boxes.items():
            assert 0 <= box.x0 < box.x1 <= figure.bbox.width, (name, text)
            assert 0 <= box.y0 < box.y1 <= figure.bbox.height, (name, text)


# Files


def test_plots_are_written_for_print_and_for_pages(facts: RunData, tmp_path: Path) -> None:
    messages: list[str] = []
    with plot_style(messages.append):
        figure = test_plots.class_accuracy_figure(f"{facts.name}: <b>", predictions(facts))
        page = page_svg(figure, 'what "it" is')
        svg, pdf = save(figure, tmp_path / "deep" / "er", "name")
        again = [path.read_bytes() for path in save(figure, tmp_path, "name")]
    assert not messages
    assert pdf.read_bytes().startswith(b"%PDF-")
    assert [svg.read_bytes(), pdf.read_bytes()] == again, "the same plot gives the same file"
    assert "<text" not in svg.read_text(), "print files do not depend on installed fonts"
    root = ElementTree.fromstring(page)
    assert root.attrib["aria-label"] == 'what "it" is'
    texts = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {f"{HOSTILE[0]}  (3)", f"{HOSTILE[1]}  (2)", "known: <b>"} <= texts, "unchanged, and as text"
    assert all("id" not in element.attrib for element in root.iter("{http://www.w3.org/2000/svg}g"))
    assert "#1a1a1a" not in page, "the page's colors"


def test_colors_are_those_of_okabe_and_ito_and_differ() -> None:
    okabe_ito = {"#000000", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7"}
    assert set(CYCLE) <= okabe_ito
    assert len(set(CYCLE)) == len(CYCLE)
    assert len(set(SPLIT_COLORS.values())) == 3
    figure = Figure()
    assert to_hex(figure.subplots().bar([0], [1], color=SPLIT_COLORS["train"])[0].get_facecolor()) == "#0072b2"


def test_a_report_of_20000_classes_needs_no_matrix_of_all_pairs() -> None:
    """The matrix would take 3 GB, and an accuracy figure with one rectangle per class minutes."""
    random, count = np.random.default_rng(0), 20_000
    labels, names = np.arange(2 * count) % count, [str(i) for i in range(2 * count)]
    predicted = np.where(random.random(2 * count) < 0.5, labels, random.integers(0, count, 2 * count))
    found = RunPredictions(names, names[:count], labels, predicted, random.random(2 * count))
    tracemalloc.start()
    figure = test_plots.class_accuracy_figure("title", found)
    assert len(confusions(found)) > 10_000
    assert tracemalloc.get_traced_memory()[1] < 200e6
    tracemalloc.stop()
    assert len(figure.axes[0].patches) == 1
