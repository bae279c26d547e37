"""The table and the page of a comparison: their content, escaping, missing pieces, nothing half written."""

import base64
import hashlib
import io
import json
import math
import re
from html.parser import HTMLParser
from io import StringIO

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import image, pyplot
from matplotlib.figure import Figure
from rich.console import Console

from lightning_modules.report import (
    RunResult,
    _InlineFigures,
    _map_figure,
    attention_figure,
    comparison_table,
    loss_figure,
    position_figure,
    print_comparison,
    write_report,
)

EVIL = "<script>alert('&')</script> [bold] $\\frac{$"


def causal_maps(heads, tokens, seed=0):
    scores = torch.randn(heads, tokens, tokens, generator=torch.Generator().manual_seed(seed))
    return scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -math.inf).softmax(-1)


def circuit():
    figure = Figure(figsize=(2, 1))
    figure.add_axes((0, 0, 1, 1)).plot([0, 1], [0, 1], color="black")
    return figure


def result(name="qisa", cross_entropy=2.179, **changes):
    values = {
        "parameters": 20561,
        "metrics": {
            "cross_entropy": cross_entropy,
            "bits_per_character": 3.1436,
            "perplexity": 8.837,
            "cer": 0.639,
            "wer": 0.871,
            "bleu": 0.0219,
            "continuation_cer": 0.8125,
        },
        "per_position": [3.0, 2.5, 2.25, 2.125, 2.0],
        "train_characters_per_second": 123456.7,
        "generation_characters_per_second": 98.76,
        "causal": True,
        "sample": "To be,\n  or not",
        "history": [
            {"step": 0, "train_loss": 4.2, "val_loss": 4.1},
            {"step": 10, "train_loss": 3.5},
            {"step": 20, "train_loss": 3.0, "val_loss": 2.9},
        ],
        "attention_maps": {"layer 0": causal_maps(2, 5).tolist()},
        "attention_labels": list("To be"),
        "settings": {"preset": "qisa-16", "attention": {"name": name, "heads": 3}},
    }
    return RunResult(name, **{**values, **changes})


