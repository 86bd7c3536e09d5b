import re
from pathlib import Path

from vllm_earlyexit.engine.setup import REFUSED

ROOT = Path(__file__).parents[2]


def rows() -> list[list[str]]:
    lines = (ROOT / "docs" / "compatibility.md").read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][2:]


def test_the_compatibility_table_names_every_refusal_in_its_words():
    said = {cell.removeprefix("refused: ") for _, cell, _ in rows() if cell.startswith("refused: ")}
    assert said == set(REFUSED)


def test_what_the_compatibility_table_promises_is_tested():
    tests = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    for feature, promise, shown in rows():
        named = re.findall(r"`(test_\w+\.py)`", shown)
        assert set(named) <= tests, feature
        assert named or promise == "untested" or promise.startswith("off;"), feature


def test_what_the_threat_model_names_as_tests_are_tests():
    written = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", (ROOT / "docs" / "security.md").read_text())
    assert len(named) > 8
    assert all(f"def {name}(" in written for name in named)


def documents() -> list[Path]:
    folders = [ROOT / name for name in ("benchmarks", "docs", "patches", "vllm_earlyexit")]
    return [ROOT / "README.md", *(path for folder in folders for path in folder.rglob("*.md"))]


def anchors(text: str) -> set[str]:
    """Return what GitHub calls a document's headings."""
    headings = re.findall(r"(?m)^#+ (.*)$", text)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_relative_link_leads_to_a_file_and_a_heading_in_it():
    assert len(documents()) > 10
    for document in documents():
        for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
            if re.match(r"[a-z]+:", target):
                continue
            name, _, anchor = target.partition("#")
            path = document.parent / name if name else document
            assert path.exists(), f"{document.relative_to(ROOT)} links to {target}"
            assert not anchor or anchor in anchors(path.read_text()), f"{document.relative_to(ROOT)} links to {target}"
