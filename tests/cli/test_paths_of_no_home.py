"""Paths that begin with the name of a user who has no home folder on this machine."""

import pytest

from smallfry.cli import main


@pytest.mark.parametrize("verb", ["evaluate", "export"])
def test_a_home_that_nobody_has_is_explained_and_no_error_inside(verb, capsys):
    code = main([verb, "~no-such-user/run"])
    said = capsys.readouterr().err
    assert code in (1, 2)
    assert "please report it" not in said
    assert "there is no such user here" in said or "~no-such-user/run" in said


def test_a_picture_whose_name_begins_with_a_tilde_is_looked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["predict", "no-export", "~a.png"]) in (1, 2)
    assert "please report it" not in capsys.readouterr().err
