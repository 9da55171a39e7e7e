"""The documentation keeps its word: commands exist, links lead somewhere, tables are complete."""

import re
from pathlib import Path

import pytest

from app.settings import Settings

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
MAKEFILE_TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def without_code(markdown: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", markdown, flags=re.DOTALL)


def code_of(markdown: str) -> str:
    return "\n".join(re.findall(r"```.*?```|`[^`\n]*`", markdown, flags=re.DOTALL))


def anchors_of(page: Path) -> set[str]:
    """The anchors GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", without_code(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_to_files_and_headings_that_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if target.startswith(("https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page_id(page)} links to {target}"
        if anchor:
            assert anchor in anchors_of(linked), f"{page_id(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_make_command_named_in_a_page_is_a_target(page):
    named = set(re.findall(r"\bmake ([a-z]+)", code_of(page.read_text())))
    assert named <= MAKEFILE_TARGETS


def test_readme_shows_both_commands_and_they_need_nothing_but_the_makefile():
    commands = set(re.findall(r"\bmake ([a-z]+)", code_of((ROOT / "README.md").read_text())))
    assert {"serve", "test", "demo"} <= commands


def test_ci_runs_the_test_command_of_the_readme():
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    assert script[-1].startswith("make test ")


def test_every_page_can_be_reached_from_the_index():
    reached: set[Path] = set()
    frontier = [ROOT / "docs" / "index.md"]
    while frontier:
        page = frontier.pop()
        if page in reached:
            continue
        reached.add(page)
        targets = re.findall(r"\]\(([^)#\s]+\.md)", without_code(page.read_text()))
        frontier += [(page.parent / target).resolve() for target in targets if not target.startswith("https://")]
    assert set(PAGES) <= reached


def test_every_setting_is_documented_with_its_default():
    page = (ROOT / "docs" / "reference" / "settings.md").read_text()
    table = [row for row in page.splitlines() if row.startswith("| `")]
    rows = {name: row for row in table for name in re.findall(r"`(WIDTHWISE_\w+)`", row.split("|")[1])}
    assert set(rows) == {f"WIDTHWISE_{name.upper()}" for name in Settings.model_fields}
    for name, field in Settings.model_fields.items():
        if field.default not in (None, ()):  # what has none says so in words
            default = str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
            assert f"`{default}`" in rows[f"WIDTHWISE_{name.upper()}"]


def test_decisions_are_numbered_without_gaps_and_listed():
    pages = sorted((ROOT / "docs" / "adr").glob("0*.md"))
    assert [int(page.name[:4]) for page in pages] == list(range(1, len(pages) + 1))
    listed = (ROOT / "docs" / "adr" / "README.md").read_text()
    for page in pages:
        title = page.read_text().splitlines()[0].removeprefix(f"# {page.name[:4]}: ")
        assert f"[{page.name[:4]}]({page.name}) | {title} |" in listed


def test_changelog_begins_with_what_is_unreleased():
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "[Unreleased]"
