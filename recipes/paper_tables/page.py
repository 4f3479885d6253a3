"""The two tables as Markdown, rendered from the ledger alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from statistics import mean, stdev
from typing import Any

from lightning_conv.recipes.paper_tables.ledger import Ledger, identity
from lightning_conv.reporting.markdown import markdown_table

TITLE = "# Rank of the last hidden features, and test errors"

INTRODUCTION = """\
The two tables of the experiments of Kawaguchi & Sun, "A Recipe for Global Convergence Guarantee in Deep Neural Networks" (AAAI 2021),
as this program measures them, on its own networks and settings (see [the recipes](../recipes.md)). Nothing here is taken from the paper.
Every run of the recipe is done twice with the same seed: *base*, as it is, and *guarded* by the two-phase rule, with equal settings and
numbers of steps. The seed decides the initial weights, the test split (where the data set has none), the subset, the order of the
batches and the augmentation. Settings are the packaged recipes', `wide_fc` and `bn_resnet`, unless a row says otherwise."""

RANKS = """\
## Does the expressivity condition hold?

The condition: [h, 1], the n x (m_H + 1) matrix of the last hidden features of all training samples and a column of ones, has rank n.
*certified* is a proof for the float64 features, with an allowance for rounding inside the network that is an estimate
([numbers](../numbers.md)). At the start BatchNorm's statistics are those of the training samples, for its running ones are not yet
any; at the switch the network is as it is deployed, after the guard's noise. Rank: proven, the smallest over the seeds. sigma_min:
n-th singular value, the smallest over the seeds, with its bounds; sigma_max the largest."""

ERRORS = """\
## What does the guarantee cost in test error?

Test error in per cent after the last step, mean and standard deviation over the seeds (n - 1 in the denominator). Difference: guarded
minus base, of the pairs with equal seeds, in points. Means: *within* the larger of the two standard deviations of one another, or *beyond*.
Loss: mean cross-entropy on the training set, without augmentation, after the last step. Certified: runs in which rank n was certified
at the switch; a run where it was not goes on as the base run does. With augmentation that certificate is about one draw of the inputs."""


def render(ledger: Ledger) -> str:
    """Render the tables with their notes.

    Args:
        ledger: finished cells; each group of cells that differ only in seed and guard gets one row.

    Returns:
        Markdown.
    """
    groups = _groups(ledger.cells)
    parts = [TITLE, INTRODUCTION, RANKS, _table(RANK_HEADER, _rank_rows(groups)), *_undecided(groups)]
    parts += [ERRORS, _table(ERROR_HEADER, _error_rows(groups)), "## How this was made", *_origins(ledger)]
    return "\n\n".join(parts) + "\n"


RANK_HEADER = (
    "data", "n", "recipe", "m_H", "seeds", "start", "rank / n", "sigma_min", "switch", "rank / n", "sigma_min", "sigma_max",
)  # fmt: skip
ERROR_HEADER = (
    "data", "n", "recipe", "epochs", "augmented", "seeds", "base, %", "guarded, %", "difference", "means", "loss, base",
    "loss, guarded", "certified",
)  # fmt: skip

Group = list[dict[str, Any]]


def _groups(cells: Sequence[dict[str, Any]]) -> list[Group]:
    """Return the cells in groups that differ in nothing but seed and guard, in a fixed order."""
    found: dict[str, Group] = {}
    for entry in cells:
        rest = {name: value for name, value in identity(entry["cell"]).items() if name not in ("seed", "guard")}
        found.setdefault(json.dumps(rest, sort_keys=True), []).append(entry)

    def place(group: Group) -> tuple[Any, ...]:
        cell = group[0]["cell"]
        return cell["data"] != "digits", cell["data"], cell["n"], cell["recipe"], cell["augment"], repr(cell["changed"])

    return sorted(found.values(), key=place)


def _recipe(cell: dict[str, Any]) -> str:
    """Return the recipe's name with the settings that differ from the packaged ones."""
    changed = ", ".join(f"{name} = {value}" for name, value in cell["changed"].items())
    return f"`{cell['recipe']}`" + (f", {changed}" if changed else "")


def _rank_rows(groups: Iterable[Group]) -> list[list[str]]:
    rows = []
    for group in groups:
        results = [entry["result"] for entry in group if "start" in entry["result"]]
        if not results:
            continue
        cell = group[0]["cell"]
        first, second = ([result[when] for result in results if result[when]] for when in ("start", "switch"))
        rows.append(
            [
                cell["data"],
                f"{cell['n']:,}",
                _recipe(cell),
                f"{results[0]['width']:,}",
                str(len(results)),
                *_certificates(first, len(results)),
                *_certificates(second, len(results)),
                _largest(second),
            ]
        )
    return rows


