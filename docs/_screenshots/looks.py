"""What a page shows, read from its own elements: which charts there are, and how much is drawn in each."""

from __future__ import annotations

from dataclasses import dataclass

from _screenshots.browser import Page

DEEP = """
const deep = (node, wanted, found = []) => {
  for (const child of node.children || []) {
    if (wanted(child)) found.push(child);
    if (child.shadowRoot) deep(child.shadowRoot, wanted, found);
    deep(child, wanted, found);
  }
  return found;
};
"""
"""TensorBoard's elements have trees of their own, into which ``querySelector`` does not look."""

OPEN_GROUPS = f"""(() => {{ {DEEP}
const groups = deep(document.body, each => each.tagName === "TF-CATEGORY-PAGINATED-VIEW");
for (const group of groups) {{
  const heading = deep(group.shadowRoot || group, each => each.tagName === "BUTTON")[0];
  if (heading && !group.opened) heading.click();
}}
return groups.length > 0 && groups.every(group => group.opened);
}})()"""
"""Opens the groups of a tab that are folded: TensorBoard opens the first ones only."""

UNTICK_CONSTANTS = f"""(() => {{ {DEEP}
const boxes = deep(document.body, each => each.classList.contains("hparam-checkbox"));
for (const box of boxes) {{ if (box.checked && box.textContent.includes("/")) box.click(); }}
return boxes.length > 0;
}})()"""
"""Hides the columns of what was measured and never changed; the settings of the module have no stroke in their names."""

CARDS = f"""(() => {{ {DEEP}
const cards = deep(document.body, each => /^TF-CUSTOM-SCALAR-.*-CARD$/.test(each.tagName));
return cards.map(card => {{
  const head = deep(card.shadowRoot || card, each => each.tagName === "TF-CARD-HEADING")[0];
  const chart = deep(card.shadowRoot || card, each => each.tagName === "VZ-LINE-CHART2")[0];
  const drawn = chart ? deep(chart.shadowRoot || chart, each => each.tagName === "path") : [];
  const loading = deep(card.shadowRoot || card, each => each.tagName === "PAPER-SPINNER-LITE" && each.active).length;
  return {{ title: head ? head.displayName : "", drawn: drawn.filter(path => (path.getAttribute("d") || "").length > 1).length, loading }};
}});
}})()"""
"""The charts of TensorBoard's tab "Custom scalars": title, drawn lines and points, and whether data are on their way."""

IMAGES = f"""(() => {{ {DEEP}
const cards = deep(document.body, each => each.tagName === "TF-IMAGE-LOADER");
return cards.map(card => {{
  const pictures = deep(card.shadowRoot || card, each => each.tagName === "IMG");
  return {{ title: card.tag, drawn: pictures.filter(each => each.complete && each.naturalWidth > 0).length, loading: 0 }};
}});
}})()"""
"""The images of the tab "Images": tag, and whether there is a picture."""

CHARTS = """(() => {
const data = JSON.parse(document.getElementById("data-charts").textContent);
return [...document.querySelectorAll(".chart")].filter(card => !card.closest("details:not([open])")).map(card => {
  const chart = data[Number(card.dataset.chart)];
  const points = chart.lines.reduce((sum, line) => sum + line.y.filter(value => value !== null).length, 0);
  const box = card.getBoundingClientRect(), drawn = card.querySelectorAll(".plot canvas").length > 0;
  return { title: card.querySelector("h3").textContent, drawn: drawn ? points : 0, loading: 0, lines: chart.lines.length,
           box: { x: box.x + scrollX, y: box.y + scrollY, width: box.width, height: box.height } };
});
})()"""
"""The charts of ``convergence.html`` that are not folded away: title, points, lines, and where on the page each one is."""

WORDS = f"""(() => {{ {DEEP}
return deep(document.body, each => each.children.length === 0).map(each => each.textContent).join("\\n");
}})()"""
"""All words of a page."""


@dataclass(frozen=True)
class Card:
    """A chart or an image as it is on the screen.

    Attributes:
        title: Its heading.
        drawn: Number of lines, points or pictures in it; 0: it is empty.
        lines: Number of lines, where it is known.
        box: Its place on the page, where it is known.
    """

    title: str
    drawn: int
    lines: int = 0
    box: dict[str, float] | None = None


async def cards(page: Page, script: str) -> list[Card]:
    """Return the charts or images of the page, of ``CARDS``, ``IMAGES`` or ``CHARTS``."""
    return [
        Card(each["title"], int(each["drawn"]), int(each.get("lines", 0)), each.get("box"))
        for each in await page.run(script)
    ]


def faults(shown: list[Card], expected: list[str], where: str) -> list[str]:
    """Return what is wrong: a chart that is missing, one that is empty, one that nobody asked for.

    Args:
        shown: What is on the screen.
        expected: Titles that have to be there.
        where: For the words.
    """
    titles = [each.title for each in shown]
    return [
        *(f"{where}: there is no chart {title!r}" for title in expected if title not in titles),
        *(f"{where}: the chart {each.title!r} is empty" for each in shown if not each.drawn),
        *(f"{where}: nothing has asked for the chart {title!r}" for title in titles if title not in expected),
    ]
