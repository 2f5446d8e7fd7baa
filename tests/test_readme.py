"""What the README shows is what the code does."""

import re
import runpy
from pathlib import Path

from geminifx.passes.pipeline import PIPELINE

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_pass_table_is_the_pipeline():
    table = README.split("| pass | does |")[1].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == [p.name for p in PIPELINE]


def test_the_tour_is_a_real_program():
    shown = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "yield" in block)
    compiled = runpy.run_path(str(ROOT / "examples" / "tour.py"))["compile_tour"]()
    assert shown in compiled.graph["training"]


def test_links_lead_to_files_that_exist():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
        assert not [link for link in links if not (page.parent / link).exists()], page.name


def test_every_page_is_told_of():
    pages = (ROOT / "docs").glob("*.md")
    texts = README + "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md"))
    assert not [page.name for page in pages if not re.search(rf"\]\((docs/)?{re.escape(page.name)}", texts)]


def test_every_make_target_the_readme_names_exists():
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE))
    assert {"train", "test"} <= named <= targets
