"""One file about a run: nothing breaks out of it, nothing is loaded from a network, and it stays small."""

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser

import pytest
from records import EVIL, QUOTED, record, series_of_run

from lightning_conv.reporting.page.html_page import compare_page, run_page
from lightning_conv.reporting.series import Series

LARGEST = 2_000_000
VOID = {"meta", "br", "img", "link", "hr", "input"}


class Tree(HTMLParser):
    """Every element with its attributes, its text, and whether all of them are closed in order."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.texts = [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def text(self, *within):
        return "".join(
            data for tag, data in self.texts if (tag in within if within else tag not in ("script", "style"))
        )

    def scripts(self):
        return [attrs for tag, attrs in self.elements if tag == "script"]


def charts(page):
    return json.loads(re.search(r'id="data-charts">(.*?)</script>', page, re.DOTALL)[1])


@pytest.fixture(scope="module")
def page():
    return run_page(record())


@pytest.mark.parametrize(
    "make", [lambda **k: run_page(record(**k)), lambda **k: compare_page([record(**k), record("b")])]
)
@pytest.mark.parametrize("evil", [EVIL, QUOTED, "</script><script>alert(3)</script>", "$x^", "\udc80", "&lt;"])
def test_names_and_messages_stay_text(make, evil):
    harmless, attacked = Tree(make()), Tree(make(evil=evil))
    assert not attacked.open
    # The same elements with the same names of attributes: what was added is text, except for lengths of lists.
    assert [tag for tag, _ in attacked.elements if tag in ("script", "img", "iframe", "link", "object")] == [
        "script"
    ] * 4
    assert len(harmless.scripts()) == len(attacked.scripts())
    assert not any(name.startswith("on") for _, attrs in attacked.elements for name in attrs)
    shown = evil.encode("utf-8", "replace").decode()
    assert f"The units of {shown}x are dead." in attacked.text()
    assert f"net.0{shown}" in attacked.text("code")


def test_only_the_two_scripts_of_the_page_are_allowed_to_run(page):
    tree = Tree(page)
    policy = next(attrs["content"] for tag, attrs in tree.elements if attrs.get("http-equiv"))
    found = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    hashes = {base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in found}
    assert set(re.findall(r"'sha256-([^']+)'", policy)) == hashes
    assert len(found) == 2
    assert "default-src 'none'" in policy
    assert "unsafe-eval" not in policy


def test_nothing_is_loaded_from_anywhere(page):
    tree = Tree(page)
    for tag, attrs in tree.elements:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            assert attrs.get(name, "#").startswith("#"), (tag, attrs)
        assert "url(" not in (attrs.get("style") or "").replace("url(#", "")
    for style in re.findall(r"<style>(.*?)</style>", page, re.DOTALL):
        assert "@import" not in style
        assert "url(" not in style
    assert not re.search(r"\b(fetch|XMLHttpRequest|WebSocket|sendBeacon|importScripts)\b", page)


def test_both_themes_define_the_same_colours_and_can_be_chosen(page):
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
    blocks = {
        "light": re.search(r":root\{color-scheme:light;(.*?)\}", style, re.DOTALL)[1],
        "dark": re.search(r":root\[data-theme=dark\]\{color-scheme:dark;(.*?)\}", style, re.DOTALL)[1],
        "system": re.search(
            r"prefers-color-scheme:dark\)\{:root:not\(\[data-theme=light\]\)\{(.*?)\}", style, re.DOTALL
        )[1],
    }
    names = {which: dict(re.findall(r"(--\w+):([^;}\s]+)", block)) for which, block in blocks.items()}
    assert names["light"].keys() == names["dark"].keys()
    assert names["dark"] == names["system"]
    used = set(re.findall(r"var\((--\w+)\)", style))
    assert used <= names["light"].keys()
    assert any(attrs.get("id") == "theme" for _, attrs in Tree(page).elements)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_have_enough_contrast_in_both_themes(page, scheme):
    block = re.search(rf"color-scheme:{scheme};(.*?)\}}", page, re.DOTALL)[1]
    colors = dict(re.findall(r"(--\w+):(#\w+)", block))

    def luminance(color):
        digits = color[1:] if len(color) == 7 else "".join(2 * each for each in color[1:])
        parts = [int(digits[k : k + 2], 16) / 255 for k in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one, two):
        low, high = sorted((luminance(colors[one]), luminance(colors[two])))
        return (high + 0.05) / (low + 0.05)

    for text in ("--ink", "--soft", "--ok", "--notice", "--warning", "--alert", "--link"):
        assert contrast(text, "--card") >= 4.5, text
        assert contrast(text, "--bg") >= 4.5, text
    for line in (f"--c{k}" for k in range(8)):
        assert contrast(line, "--card") >= 3, line


def test_what_is_not_known_is_a_gap_and_no_zero(page):
    by_title = {each["title"]: each for each in charts(page)}
    stability = by_title["Stability ratio"]["lines"][0]
    assert stability["y"][stability["x"].index(50)] is None
    assert by_title["Stability ratio"]["edge"] == 1.0
    lambda_min = by_title["lambda_min"]["lines"][0]
    assert by_title["lambda_min"]["log"]
    for key, tag in (("y", ""), ("lower", "_lower"), ("upper", "_upper")):
        assert lambda_min[key] == pytest.approx(series_of_run()[f"kernel/lambda_min{tag}"].values, rel=1e-5)
    assert lambda_min["lower"][0] < 0


def test_undecided_criteria_have_a_dash_and_the_others_are_folded_by_reason(page):
    text = Tree(page).text()
    assert "undecided" in text
    row = re.search(r'<tr><td><b class="v-undecided">.*?</tr>', page)[0]
    assert row.count("<td>–</td>") == 1
    folded = re.search(r"<details><summary>3 not applicable, by reason</summary>(.*?)</details>", page)[1]
    assert folded.count("<li>") == 1
    assert "theory/none" not in text


def test_the_words_come_first_with_their_levels_and_the_most_severe_ones_on_top(page):
    levels = re.findall(r'<span class="level (\w+)">', page)
    assert levels[:2] == ["alert", "ok"]
    assert page.index("In plain words") < page.index("The run in one picture") < page.index("<h2>Charts")
    assert "Not judged: where the loss will be (no time for it)." in Tree(page).text()


@pytest.mark.parametrize("layers", [1, 10, 50])
def test_each_layer_has_a_bar(layers):
    page = run_page(record(layers=layers))
    assert page.count('class="bar"') == layers
    assert re.search(rf"<details{' open' if layers <= 12 else ''}><summary>Layers[^<]*\({layers}\)", page)


@pytest.mark.parametrize("number", [1, 3, 7])
def test_runs_side_by_side_have_a_line_each(number):
    runs = [record(f"run {k}", layers=50, seed=k) for k in range(number)]
    page = compare_page(runs)
    tree = Tree(page)
    assert not tree.open
    assert len(page.encode()) < LARGEST
    by_title = {each["title"]: each for each in charts(page)}
    assert len(by_title["lambda_min"]["lines"]) == number
    assert all(f"run {k}" in tree.text("th") for k in range(number))
    identifiers = [attrs["id"] for _, attrs in tree.elements if "id" in attrs and attrs["id"] in ("theme", "tip")]
    assert sorted(identifiers) == ["theme", "tip"]
    assert ("Settings that differ" in tree.text("h2")) == (number > 1)
    assert "theory/none" not in tree.text()


def test_two_runs_of_one_name_are_refused():
    with pytest.raises(ValueError, match="with different names"):
        compare_page([record("a"), record("a")])
    with pytest.raises(ValueError, match="need one run or more"):
        compare_page([])


def test_a_page_stays_small_whatever_was_logged():
    many = {f"theory/q{k}": Series().extend((s, math.sin(s * k)) for s in range(2000)) for k in range(120)}
    settings = {"Hyper-parameters": {f"name_{k}": "x" * 10_000 for k in range(300)}}
    metrics = {f"theory/metric_{k}": 1.0 for k in range(2000)}
    full = record(layers=300, series=series_of_run() | many, settings=settings, metrics=metrics)
    assert len(run_page(full).encode()) < LARGEST
    few = [record(f"run {k}", layers=300, series=series_of_run() | many) for k in range(7)]
    assert len(compare_page(few).encode()) < LARGEST


def test_a_run_of_which_nothing_is_known_has_a_page_that_says_so():
    tree = Tree(
        run_page(
            record(findings=(), not_judged={}, criteria=(), metrics={}, series={}, shares={}, settings={}, seconds={})
        )
    )
    assert not tree.open
    assert "Nothing could be judged." in tree.text()
    assert "There is nothing to draw" in tree.text()
    assert "LambdaMin measures it." in tree.text().replace("\n", " ")


def test_the_networks_of_several_optimizers_have_charts_and_figures_of_their_own():
    found = series_of_run()
    tagged = {
        tag.replace("kernel/", "kernel/critic/", 1): each for tag, each in found.items() if tag.startswith("kernel/")
    }
    page = run_page(record(series=found | tagged, optimizers=("generator", "critic"), shares={"critic": {"a": 1.0}}))
    titles = [each["title"] for each in charts(page)]
    assert "lambda_min (critic)" in titles
    assert "lambda_min (generator)" not in titles
    assert page.count("<svg ") == 2
    assert "The network of critic" in Tree(page).text()


def test_several_runs_are_compared_in_one_quantity():
    both = series_of_run()
    other = {tag: each for tag, each in both.items() if tag != "health/stability"} | {
        "kernel/step_size_ratio": both["theory/loss"]
    }
    page = compare_page([record("a"), record("b"), record("c", series=other)])
    chart = {each["title"]: each for each in charts(page)}["Stability ratio"]
    assert [each["label"] for each in chart["lines"]] == ["a", "b"]
    assert "Forecast" not in [each["title"] for each in charts(page)]
    assert chart["about"].startswith("Shown: curvature over its limit. ")
    verdicts = re.findall(r"<code>false</code></td>(.*?)</tr>", page)[0]
    assert verdicts.count("refuted</b>") == 3
