"""Every code block of the documentation is run, parsed, or excluded with a reason."""

import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
from markdown_blocks import ROOT, UntestedBlockError, blocks_of, check, commands, work_through

FIRST = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES = [*FIRST, *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [block for page in PAGES for block in blocks_of(page)]
LONG = ROOT / "docs/tutorial/photos_to_device.md"  # its blocks take as long as a sixth of all


class Reader:
    """Someone who works through a page from its beginning, in a folder of their own."""

    def __init__(self, page, folder):
        self.blocks, self.folder = blocks_of(page), folder
        self.module, self.read, self.failed = ModuleType("__page__"), 0, None
        self.namespace = vars(self.module)

    def reach(self, block, monkeypatch):
        """Work through the page up to and with that block, as far as that has not been done."""
        while self.read <= self.blocks.index(block):
            assert self.failed is None, f"needs an earlier block, which fails: {self.failed}"
            here = self.blocks[self.read]
            runs = here.language in ("python", "yaml") or here.wish == "run"
            monkeypatch.chdir(self.folder if runs else ROOT)  # commands name files of the project
            monkeypatch.setitem(sys.modules, "__page__", self.module)
            before = os.environ["SMALLFRY_CACHE"]
            try:
                work_through(here, self.namespace)
                assert os.environ["SMALLFRY_CACHE"] == before  # or later tests would have it
            except BaseException:
                self.failed = here.name
                raise
            self.read += 1


@pytest.fixture(scope="session")
def readers():
    return {}


def marked(block):
    return pytest.param(block, marks=pytest.mark.slow) if block.page == LONG else block


@pytest.mark.parametrize("block", [*map(marked, BLOCKS)], ids=lambda block: block.name)
def test_code_block(block, readers, tmp_path_factory, monkeypatch):
    if block.wish == "not run":
        pytest.skip(f"not run: {block.detail}")
    if block.page not in readers:
        readers[block.page] = Reader(block.page, tmp_path_factory.mktemp(block.page.stem))
    readers[block.page].reach(block, monkeypatch)


# The test itself


def blocks_in(folder: Path, text: str):
    (folder / "page.md").write_text(text)
    return blocks_of(folder / "page.md")


def test_blocks_are_found_with_their_line_and_comment(tmp_path):
    text = "a\n\n<!-- run -->\n```sh\nsmallfry models\n```\n\n"
    text += "- b\n\n    ```python\n    x = 1\n    ```\n"
    first, second = blocks_in(tmp_path, text)
    assert (first.line, first.language, first.wish) == (5, "sh", "run")
    assert (second.line, second.code, second.wish) == (11, "x = 1\n", "")


@pytest.mark.parametrize(
    "text",
    [
        "```rust\nfn main() {}\n```\n",
        "a\n\n    indented = True\n",
        "<!-- not run: -->\n```python\n1 / 0\n```\n",
        "<!-- not run -->\n```python\n1 / 0\n```\n",
        "<!-- runs with --epochs 1 -->\n```\nsmallfry train\n```\n",
        "<!-- run -->\n```python\n1 / 0\n```\n",
    ],
)
def test_a_block_that_is_neither_testable_nor_excluded_is_refused(text, tmp_path):
    with pytest.raises(UntestedBlockError, match=r"page\.md:\d"):
        blocks_in(tmp_path, text)


def test_a_comment_counts_for_the_next_block_only(tmp_path):
    reason, failing = "<!-- not run: it takes an hour -->", "```python\n1 / 0\n```\n"
    text = f"{reason}\n{failing}\n{failing}\n{reason}\n\nText.\n\n{failing}"
    blocks = blocks_in(tmp_path, text)
    assert [block.wish for block in blocks] == ["not run", "", ""]
    work_through(blocks[0], {})
    with pytest.raises(ZeroDivisionError):
        work_through(blocks[1], {})


def test_a_later_block_says_which_earlier_one_it_lacks(tmp_path, monkeypatch):
    first, second = blocks_in(tmp_path, "```python\n1 / 0\n```\n\n```python\nx = 1\n```\n")
    reader = Reader(first.page, tmp_path)
    with pytest.raises(ZeroDivisionError):
        reader.reach(first, monkeypatch)
    with pytest.raises(AssertionError, match=r"page\.md:2"):
        reader.reach(second, monkeypatch)


def test_a_later_block_alone_works_through_those_before_it_once(tmp_path, monkeypatch):
    text = "```python\nx = 1\n```\n\n```python\nx += 1\n```\n\n```python\nassert x == 2\n```\n"
    first, second, third = blocks_in(tmp_path, text)
    reader = Reader(first.page, tmp_path)
    for block in (second, first, third):
        reader.reach(block, monkeypatch)
    assert reader.namespace["x"] == 2


def test_given_code_runs_first_and_is_not_part_of_the_page(tmp_path):
    (block,) = blocks_in(tmp_path, "<!-- given\nx = 2\n-->\n```python\ny = x + 1\n```\n")
    assert block.code == "y = x + 1\n"
    namespace = {}
    work_through(block, namespace)
    assert namespace["y"] == 3


def test_commands_lose_comments_prompts_and_line_breaks():
    code = "$ smallfry train \\\n  --epochs 3  # three\n\n# nothing\nmake test\n"
    assert commands(code) == [["smallfry", "train", "--epochs", "3"], ["make", "test"]]


@pytest.mark.parametrize(
    "line",
    ["smallfry trian", "smallfry train --epoch 3", "make coffee", "python nowhere.py", "rm -rf ."],
)
def test_a_command_that_would_fail_is_found(line):
    (command,) = commands(line)
    with pytest.raises(Exception, match=r"trian|epoch|coffee|nowhere|rm"):
        check(command)


def test_a_command_that_is_to_be_run_must_succeed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "<!-- run with --top_k 2 -->\n```\nsmallfry predict none x.png\n```\n"
    (block,) = blocks_in(tmp_path, text)
    with pytest.raises(AssertionError, match="predict none"):
        work_through(block, {})
