import subprocess
from importlib import metadata

import pytest
import torch

from smallfry import __version__
from smallfry.training import provenance


def test_a_checkout_that_is_not_installed_knows_its_version(monkeypatch):
    def installed(name):
        if name == "smallfry":
            raise metadata.PackageNotFoundError(name)
        return metadata.version(name)

    monkeypatch.setattr(provenance, "version", installed)
    found = provenance.provenance(torch.device("cpu"))
    assert found["versions"]["smallfry"] == __version__
    assert found["versions"]["torch"] == metadata.version("torch")


def test_the_commit_is_that_of_the_process_and_costs_no_further_one(monkeypatch):
    first = provenance.provenance(torch.device("cpu"))["commit"]
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("git was started again"))
    assert provenance.provenance(torch.device("cpu"))["commit"] == first
