"""The HTML page of a report: what it contains, and how a browser lays it out on a desk and on a phone."""

import pytest
from helpers.browser import laid_out

from hylo_megatron.evaluate.page import Heading, Paragraph, Picture, Table, html, markdown
from hylo_megatron.evaluate.plots import heat_map

MODELS = ["teacher", "teacher with YaRN", "control", "model", "model / teacher", "model / control"]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    cells = [{"depth": depth, "length": 1024, "accuracy": 0.5} for depth in (0.0, 1.0)]
    heat_map({"model": cells}, folder / "needle.png")
    rows = [
        [f"RULER niah_multikey_{n}, 262,144 tokens", *["97 % (97/100; 92–99)"] * 4, "+1.0 points", ""] for n in "12"
    ]
    rows.append(["layers", *["30 attention"] * 3, "3 mla + 27 gdn", "", ""])
    rows.append(["name", "SmolLM2-135M-Instruct-with-a-long-name-and-no-space", "", "b<i>&", "", "", ""])
    blocks = [
        Heading("Evaluation", 1), Table([["", *MODELS], *rows]), Paragraph("Seed 0 & <b>more</b>."),
        Heading("Needle retrieval", 2), Picture("Needle retrieval", "needle.png"),
    ]  # fmt: skip
    return html(blocks, folder), blocks


def test_the_page_and_markdown_have_every_block(page):
    text, blocks = page
    assert "<title>Evaluation</title>" in text and "<script" not in text and "http" not in text
    assert "Seed 0 &amp; &lt;b&gt;more&lt;/b&gt;." in text and "b&lt;i&gt;&amp;" in text
    assert '<td data-column="model / control"></td>' in text and text.count("<tr>") == 5
    assert 'src="data:image/png;base64,iVBOR' in text
    plain = markdown(blocks)
    assert plain.startswith("# Evaluation\n\n|  | teacher |") and "![Needle retrieval](needle.png)" in plain


@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_shows_the_page_without_overflow(page, tmp_path, width):
    found = laid_out(page[0], tmp_path, width, dark=width == 360)
    assert width - 20 <= found["width"] <= width and found["tables"] == 1 and found["cells"] >= 20
    assert not found["scrolls"] and found["wide"] == found["cut"] == 0, found
    assert len(found["pictures"]) == 1 and found["pictures"][0] > 100
    assert found["scripts"] == found["links"] == 0
    ink, paper = (sum(map(int, found[name][4:-1].split(","))) for name in ("ink", "paper"))
    assert (ink > paper) is (width == 360), "the colours do not follow the dark mode"


def test_the_browser_sees_overflow_and_missing_pictures(page, tmp_path):
    broken = page[0].replace("</style>", "table { width: 3000px !important }</style>").replace("iVBOR", "xxxxx")
    found = laid_out(broken, tmp_path, 360)
    assert found["scrolls"] and found["wide"] and found["pictures"] == [0]