class Page(HTMLParser):
    """Elements with their attributes, and the text of each element that has no children."""

    VOID = {"meta", "img", "br", "link"}

    def __init__(self, path):
        super().__init__()
        self.elements, self.open, self.texts = [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append((tag, dict(attributes), []))

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.open:
            self.open[-1][2].append(data)

    def handle_endtag(self, tag):
        opened, attributes, text = self.open.pop()
        assert opened == tag, f"<{opened}> closed by </{tag}>"
        self.texts.append((tag, attributes, "".join(text)))

    def all_texts(self, tag):
        return [text for name, _, text in self.texts if name == tag]

    def row(self, title):
        """The cells of a run in the headline table."""
        rows, current = {}, None
        for tag, attributes, text in self.texts:
            if tag == "span" and not attributes:
                current = text.strip()
            if tag == "td" and "data-label" in attributes:
                label = attributes["data-label"].split(",")[0]
                rows.setdefault(current, {})[label] = (text, "best" in attributes.get("class", ""))
        return rows[title]


def printed(results, width=None):
    file = StringIO()
    print_comparison(results, Console(file=file, width=width))
    return file.getvalue()


def test_the_table_holds_every_column():
    lines = printed([result()]).splitlines()
    row = next(line for line in lines if line.startswith("qisa"))
    values = ["20,561", "2.179", "3.144", "8.84", "0.639", "0.871", "0.022", "123,457", "98.8", "yes"]
    assert row.split() == ["qisa", *values]
    headings = " ".join(lines[:2])
    for heading in (
        "params",
        "entropy",
        "char",
        "plexity",
        "CER",
        "WER",
        "BLEU",
        "train",
        "gener.",
        "causal",
    ):
        assert heading in headings
    assert len(comparison_table([result()]).columns) == 11


def test_the_table_fits_100_columns_and_has_no_colours_in_a_pipe():
    results = [
        result("qisa-absorbed", parameters=116_534_784),
        result("published", causal=False, train_characters_per_second=9_999_999.0),
        result("x", title="a title that is long enough to need more than one line of the table"),
    ]
    text = printed(results)
    assert "\x1b" not in text and max(map(len, text.splitlines())) <= 100
    for value in ("qisa-absorbed", "116,534,784", "9,999,999", " LEAKS"):
        assert value in text
    text = " ".join(text.split())
    assert "corpus level" in text and "no smoothing" in text and "can make it 0" in text


def test_the_table_takes_titles_as_they_are_and_shows_what_is_missing():
    text = printed([RunResult("bare", title="[red]bare[/]"), result(metrics={"cross_entropy": math.nan})])
    assert "[red]bare[/]" in text
    row = next(line for line in text.splitlines() if line.startswith("[red]bare"))
    assert row.split()[1:] == ["–"] * 10


def test_a_terminal_is_not_widened():
    file = StringIO()
    print_comparison([result()], Console(file=file, width=80, force_terminal=True, color_system=None))
    assert max(map(len, file.getvalue().splitlines())) <= 80


def test_the_files_of_a_report(tmp_path):
    folder = tmp_path / "runs" / "two"
    results = [result("classical", circuit=None), result("qisa", circuit=circuit())]
    assert write_report(folder, results, "Two runs") == folder / "report.html"
    assert {path.name for path in folder.iterdir()} == {
        *("report.html", "results.json", "loss.png", "attention-classical.png", "attention-qisa.png"),
        "circuit-qisa.png",
    }
    for picture in folder.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_page_is_self_contained(tmp_path):
    runs = [result("classical"), result("qisa", circuit=circuit())]
    page = Page(write_report(tmp_path, runs, "Two runs"))
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object"}
    references = [
        value
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href")
    ]
    assert references and all(reference.startswith(("data:", "#")) for reference in references)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {reference[1:] for reference in references if reference.startswith("#")} <= set(ids)
    assert [tag for tag, _ in page.elements].count("svg") == 2 + 2 * 2
    assert "prefers-color-scheme: dark" in page.source and "width=device-width" in page.source


def test_the_circuit_is_in_the_page(tmp_path):
    page = Page(write_report(tmp_path, [result(circuit=circuit())], "One run"))
    (uri,) = [attributes["src"] for tag, attributes in page.elements if tag == "img"]
    kind, data = uri.split(",")
    assert kind == "data:image/svg+xml;base64" and base64.b64decode(data).startswith(b"<svg")


def test_everything_is_escaped(tmp_path):
    evil = result(
        "evil",
        title=EVIL,
        sample=EVIL,
        attention_maps={EVIL: causal_maps(1, 5)},
        attention_labels=[EVIL[:8], "$a$", "\n", "</text>", "\x00"],
        settings={EVIL: EVIL},
        metrics={EVIL: 1.0},
        circuit=circuit(),
    )
    page = Page(write_report(tmp_path, [evil, result("other")], EVIL, EVIL))
    assert "script" not in {tag for tag, _ in page.elements}
    assert page.all_texts("pre") == [EVIL, "To be,\n  or not"]
    assert page.all_texts("h1") == page.all_texts("title") == page.all_texts("p")[:1] == [EVIL]
    assert EVIL in page.all_texts("figcaption") and EVIL in page.all_texts("td") and EVIL in page.all_texts("th")
    for label in ("<script>", "$a$", "↵", "</text>", "·"):
        assert page.all_texts("text").count(label) == 2


def test_numbers_of_the_page_and_the_best_of_them(tmp_path):
    leak = result("leak", 0.167, causal=False)
    leak.metrics["bleu"] = 0.9
    runs = [result("classical", 2.132), result("qisa", 2.179), leak, result("unknown", math.nan, causal=None)]
    for run in runs:
        run.attention_maps = {}
    page = Page(write_report(tmp_path, runs, "Four runs"))
    assert page.row("classical")["cross-entropy"] == ("2.132", True)
    assert page.row("qisa")["cross-entropy"] == ("2.179", False)
    assert page.row("LEAKS: leak")["cross-entropy"] == ("0.167", False)
    assert page.row("unknown")["cross-entropy"] == ("–", False)
    assert page.row("LEAKS: leak")["BLEU"] == ("0.900", False)
    assert page.row("classical")["WER"] == ("0.871", False)  # the same in all runs that compete
    assert [page.row(run.title)["causal"][0] for run in runs] == ["yes", "yes", "LEAKS", "–"]
    assert page.all_texts("span").count("sees the future") > 0
    assert page.all_texts("td").count("0.8125") == 4


def test_settings_are_split_into_shared_and_different(tmp_path):
    runs = [
        result("a"),
        result("b", attention_maps={}, settings={"preset": "qisa-16", "attention": {"name": "b"}, "seed": 3}),
    ]
    page = Page(write_report(tmp_path, runs, "Two runs"))
    shared = page.source[page.source.index("The same for all") : page.source.index("<footer>")]
    different = page.source[page.source.index("Where the runs differ") : page.source.index("The same for all")]
    for key in ("attention.name", "attention.heads", "seed"):
        assert key in different and key not in shared
    assert "preset" in shared and "preset" not in different


def test_results_as_plain_numbers(tmp_path):
    run = result(train_characters_per_second=math.inf, per_position=torch.tensor([1.5, 2.5]))
    run.metrics["wer"] = torch.tensor(math.nan)
    run.settings["path"] = tmp_path
    write_report(tmp_path, [run], "One run")

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    plain = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert plain["title"] == "One run"
    (one,) = plain["results"]
    assert one["parameters"] == 20561 and one["causal"] is True and one["sample"] == "To be,\n  or not"
    assert one["metrics"]["cross_entropy"] == 2.179 and one["metrics"]["wer"] is None
    assert one["train_characters_per_second"] is None and one["per_position"] == [1.5, 2.5]
    assert one["history"][1] == {"step": 10, "train_loss": 3.5}
    assert one["settings"]["path"] == str(tmp_path)
    assert not {"attention_maps", "circuit"} & set(one)


@pytest.mark.parametrize(
    "run",
    [
        RunResult("bare"),
        RunResult("nan", parameters=None, metrics={"cross_entropy": math.nan, "perplexity": math.inf}),
        RunResult("diverged", history=[{"step": 1, "train_loss": math.nan, "val_loss": None}, {"step": 2}]),
        RunResult("positions", per_position=[math.nan, 2.0, math.inf]),
        RunResult("maps", attention_maps={"a": torch.full((2, 3, 3), math.nan), "b": torch.ones(1, 1, 1)}),
        RunResult("few labels", attention_maps={"a": torch.ones(1, 3, 3)}, attention_labels=["x"]),
        RunResult("other script", attention_maps={"a": torch.ones(1, 2, 2)}, attention_labels=["言", "🙂"]),
    ],
    ids=lambda run: run.name,
)
def test_missing_pieces_do_not_matter(tmp_path, run):
    Page(write_report(tmp_path / "alone", [run], "One run"))
    Page(write_report(tmp_path / "beside", [run, result(attention_maps={})], "Two runs"))
    printed([run, result()])


def test_loss_curves():
    def curves(figure):
        return [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in figure.axes[0].lines]

    run = result()
    run.history.append({"step": 30, "train_loss": math.nan, "val_loss": math.inf})
    figure = loss_figure([run, result("other", title="$\\frac{$")])
    assert curves(figure)[:2] == [([0, 10, 20], [4.2, 3.5, 3.0]), ([0, 20], [4.1, 2.9])]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["qisa", "$\\frac{$"]
    assert curves(position_figure([run])) == [([0, 1, 2, 3, 4], [3.0, 2.5, 2.25, 2.125, 2.0])]
    assert loss_figure([RunResult("bare")]) is None and position_figure([RunResult("bare")]) is None


def test_attention_maps_have_queries_as_rows():
    weights = torch.zeros(2, 5, 5)
    weights[1, 3, 2] = 0.25
    figure = attention_figure(result(attention_maps={"first": weights, "second": weights[1:]}))
    axes = figure.axes[1]
    image = axes.images[0]
    assert image.get_array()[3, 2] == 0.25 and image.get_array().sum() == 0.25
    assert image.norm(0.25) == pytest.approx(0.5) and image.origin == "upper"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["T", "o", "␣", "b", "e"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["T", "o", "␣", "b", "e"]
    assert [a.get_title() for a in figure.axes] == ["first, head 1", "first, head 2", "second", ""]
    assert attention_figure(RunResult("bare")) is None


def test_only_a_leaking_map_paints_the_future():
    causal, leaking = causal_maps(1, 5), causal_maps(1, 5).transpose(1, 2)
    figure = attention_figure(result(attention_maps={"causal": causal, "leaking": leaking}))
    shaded, plain = (len(axes.patches) for axes in figure.axes)
    assert (shaded, plain) == (1, 0)
    corner = figure.axes[0].patches[0].get_path()
    inside = [(query, key) for query in range(5) for key in range(5) if corner.contains_point((key, query))]
    assert inside == [(query, key) for query in range(5) for key in range(5) if key > query]


def test_maps_of_long_sentences_fold(tmp_path):
    run = result(
        attention_maps={f"layer {i}": causal_maps(1, 29, seed=i) for i in range(2)},
        attention_labels=["word"] * 29,
    )
    page = Page(write_report(tmp_path, [run], "One run"))
    maps = [attributes for tag, attributes in page.elements if tag == "details"]
    assert [("open" in attributes) for attributes in maps] == [
        True,
        False,
        False,
    ]  # the last holds the settings


def test_nothing_is_left_in_matplotlib(tmp_path):
    before, figures = dict(matplotlib.rcParams), pyplot.get_fignums()
    write_report(tmp_path, [result(circuit=circuit())], "One run")
    assert dict(matplotlib.rcParams) == before and pyplot.get_fignums() == figures


def test_the_same_results_give_the_same_files(tmp_path):
    for name in ("a", "b"):
        write_report(tmp_path / name, [result(circuit=circuit())], "One run", ["Note.", "Another."])
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_a_failed_report_leaves_the_old_one(tmp_path):
    write_report(tmp_path, [result()], "Old")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"'layer 0' must be \(heads, tokens, tokens\); got \(5, 7\)"):
        write_report(tmp_path, [result(attention_maps={"layer 0": torch.ones(5, 7)})], "New")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_new_report_takes_away_the_pictures_of_the_old_one_and_no_others(tmp_path):
    write_report(tmp_path / "run", [result("a", circuit=circuit()), result("b", circuit=circuit())], "Old")
    old = {"attention-a.png", "attention-b.png", "circuit-a.png", "circuit-b.png", "loss.png"}
    assert {path.name for path in (tmp_path / "run").glob("*.png")} == old
    (tmp_path / "run" / "circuit-b.png").write_bytes(b"drawn anew by hand")
    for name in ("mine.png", "attention-c.png", "notes.txt"):
        (tmp_path / "run" / name).write_bytes(b"mine")
    write_report(tmp_path / "run", [result("a", history=[])], "New")
    kept = {"attention-a.png", "circuit-b.png", "mine.png", "attention-c.png"}
    assert {path.name for path in (tmp_path / "run").glob("*.png")} == kept and (tmp_path / "run/notes.txt").exists()
    write_report(tmp_path / "run", [RunResult("x")], "Newer")
    assert {path.name for path in (tmp_path / "run").glob("*.png")} == kept - {"attention-a.png"}


@pytest.mark.parametrize(
    "record",
    ["", "[]", "{", '{"pictures": 3}', '{"pictures": {"../up.png": "%s", "run.txt": "%s", "link.png": "%s"}}'],
)
def test_a_record_of_pictures_that_names_other_files(tmp_path, record):
    folder, content = tmp_path / "run", b"mine"
    folder.mkdir()
    for path in (tmp_path / "up.png", folder / "run.txt"):
        path.write_bytes(content)
    (folder / "link.png").symlink_to(tmp_path / "up.png")
    (folder / "results.json").write_text(record.replace("%s", hashlib.sha256(content).hexdigest()))
    write_report(folder, [RunResult("x")], "New")
    assert all(path.read_bytes() == content for path in (tmp_path / "up.png", folder / "run.txt", folder / "link.png"))


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="at least one result; got none"):
        write_report(tmp_path, [], "None")
    with pytest.raises(ValueError, match="names that differ, also as file names; got a-b, a-b"):
        write_report(tmp_path, [result("a b"), result("a/b")], "Two runs")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write"):
        write_report(tmp_path / "file", [RunResult("x")], "One run")


