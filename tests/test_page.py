"""The report: what it says of the paper's numbers, and that a browser shows all of it."""

import html.parser
import json
import shutil

import matplotlib.figure
import pytest
from playwright.sync_api import sync_playwright

from koopt import report
from koopt.experiments import page, verdicts

VOID = {"meta", "link", "img", "br", "hr", "input"}
SOLVER = [
    {
        "optimizer": "adam",
        "method": "koopman",
        "by": "node",
        "setting": "paper",
        "T": 2_500,
        "success": 0.92,
        "teq_over_T": 0.6,
        "censored": 0.0,
        "error_over_motion": 0.003,
        "speedup": 37.0,
        "paper_success": 0.84,
        "paper_success_low": 0.68,
        "paper_success_high": 0.96,
        "paper_teq_over_T": 0.85,
        "paper_error_over_motion": 0.0044,
        "paper_speedup": 98.0,
    },
    {
        "optimizer": "adam",
        "method": "koopman",
        "by": "network",
        "setting": "recommended",
        "T": 15_000,
        "success": 0.32,
        "teq_over_T": 0.0,
        "censored": 0.0,
        "speedup": 0.0,
    },
    {
        "optimizer": "adam",
        "method": "koopman",
        "by": "network",
        "setting": "recommended",
        "T": 2_500,
        "success": 1.0,
        "teq_over_T": 0.9,
        "censored": 0.0,
        "speedup": 3_567.0,
    },
    {"optimizer": "adam", "T": 2_500, "method": "line", "setting": "baseline", "success": 1.0, "teq_over_T": 0.97}
    | {"error_over_motion": 0.07},
    {"optimizer": "adam", "T": 2_500, "method": "regression", "setting": "baseline", "success": 0.9}
    | {"error_over_motion": 0.05},
]
ODD = [{"depth": 3, "note": "<script>window.broken = 1</script>", "seconds": 1.5e-7, "nothing": None, "flag": True}]


@pytest.fixture
def folders(tmp_path):
    """Two experiments that ran, one of them unknown to the page, and one that did not."""
    drawn = {"de-solver": ["figure2-adam.png", "error-ahead.png"], "new-one": ["odd_figure.png"]}
    for name, figures in drawn.items():
        (tmp_path / name).mkdir()
        for i, figure in enumerate(figures):
            matplotlib.figure.Figure(figsize=(13 - 6 * i, 4)).savefig(tmp_path / name / figure, dpi=50)
    report.write_result(
        tmp_path / "de-solver",
        "de-solver",
        {"seeds": 25, "horizons": [2_500, 15_000]},
        SOLVER,
        drawn["de-solver"],
        seconds=694.0,
        findings=["A line is as good & cheaper: T_eq > T."],
    )
    report.add_command(tmp_path / "de-solver", "koopt reproduce de-solver --seed 3")
    claims = [{"study": "finding", "finding": "it is so", "verdict": "holds"}]
    report.write_result(tmp_path / "new-one", "new-one", {}, ODD + claims, drawn["new-one"])
    return {name: tmp_path / name for name in ("de-solver", "new-one", "mnist")}


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed; the report is not opened in a browser")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


def visit(browser, path, **options):
    """The page, opened; and what it complained of or asked for."""
    context = browser.new_context(**options)
    context.set_default_timeout(20_000)
    tab = context.new_page()
    trouble, asked = [], []
    tab.on("pageerror", lambda error: trouble.append(str(error)))
    tab.on("console", lambda message: trouble.append(message.text))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(path.as_uri())
    tab.wait_for_load_state()
    return tab, trouble, [url for url in asked if not url.startswith("data:")]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_everything(folders, tmp_path, browser, width, scheme):
    path = page.write(folders, tmp_path / "report" / "index.html")
    tab, trouble, asked = visit(browser, path, viewport={"width": width, "height": 800}, color_scheme=scheme)
    assert trouble == []
    assert asked == [path.as_uri()]
    images = tab.locator("img")
    assert images.count() == 3
    sizes = images.evaluate_all("all => all.map(i => [i.naturalWidth, i.naturalHeight, i.width > 0, i.alt.length > 0])")
    assert sizes == [[650, 200, True, True], [350, 200, True, True], [650, 200, True, True]]
    assert tab.evaluate("document.documentElement.scrollWidth") == width  # wide things scroll in their own boxes
    boxes = tab.locator(".scroll").evaluate_all("all => all.map(e => e.getBoundingClientRect().right)")
    assert max(boxes) <= width
    assert tab.locator("pre button").count() == tab.locator("pre").count() == len(page.SECTIONS) + 1
    tab.context.close()


