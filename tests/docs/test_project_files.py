"""Files for contributors: their links, versions, and commands that need no network."""

import re

import pytest
import yaml
from markdown_blocks import ROOT

from smallfry.version import __version__

SECTIONS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"])
def test_links_lead_somewhere(page):
    for path in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text()):
        assert (ROOT / path).exists(), path


def test_paths_that_contributors_are_sent_to_are_there():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    prose = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    for path in re.findall(r"`([\w./-]+/[\w./-]*)`", prose):
        assert (ROOT / path).exists() or (ROOT / "src/smallfry" / path).exists(), path


def test_the_citation_has_the_version_and_the_fields_that_are_required():
    content = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert content["version"] == __version__
    assert {"cff-version", "message", "title", "authors"} <= set(content)
    assert content["license"] == "Apache-2.0"


def test_the_changelog_keeps_its_form():
    lines = (ROOT / "CHANGELOG.md").read_text().splitlines()
    versions = [line for line in lines if line.startswith("## ")]
    assert versions[0] == "## [Unreleased]"
    form = r"## \[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d"
    assert all(re.fullmatch(form, version) for version in versions[1:])
    assert {line[4:] for line in lines if line.startswith("### ")} <= SECTIONS


def test_hooks_are_the_tools_of_the_environment():
    content = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repository["repo"] for repository in content["repos"]] == ["local"]
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    for hook in content["repos"][0]["hooks"]:
        tool = hook["entry"].split()[0].removeprefix(".venv/bin/")
        assert f"$(BIN)/{tool}" in lint
        assert hook["language"] == "system"