def test_maps_that_share_a_frame_have_their_own_pixels():
    """A map in a frame that another one has drawn is, but for its ids, what matplotlib draws; and no id comes twice."""
    first, second = causal_maps(2, 7)
    leaking, odd = torch.rand(7, 7, generator=torch.Generator().manual_seed(1)).double(), second.clone()
    odd[3, 1] = math.nan
    labels = list("abc$<&é")
    figures = _InlineFigures()
    shared = [figures.map(weights, labels, "a map") for weights in (first, second, leaking, odd)]
    assert len(figures._frames) == 2

    def drawn(svg):
        """The SVG without its ids, and the pixels of its image."""
        png = re.search(r'base64,\s*([^"]+)"', svg)[1]
        frame = re.sub(r'( id="|url\(#|href="#)[^")]+', r"\1", svg).replace(png, "").replace("base64,\n", "base64,")
        return frame, image.imread(io.BytesIO(base64.b64decode(png)))

    for svg, weights in zip(shared, (first, second, leaking, odd), strict=True):
        alone, pixels = drawn(_InlineFigures().svg(_map_figure(weights, labels), "a map"))
        assert drawn(svg)[0] == alone
        np.testing.assert_array_equal(drawn(svg)[1], pixels)
    ids = re.findall(r' id="([^"]+)"', "".join(shared))
    assert len(ids) == len(set(ids)) > 4
    for reference in re.findall(r'(?:url\(#|href="#)([^")]+)', "".join(shared)):
        assert reference in ids