def test_the_summary_says_what_came_back(folders, tmp_path, browser):
    tab, _, _ = visit(browser, page.write(folders, tmp_path / "index.html"))
    lines = [line.inner_text().split("\t") for line in tab.locator(".summary tbody tr:not(.group)").all()]
    assert lines == [
        ["Adam, T = 2,500, success", "84 % (68 % to 96 %)", "92 % ✓ agrees", "100 % ▲ better", "100 % straight line"],
        ["Adam, T = 2,500, Teq/T", "0.85", "0.60 ✕ did not come back", "0.90 ✓ agrees", "0.97 straight line"],
        ["Adam, T = 2,500, speed-up", "98x", "37x ✕ did not come back", "3,567x ▲ better", ""],
        ["Adam, T = 2,500, error / motion", "0.0044", "0.003 ▲ better", "", "0.05 regression line"],
    ]
    assert tab.locator(".tiles b").all_inner_texts() == ["1", "1", "2"]
    assert tab.locator(".summary tr.group").all_inner_texts() == [
        "Differential-equation solver",
        "Handwritten digits: not run",
        "Perceptron: not run",
        "Complexity: not run",
        "How far ahead: not run",
        "New one: claims: 1 hold",
    ]
    tab.context.close()


def test_a_section_shows_rows_settings_time_and_command(folders, tmp_path, browser):
    tab, _, _ = visit(browser, page.write(folders, tmp_path / "index.html"), java_script_enabled=False)
    solver = tab.locator("#de-solver")
    groups = solver.locator("tr.group").all_inner_texts()
    assert groups == ["Adam, T = 2,500", "Adam, T = 15,000", "Adam, T = 2,500"]
    assert solver.locator("tr.recommended").count() == 2
    assert solver.locator("tbody tr").nth(1).inner_text().split("\t")[-1] == "37x ✕\npaper 98x"
    text = solver.inner_text()
    assert "koopt reproduce de-solver --seed 3" in text
    assert "11 min 34 s" in text
    assert "A line is as good & cheaper" in text
    solver.locator("summary").click()
    assert solver.locator("dd").all_inner_texts() == ["25", "2,500, 15,000"]
    odd = tab.locator("#new-one")
    assert odd.locator("thead").inner_text().strip().split("\t") == ["depth", "note", "seconds", "flag"]
    assert odd.locator("tbody td").all_inner_texts() == ["3", ODD[0]["note"], "1.5·10⁻⁷", "yes"]  # as text, not run
    tab.context.close()


