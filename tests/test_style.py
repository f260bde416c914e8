"""The look of figures: what the colour-blind see, text at a README's width, nothing on the data."""

import itertools
import json
import pathlib
import runpy

import numpy as np
import pytest
from test_report import DENSE, sparse

pytest.importorskip("matplotlib", reason="no matplotlib: pip install 'lte-jax[plot]'")
from lte_jax import figures, style

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = 800  # pixels of a README's column
# What dichromats see, of linear RGB: Machado, Oliveira and Fernandes 2009, severity 1.0.
SEEN = {
    "all": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
# sRGB to XYZ (IEC 61966-2-1) over the white point D65.
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
WHITE = np.array([0.9505, 1, 1.089])


def linear(colour):
    value = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """CIELAB of linear RGB."""
    t = TO_XYZ @ np.clip(rgb, 0, 1) / WHITE
    x, y, z = np.where(t > (6 / 29) ** 3, np.cbrt(t), t * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def ciede2000(one, other):
    """The colour difference CIEDE2000, after Sharma, Wu and Dalal 2005."""
    (l1, a1, b1), (l2, a2, b2) = one, other
    c7 = ((np.hypot(a1, b1) + np.hypot(a2, b2)) / 2) ** 7
    stretch = 1.5 - 0.5 * np.sqrt(c7 / (c7 + 25**7))
    a1, a2 = a1 * stretch, a2 * stretch
    c1, c2 = np.hypot(a1, b1), np.hypot(a2, b2)
    h1, h2 = (np.degrees(np.arctan2(b, a)) % 360 for a, b in ((a1, b1), (a2, b2)))
    turn = (h2 - h1 + 180) % 360 - 180 if c1 * c2 else 0
    light, chroma, hue = (l1 + l2) / 2, (c1 + c2) / 2, (h1 + turn / 2) % 360
    hue = hue if c1 * c2 else h1 + h2
    waves = ((0.17, 1, 30, -1), (0.24, 2, 0, 1), (0.32, 3, -6, 1), (0.2, 4, 63, -1))
    t = 1 + sum(s * w * np.cos(np.radians(k * hue - d)) for w, k, d, s in waves)
    in_light = 1 + 0.015 * (light - 50) ** 2 / np.sqrt(20 + (light - 50) ** 2)
    dl = (l2 - l1) / in_light
    dc = (c2 - c1) / (1 + 0.045 * chroma)
    dh = 2 * np.sqrt(c1 * c2) * np.sin(np.radians(turn / 2)) / (1 + 0.015 * chroma * t)
    around = np.radians(60 * np.exp(-(((hue - 275) / 25) ** 2)))
    rotation = -2 * np.sqrt(chroma**7 / (chroma**7 + 25**7)) * np.sin(around)
    return np.sqrt(dl**2 + dc**2 + dh**2 + rotation * dc * dh)


@pytest.mark.parametrize(
    ("one", "other", "expected"),  # Sharma, Wu and Dalal 2005, Table 1: pairs 1, 7, 15, 17, 25
    [
        ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
        ((50, 0, 0), (50, -1, 2), 2.3669),
        ((50, 2.5, 0), (50, 0, -2.5), 4.3065),
        ((50, 2.5, 0), (73, 25, -18), 27.1492),
        ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
    ],
)
def test_the_difference_is_that_of_its_authors(one, other, expected):
    assert ciede2000(one, other) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("eyes", SEEN)
def test_colours_are_told_apart(eyes):
    """By CIEDE2000. The smallest is 12.2; of the colours before these it was 3.0."""
    seen = {c: lab(np.array(SEEN[eyes]) @ linear(c)) for c in (*style.COLOURS, style.GREY)}
    for one, other in itertools.combinations(seen, 2):
        difference = ciede2000(seen[one], seen[other])
        assert difference >= 10, f"{one} and {other}: {difference:.1f}"


def test_colours_stand_out_from_the_ground():
    """A contrast of 3 for marks, 4.5 for text (WCAG 2.2)."""
    for colour in (*style.COLOURS, style.GREY, style.INK):
        luminance = TO_XYZ[1] @ linear(colour)
        assert 1.05 / (luminance + 0.05) >= (4.5 if colour in (style.GREY, style.INK) else 3)
    assert len(set(style.MARKERS)) == len(style.COLOURS)


RESULTS = [
    {"models": [DENSE, *(sparse(s, p, n) for s, p in ((0.5, 4.4), (0.75, 5), (0.9, 9)))]}
    for n in ("LTE", "random router")
]


def drawn(monkeypatch, draw):
    """The figures that are saved while `draw` runs, laid out."""
    found, save = [], style.save

    def keep(figure, path):
        save(figure, path)
        figure.draw_without_rendering()  # in pixels of 100 dots an inch, not of the file's
        found.append(figure)

    monkeypatch.setattr(style, "save", keep)
    draw()
    assert found
    return found


def of_package(out):
    figures.draw(RESULTS, out)
    figures.draw(RESULTS[:1], out, log=True)
    figures.draw([{"models": [DENSE, sparse(0.5, 4.4)]}], out)


def of_benchmarks(out):
    script = runpy.run_path(str(ROOT / "benchmarks/pictures.py"))
    script["draw"](out)


def of_many(out):
    """As many methods as a sweep may have."""
    many = [sparse(0.5, 4.4 + i, f"a method with a name, number {i}") for i in range(34)]
    with style.applied():
        style.save(figures.quality_panels({"many": [{"models": [DENSE, *many]}]}), out / "a.png")
        bars = {model["name"]: (1.0, 0.1) for model in many}
        style.save(figures.bar_panels({"many": bars}, "points"), out / "b.png")


@pytest.mark.parametrize("draw", [of_package, of_benchmarks, of_many])
def test_figures_read_at_the_width_of_a_readme(draw, tmp_path, monkeypatch):
    import matplotlib.text
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for figure in drawn(monkeypatch, lambda: draw(tmp_path)):
        assert figure.get_figwidth() == style.WIDTH
        renderer = FigureCanvasAgg(figure).get_renderer()
        whole = figure.get_tightbbox(renderer)  # of all that is drawn, in inches
        assert min(whole.min) > -0.02 and np.all(whole.max < figure.get_size_inches() + 0.02)
        for text in figure.findobj(matplotlib.text.Text):
            assert text.get_fontsize() / 72 * README / style.WIDTH >= 9, text
        for legend in figure.legends:
            box = legend.get_window_extent(renderer)
            assert not any(box.overlaps(axes.get_tightbbox(renderer)) for axes in figure.axes)
        assert not any(axes.get_legend() for axes in figure.axes)


def test_shares_start_at_zero_and_panels_share_their_axes(monkeypatch, tmp_path):
    quality, layers, scores = drawn(monkeypatch, lambda: figures.draw(RESULTS, tmp_path))
    for figure in (quality, layers, scores):
        assert {axes.get_ylim() for axes in figure.axes} == {figure.axes[0].get_ylim()}
        assert {axes.get_xlim() for axes in figure.axes} == {figure.axes[0].get_xlim()}
        assert figure.axes[0].get_ylim()[0] == 0
    assert quality.axes[0].get_xlim() == (0, 100) and layers.axes[0].get_ylim() == (0, 100)
    shown = [line for line in quality.axes[0].lines if line.get_label() == "dense"]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in shown] == [(0, 0)]


def test_panels_of_other_ranges_share_their_axes():
    wide = [{"models": [DENSE, sparse(0.9, 40.0)]}]
    for log in (False, True):
        panels = figures.quality_panels({"narrow": RESULTS[:1], "wide": wide}, log).axes
        low, high = panels[0].get_ylim()
        assert panels[1].get_ylim() == (low, high) and high > (10 if log else 900)


def test_the_logarithmic_axis_has_ratios():
    [axes] = figures._quality([RESULTS[0]], log=True).axes
    assert axes.get_yscale() == "log"
    [line] = [line for line in axes.lines if line.get_label() == "LTE"]
    np.testing.assert_allclose(line.get_ydata(), [1.1, 1.25, 2.25])
    [dense] = [line for line in axes.lines if line.get_label() == "dense"]
    assert list(dense.get_ydata()) == [1]
    metric = [
        {"models": [e | {"metrics": {"accuracy": 90 - 10 * e["sparsity"]}} for e in m["models"]]}
        for m in RESULTS
    ]
    assert figures._quality(metric, log=True).axes[0].get_yscale() == "linear"  # points


def test_both_number_formats_are_told_apart(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    script = runpy.run_path(str(ROOT / "benchmarks/report.py"))
    [figure] = drawn(monkeypatch, lambda: script["figure"](script["RESULTS"], tmp_path / "k.png"))
    lines = {line.get_label().split(" (")[0]: line for line in figure.axes[0].lines}
    one, other = lines["FFN layer, bfloat16"], lines["FFN layer, float32"]
    assert one.get_linestyle() != other.get_linestyle()
    assert one.get_markerfacecolor() != other.get_markerfacecolor()
    rows = json.loads((ROOT / "benchmarks/results/cpu.json").read_text())["ffn"]["rows"]
    for dtype, line in (("bfloat16", one), ("float32", other)):
        mine = {
            r["sparsity"]: r["ratio_to_dense"]
            for r in rows
            if (r["dtype"], r["batch"]) == (dtype, 1)
        }
        np.testing.assert_allclose(line.get_ydata(), [100 * mine[s] for s in sorted(mine)])


def test_the_table_of_tinystories_is_read_back():
    script = runpy.run_path(str(ROOT / "benchmarks/tinystories.py"))
    text = (ROOT / "docs/results.md").read_text()
    rows = script["rows"](text)
    assert len(rows) == len(list(script["runs"](240, 60, False)))
    head, *lines = script["table"](rows).splitlines()
    assert head in text and all(
        line.rpartition("|")[0].rpartition("|")[0] in text for line in lines
    )


def test_a_map_of_experts_shows_each_token_and_expert(monkeypatch):
    run_EL = np.arange(12).reshape(3, 4) % 5 == 0
    with style.applied():
        figure, [axes] = style.panels(1)
        figures.draw_experts(axes, run_EL, ["a", " b", " ", "\n"])
    [mesh] = axes.collections
    np.testing.assert_array_equal(mesh.get_array(), run_EL)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "␣", "↵"]
    assert axes.get_ylim() == (3, 0)  # the first expert on top
