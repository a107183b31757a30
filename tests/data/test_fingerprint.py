import errno
import os
from pathlib import Path

import pytest

from smallfry.data.fingerprint import digest, stamp
from smallfry.errors import AccessError


def test_a_digest_is_of_the_texts_in_their_order():
    assert digest("a", "b") == "7e18f737311b2dc3b2f269dd78396b03"
    assert len({digest("a", "b"), digest("b", "a"), digest("ab"), digest()}) == 4
    assert digest(os.fsdecode(b"\xff")) != digest("?")


def test_a_stamp_changes_with_the_content_of_a_file(tmp_path):
    file = tmp_path / "x"
    file.write_bytes(b"one")
    first = stamp(file)
    assert stamp(file) == first
    file.write_bytes(b"three")
    assert stamp(file) != first
    link = tmp_path / "link"
    link.symlink_to(file)
    assert stamp(link) == stamp(file)


def test_a_file_that_is_missing_has_a_stamp_and_one_that_is_out_of_reach_has_not(
    tmp_path, monkeypatch
):
    assert stamp(tmp_path / "none").endswith("missing")

    def stale(self):
        raise OSError(errno.ESTALE, "stale")

    monkeypatch.setattr(Path, "stat", stale)
    with pytest.raises(AccessError, match="try again"):
        stamp(tmp_path / "none")
