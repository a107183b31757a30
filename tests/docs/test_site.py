"""The documentation's site builds strictly, and needs nothing from the net."""

import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATIENCE = 1200  # seconds after which something is taken to hang


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; strict, so that a broken link or an unknown name in the API fails."""
    for library in ("mkdocs", "material", "mkdocstrings"):
        if find_spec(library) is None:
            pytest.skip(f"{library} is not installed; pip install 'smallfry[docs]' has it")
    folder = tmp_path_factory.mktemp("site")
    call = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    call += ["--config-file", str(ROOT / "mkdocs.yml"), "--site-dir", str(folder)]
    done = subprocess.run(call, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_built(site):
    for page in (ROOT / "docs").rglob("*.md"):
        assert (site / page.relative_to(ROOT / "docs").with_suffix(".html")).is_file(), page


def test_links_of_the_readme_lead_somewhere(site):
    links = re.findall(r"\]\((?!https?:)([^)#]+)(?:#([^)]+))?\)", (ROOT / "README.md").read_text())
    assert len(links) > 10
    for path, heading in links:
        assert (ROOT / path).exists(), path
        if heading:
            page = site / Path(path).relative_to("docs").with_suffix(".html")
            assert f'id="{heading}"' in page.read_text(), f"{path}#{heading}"


def test_no_page_loads_anything_from_elsewhere(site):
    loaded = re.compile(
        r'<(?:script|img|iframe)[^>]*\ssrc="?(https?:)?//|<link[^>]*href="?(?:https?:)?//'
    )
    for page in site.rglob("*.html"):
        found = loaded.search(page.read_text())
        assert found is None, f"{page}: {found and found[0]}"


@pytest.mark.slow
def test_pages_that_are_opened_as_files_can_be_searched(site):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    browsers = map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))
    found = next(filter(None, browsers), None)
    if found is None:
        pytest.skip("no Chromium is installed")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=flags)
        page = browser.new_page()
        page.set_default_timeout(1000 * PATIENCE)
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto((site / "api" / "models.html").as_uri())
        page.click("input[name=query]")
        page.keyboard.type("Kronecker")
        page.wait_for_selector(".md-search-result__link", state="attached")
        links = page.locator(".md-search-result__link").evaluate_all("all => all.map(a => a.href)")
        browser.close()
    assert any("natural_gradient.html" in link for link in links)
    assert all(url.startswith(("file:", "about:", "data:")) for url in asked)


def test_the_api_shows_docstrings_with_their_arguments(site):
    page = (site / "api" / "optim.html").read_text()
    assert 'id="smallfry.optim.KFAC"' in page
    assert "Eigenpairs kept of each factor" in page
    assert "damping_split" in page


def test_the_api_shows_what_stands_behind_fields(site):
    page = (site / "api" / "models.html").read_text()
    assert "their sigmoid is the probability that the answer is right." in page
    assert "The latent memory, (batch, latents, dim)." in page


def test_scripts_of_pictures_are_not_published(site):
    assert list(site.rglob("pictures/*.png"))
    assert not list(site.rglob("*.py"))
