"""The pages: links lead somewhere, tables say what the code says, snippets run as they stand."""

import ast
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch

import koopt

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def blocks_of(page):
    """Python, also where it is indented in a list."""
    found = re.findall(r"^( *)```python\n(.*?)^ *```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


def prose_of(page):
    """Without code, in which brackets are no links and # is no heading."""
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors_of(page):
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", prose_of(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for link in LINK.findall(prose_of(page)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors_of(target), f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_table_has_a_head_and_rows_of_one_width(page):
    for table in re.findall(r"(?:^ *\|.*\n)+", prose_of(page), flags=re.MULTILINE):
        rows = table.splitlines()
        widths = [len(re.findall(r"(?<!\\)\|", row)) for row in rows]
        assert re.fullmatch(r" *\|(?: *:?-+:? *\|)+", rows[1]), f"{page.name}: {rows[0]}"
        assert not re.fullmatch(r" *\|(?: *:?-+:? *\|)+", rows[0]), f"{page.name}: {rows[1]}"
        assert len(set(widths)) == 1, f"{page.name}: {rows[0]}: {widths}"


def test_the_readme_lists_every_page_and_example():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    index = text[text.index("## Documentation") :]
    assert [page.name for page in PAGES[2:] if f"(docs/{page.name})" not in index] == []
    assert [path.name for path in (ROOT / "examples").glob("*.py") if f"`{path.name}`" not in index] == []


def test_the_options_of_attach_and_their_defaults():
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", (ROOT / "docs" / "live.md").read_text(encoding="utf-8"), re.M)
    parameters = list(inspect.signature(koopt.attach).parameters.values())[2:]
    assert {name: ast.literal_eval(default) for name, default in rows} == {p.name: p.default for p in parameters}


def test_the_index_has_every_public_name_where_it_is_and_only_methods_that_are_there():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[`koopt\.(\w+)`\]\(\.\./(\S+)\) \|.*\| (.*)\|$", text, flags=re.MULTILINE)
    assert sorted(name for name, _, _ in rows) == sorted(koopt.__all__)
    for name, path, listed in rows:
        value = getattr(koopt, name)
        assert Path(sys.modules[value.__module__].__file__) == ROOT / path
        methods, _, attributes = listed.partition(";")
        public = {key for key in vars(value) if not key.startswith("_")} if inspect.isclass(value) else set()
        called = {key for key in public if inspect.isfunction(inspect.unwrap(getattr(value, key)))}
        assert not called or called <= set(re.findall(r"\w+", listed))
        assert all(name in called or name in public for name in re.findall(r"\w+", methods))
        assert all(name in public or name in inspect.getdoc(value) for name in re.findall(r"\w+", attributes))


@pytest.mark.parametrize("folder", ["live", "bench"])
def test_contributing_names_every_room(folder):
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rooms = {path.stem for path in (ROOT / "src" / "koopt" / folder).glob("*.py")} - {"__init__"}
    assert {room for room in rooms if f"`{room}`" not in text and f"`{room}.py`" not in text} == set()


def test_the_citation_is_of_this_version():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {koopt.__version__}\n" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_snippet_is_python(page):
    for block in blocks_of(page):
        ast.parse(block)


def test_the_page_on_live_runs_runs(tmp_path):
    """Its snippets in turn, on a network with BatchNorm, but for the one that needs TensorBoard."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.BatchNorm1d(8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    x = torch.randn(32, 3)
    names = {"optimizer": torch.optim.SGD(model.parameters(), lr=0.01), "model": model, "torch": torch}
    names |= {"loader": [(x, x.sum(dim=1, keepdim=True))], "x_guard": x, "y_guard": x.sum(dim=1, keepdim=True)}
    names |= {"loss_fn": torch.nn.functional.mse_loss, "validate": lambda model: None, "path": tmp_path / "run.pt"}
    first, refreshing, saving, _ = blocks_of(ROOT / "docs" / "live.md")
    exec(first, names)
    koop = names["koop"]
    assert koop.steps == 1
    exec(saving, names)
    koop.load_state_dict(torch.load(names["path"], weights_only=True)["koop"])
    koop.detach()
    exec(refreshing.replace("...", "optimizer, model, lambda: loss_fn(model(x_guard), y_guard)"), names)


def test_the_readme_has_the_commands_that_run_the_main_job_and_pass_the_tests():
    named = set(re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), flags=re.MULTILINE))
    assert {"demo", "test"} <= named
    assert named <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