class Balance(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.ids = [], []

    def handle_starttag(self, tag, attributes):
        self.ids += [value for key, value in attributes if key == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_every_tag_is_closed_and_every_link_leads_somewhere(folders, tmp_path):
    text = page.write(folders, tmp_path / "index.html").read_text()
    found = Balance()
    found.feed(text)
    assert found.open == []
    assert len(set(found.ids)) == len(found.ids)
    targets = [part.partition('"')[0] for part in text.split('href="#')[1:]]
    assert targets
    assert set(targets) <= set(found.ids)
    assert "http://" not in text
    assert "https://" not in text


def test_nothing_has_run(tmp_path):
    text = page.write({}, tmp_path / "index.html").read_text()
    assert text.count("Not run yet") == len(page.SECTIONS) == 5
    assert "koopt reproduce mnist" in text


def test_a_figure_that_is_gone_is_said_to_be_missing(folders, tmp_path):
    (folders["de-solver"] / "error-ahead.png").unlink()
    text = page.write(folders, tmp_path / "index.html").read_text()
    assert text.count("file is missing") == 1
    assert text.count("<img") == 2


def test_a_quick_run_is_marked(folders, tmp_path):
    path = folders["de-solver"] / "result.json"
    assert "A quick run" not in page.write(folders, tmp_path / "index.html").read_text()
    path.write_text(path.read_text().replace("--seed 3", "--quick"))
    assert page.write(folders, tmp_path / "index.html").read_text().count("A quick run") == 1


@pytest.mark.parametrize(
    "change",
    [
        "{",
        "[]",
        '{"rows": []}',
        {"rows": [1]},
        {"rows": {}},
        {"settings": None},
        {"figures": ["../../etc/figure.png"]},
        {"figures": [3]},
        {"findings": "one"},
        {"findings": [{}]},
        {"seconds": "long"},
        {"seconds": -1},
        {"command": 7},
        {"seconds": float("nan")},
    ],
)
def test_damage_is_an_error_that_names_the_file(folders, tmp_path, change):
    path = folders["de-solver"] / "result.json"
    whole = json.loads(path.read_text())
    path.write_text(change if isinstance(change, str) else json.dumps(whole | change))
    output = tmp_path / "index.html"
    output.write_text("before")
    with pytest.raises(ValueError, match=r"de-solver.result\.json is damaged.*run the experiment again"):
        page.write(folders, output)
    assert output.read_text() == "before"


def test_a_damaged_figure_is_an_error_that_names_it(folders, tmp_path):
    (folders["de-solver"] / "error-ahead.png").write_bytes(b"GIF89a" + bytes(40))
    with pytest.raises(ValueError, match=r"error-ahead\.png is damaged"):
        page.write(folders, tmp_path / "index.html")


@pytest.mark.parametrize(
    ("key", "ours", "limits", "censored", "expected"),
    [
        ("success", 0.68, (0.84, 0.68, 0.96), False, "agrees"),
        ("success", 0.97, (0.84, 0.68, 0.96), False, "better"),
        ("success", 0.64, (0.84, 0.68, 0.96), False, "did not come back"),
        ("success", 1.0, (1.0, 1.0, 1.0), False, "agrees"),
        ("error_over_motion", 1e-9, (0.0044, 0.004, 0.005), False, "better"),
        ("error_over_motion", 0.1, (0.0044, 0.004, 0.005), False, "did not come back"),
        ("teq_over_T", 2.5, (4.0, 3.6, 4.4), True, "open"),
        ("teq_over_T", 2.5, (4.0, 3.6, 4.4), False, "did not come back"),
        ("teq_over_T", 2.5, (2.0, 1.8, 2.2), True, "better"),
        ("speedup", None, (98.0, 88.2, 107.8), False, "open"),
    ],
)
def test_verdict(key, ours, limits, censored, expected):
    assert verdicts.verdict(key, ours, *limits, censored) == expected


@pytest.mark.parametrize(("ours", "expected"), [(8.9, "did not come back"), (9.1, "agrees"), (11.1, "better")])
def test_without_a_range_ten_per_cent_agree(ours, expected):
    (claim,) = verdicts.claims([{"setting": "paper", "speedup": ours, "paper_speedup": 10.0}])
    assert claim.verdict == expected
    assert claim.best == claim.best_verdict == ""


def test_a_median_that_is_censored_is_a_lower_bound():
    row = {"teq_over_T": 2.5, "paper_teq_over_T": 4.0, "censored": 0.6}
    (claim,) = verdicts.claims([row])
    assert (claim.ours, claim.verdict) == ("≥ 2.50", "open")
    (claim,) = verdicts.claims([row | {"censored": 0.4}])
    assert (claim.ours, claim.verdict) == ("2.50", "did not come back")