def _certificates(facts: Sequence[dict[str, Any]], runs: int) -> list[str]:
    """Return verdicts, smallest rank and smallest sigma_min."""
    if not facts:
        return ["none taken", "", ""]
    verdicts = [fact["verdict"] for fact in facts]
    counted = [f"{verdicts.count(name)} of {runs} {name}" for name in dict.fromkeys(sorted(verdicts))]
    worst = min(facts, key=lambda fact: fact["rank"])
    known = [fact["sigma_min"] for fact in facts if fact["sigma_min"] is not None]
    sigma = min(known, key=lambda bound: bound["lower"], default=None)
    return [", ".join(counted), f"{worst['rank']:,} / {worst['n']:,}", _bounded(sigma)]


def _largest(facts: Sequence[dict[str, Any]]) -> str:
    known = [fact["sigma_max"] for fact in facts if fact["sigma_max"] is not None]
    return _bounded(max(known, key=lambda bound: bound["value"], default=None))


def _bounded(bound: dict[str, float | None] | None) -> str:
    """Return a value with its bounds, or the value alone where they agree with it to the digits shown."""
    if bound is None:
        return "not asked for"
    value, lower, upper = (
        "unbounded" if bound[key] is None else f"{bound[key]:.2e}" for key in ("value", "lower", "upper")
    )
    return value if value == lower == upper else f"{value} in [{lower}, {upper}]"


def _undecided(groups: Iterable[Group]) -> list[str]:
    """Return one paragraph with the reason of every condition that is not certified; nothing if all are."""
    lines = []
    for entry in (entry for group in groups for entry in group):
        cell, result = entry["cell"], entry["result"]
        for when in ("start", "switch"):
            fact = result.get(when)
            if fact is not None and fact["verdict"] != "certified":
                place = (
                    f"{cell['data']}, {_recipe(cell)}{', augmented' if cell['augment'] else ''}, seed {cell['seed']}"
                )
                lines.append(f"- {place}, {when}: {fact['verdict']}: {fact['reason']}")
        if cell["guard"] and result.get("phase") == 1 and result.get("switch") is None:
            lines.append(f"- {cell['data']}, {_recipe(cell)}, seed {cell['seed']}: no switch: {result['reason']}")
    return ["Not certified:\n\n" + "\n".join(lines)] if lines else []


def _error_rows(groups: Iterable[Group]) -> list[list[str]]:
    rows = []
    for group in groups:
        by_seed: dict[int, dict[bool, dict[str, Any]]] = {}
        for entry in group:
            by_seed.setdefault(entry["cell"]["seed"], {})[entry["cell"]["guard"]] = entry["result"]
        pairs = [(runs[False], runs[True]) for _, runs in sorted(by_seed.items()) if len(runs) == 2]
        if not pairs:
            continue
        cell = group[0]["cell"]
        base, guarded = ([100 * pair[side]["test_error"] for pair in pairs] for side in (0, 1))
        difference = [after - before for before, after in zip(base, guarded, strict=True)]
        certified = sum(_is_certified(pair[1]) for pair in pairs)
        rows.append(
            [
                cell["data"],
                f"{cell['n']:,}",
                _recipe(cell),
                str(cell["epochs"]),
                "yes" if cell["augment"] else "no",
                str(len(pairs)),
                _spread(base, "{:.2f}"),
                _spread(guarded, "{:.2f}"),
                _spread(difference, "{:+.2f}"),
                judgement(base, guarded),
                *(_spread([pair[side]["train_loss"] for pair in pairs], "{:.1e}") for side in (0, 1)),
                f"{certified} of {len(pairs)}",
            ]
        )
    return rows


def _is_certified(result: dict[str, Any]) -> bool:
    return result.get("switch") is not None and result["switch"]["verdict"] == "certified"


def judgement(base: Sequence[float], guarded: Sequence[float]) -> str:
    """Compare the distance of two means with the larger standard deviation of the two samples.

    Args:
        base: numbers without the guard, one per seed.
        guarded: numbers with the guard, one per seed.

    Returns:
        `within`, `beyond`, or `one seed`, where there is no deviation.
    """
    if len(base) < 2:
        return "one seed"
    # Means of the same numbers in another order may differ by rounding.
    return "within" if abs(mean(guarded) - mean(base)) <= max(stdev(base), stdev(guarded)) + 1e-12 else "beyond"


def _spread(values: Sequence[float], form: str) -> str:
    """Return mean and standard deviation."""
    centre = form.format(mean(values))
    return centre if len(values) < 2 else f"{centre} ± {form.replace('+', '').format(stdev(values))}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return markdown_table(header, rows) if rows else "No finished runs yet."


def _origins(ledger: Ledger) -> list[str]:
    """Return the commands that ran the cells, by machine."""
    used: dict[str, list[str]] = {}
    for number, run in enumerate(ledger.runs):
        count = sum(entry["run"] == number for entry in ledger.cells)
        seconds = sum(entry["result"]["seconds"] for entry in ledger.cells if entry["run"] == number)
        if count:
            versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
            place = f"{run['machine']}, Python {run['python']}, {versions}"
            used.setdefault(place, []).append(
                f"- `{run['command']}`: {count} runs, {seconds / 60:.0f} minutes of training, {run['date'][:10]}"
            )
    return [f"On {place}:\n\n" + "\n".join(lines) for place, lines in used.items()]
