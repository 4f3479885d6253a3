"""The page carries the glossary of the documentation, and explains its terms where they occur."""

from pathlib import Path

import pytest

from lightning_conv.reporting.page.glossary import AMBIGUOUS, glossary, marked, terms_of

PAGE = Path(__file__).resolve().parents[4] / "docs" / "glossary.md"


def test_the_file_is_made_from_the_documentation():
    terms = terms_of(PAGE.read_text("utf-8"))
    assert len(terms) == PAGE.read_text("utf-8").count("\n### ")
    made = "python -m lightning_conv.reporting.page.glossary docs/glossary.md"
    assert glossary() == terms, f"docs/glossary.md has changed; run {made}"


@pytest.mark.parametrize("term", list(glossary()))
def test_each_explanation_is_plain_text(term):
    text = glossary()[term]
    assert text.endswith((".", ")"))
    assert not set("\\$`{}") & set(text), text
    assert "See " not in text
    assert term in AMBIGUOUS or f'data-term="{term}"' in marked(f"Here {term} is."), term


def test_a_term_is_explained_once_and_never_inside_a_tag_or_a_longer_word():
    assert marked("probe and probe").count("<dfn") == 1
    seen = set()
    assert "<dfn" in marked("The probe.", seen)
    assert "<dfn" not in marked("The probe.", seen)
    for text in ("kernel/alignment", "lambda_min_ratio", "probes", "misalignment", "Probe(size=3)"):
        assert "<dfn" not in marked(text), text
    assert marked("<b> & 'x'") == "&lt;b&gt; &amp; &#x27;x&#x27;"
