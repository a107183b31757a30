"""The page in a real Chromium: what a person with a mouse, a keyboard or a phone meets."""

import base64
import re
import shutil
import sys
import threading
from urllib.parse import urlsplit

import numpy as np
import pytest
from demo_runs import TINY, untrained
from PIL import Image

pytest.importorskip("gradio", reason="the demo's extra is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from smallfry.cli import main  # noqa: E402
from smallfry.demo.serve import serving  # noqa: E402

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine"),
]

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 600_000  # milliseconds after which a test takes something to hang
INPUT = "#sf-image input[type=file]"
NASTY = ("<img src=x onerror=alert(1)>", "${alert(1)} {{value}} {{#each x}}", "b & c")
DROP = """([name, data]) => {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const held = new DataTransfer();
  held.items.add(new File([bytes], name, { type: "image/png" }));
  return held;
}"""
PASTED = """(clipboardData) =>
  document.dispatchEvent(new ClipboardEvent("paste", { clipboardData, bubbles: true }))"""

WATCH = """() => {
  window.seen = [];
  const view = document.querySelector("#sf-view-0");
  new MutationObserver(() => {
    const place = view.querySelector(".sf-now")?.innerText;
    if (place && place !== seen.at(-1)) seen.push(place);
  }).observe(view, { childList: true, characterData: true, subtree: true });
}"""


# The kind of control that has the focus, and how wide its outline is, or that of what is around it.
FOCUS = """() => {
  const focused = document.activeElement;
  const widths = [focused, focused.parentElement].filter((e) => e).map((element) => {
    const { outlineStyle, outlineWidth } = getComputedStyle(element);
    return outlineStyle === "none" ? 0 : parseFloat(outlineWidth);
  });
  return [focused.type && focused.tagName === "INPUT" ? focused.type : focused.tagName,
    Math.max(...widths)];
}"""
FETCHED = """(address) => Promise.all([
  [""], ["look", "text/plain"], ["look", "application/octet-stream"],
  ["look", "application/octet-stream", "no-cors"],
].map(([path, type, mode = "cors"]) => fetch(address + path, type
  ? { method: "POST", body: "x", mode, headers: { "content-type": type } } : {})
  .then((response) => response.text()).catch(() => null)))"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run on digits, with four recursion steps, and a model of colour images beside it."""
    folder = tmp_path_factory.mktemp("demo")
    options = ", ".join(f"{name}: {value}" for name, value in (TINY | {"patch_size": 2}).items())
    fast = ["--epochs=1", "--data.limit=200", "--references=false", "--progress=quiet"]
    steps = ["--model.recursion_steps=4", "--objective.supervision_steps=4"]
    run = folder / "run <b>"
    assert main(["train", f"--model.options={{{options}}}", *fast, *steps, "--run", str(run)]) == 0
    other = untrained(
        folder / "other", "vitrm_tiny_patch4_32", NASTY, 32, 3, **TINY | {"recursion_steps": 3}
    )
    return run, other


CALLS = []  # addresses that this process connects to or looks up, for as long as it is watched


def listen(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        CALLS.append(arguments[1][0])
    if event == "socket.getaddrinfo":
        CALLS.append(arguments[0])


@pytest.fixture(scope="module")
def address(runs):
    sys.addaudithook(listen)
    with serving([str(run) for run in runs]) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, address):
    """Open the page in a window; at the end, look at all that it asked for and complained of."""
    contexts, asked, complaints = [], [], []

    def open_page(width=1280, height=900, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
        page.on(
            "console",
            lambda said: complaints.append(said.text) if said.type == "error" else None,
        )
        page.goto(address)
        page.wait_for_selector(INPUT, state="attached")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    foreign = [u for u in asked if not u.startswith((address, "data:", "blob:"))]
    assert foreign == []
    assert len(asked) > 5


@pytest.fixture
def digit(tmp_path):
    file = tmp_path / "a digit.png"
    pixels = np.random.default_rng(3).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return file


def numbers(page, panel=0):
    return page.locator(f"#sf-view-{panel} .sf-number").all_inner_texts()


def place(page, panel=0):
    return page.locator(f"#sf-view-{panel} .sf-now").inner_text()


def wait_for_place(page, text, panel=0):
    page.locator(f"#sf-view-{panel} .sf-now", has_text=text).wait_for()


def transfer(page, file):
    data = base64.b64encode(file.read_bytes()).decode()
    return page.evaluate_handle(DROP, [file.name, data])


def test_the_slider_moves_through_the_models_thinking_by_keyboard(opened, digit):
    page = opened()
    page.set_input_files(INPUT, digit)
    wait_for_place(page, "Recursion step 4, latent step 2 of 2: the model’s answer")
    answer = numbers(page)
    assert len(answer) == 6  # five classes and halting
    assert all(0 <= float(number.rstrip("%")) <= 100 for number in answer)
    slider = page.get_by_role("slider").first
    slider.focus()
    page.keyboard.press("ArrowLeft")
    wait_for_place(page, "Recursion step 4, latent step 1 of 2")
    page.keyboard.press("Home")
    wait_for_place(page, "Before the first look at the image")
    assert numbers(page) != answer
    assert page.locator("#sf-view-0").get_by_text("Nothing has been looked at yet").is_visible()
    page.keyboard.press("ArrowRight")
    wait_for_place(page, "Recursion step 1, latent step 1 of 2")
    assert page.get_by_role("img", name="Attention, strongest in row").first.is_visible()
    page.keyboard.press("End")
    wait_for_place(page, "Recursion step 4, latent step 2 of 2")
    assert numbers(page) == answer
    assert " ms" in page.locator("#sf-view-0").inner_text()


def test_an_image_can_be_dropped(opened, digit):
    page = opened()
    button = page.get_by_role("button", name="drop, pick or paste")
    button.dispatch_event("drop", {"dataTransfer": transfer(page, digit)})
    wait_for_place(page, "the model’s answer")
    assert page.get_by_role("status").filter(has_text="a digit.png").is_visible()


def test_an_image_can_be_pasted_and_another_one_after_it(opened, digit):
    page = opened()
    for name in ("first.png", "second.png"):
        page.evaluate(PASTED, transfer(page, digit.rename(digit.with_name(name))))
        page.get_by_role("status").filter(has_text=name).wait_for()
        digit = digit.with_name(name)
    assert len(numbers(page)) == 6


def test_an_example_of_the_runs_own_data_is_a_button_away(opened):
    page = opened()
    examples = page.locator("#sf-examples").get_by_role("button")
    assert examples.count() == 8
    examples.nth(2).focus()
    page.keyboard.press("Enter")
    wait_for_place(page, "the model’s answer")


def test_the_page_plays_the_thinking(opened, digit):
    page = opened()
    page.set_input_files(INPUT, digit)
    wait_for_place(page, "the model’s answer")
    page.evaluate(WATCH)
    page.get_by_role("button", name="Watch it think").click()
    page.wait_for_function("seen.length > 3 && seen.at(-1).includes('the model’s answer')")
    seen = page.evaluate("seen")
    on_the_way = [re.findall(r"\d+", place) for place in seen if "answer" not in place]
    assert len(on_the_way) >= 3
    assert on_the_way == sorted(on_the_way)  # [] is before the first look


def test_two_models_stand_side_by_side_and_each_has_its_slider(opened, digit):
    page = opened()
    page.set_input_files(INPUT, digit)
    for panel in (0, 1):
        wait_for_place(page, "the model’s answer", panel)
    left, right = (page.locator(f"#sf-panel-{panel}").bounding_box() for panel in (0, 1))
    assert left["x"] + left["width"] <= right["x"]
    assert abs(left["y"] - right["y"]) < 2
    before = numbers(page, 0)
    page.get_by_role("slider", name="vitrm_tiny_patch4_32").focus()
    page.keyboard.press("ArrowLeft")
    wait_for_place(page, "Recursion step 3, latent step 1", 1)
    assert numbers(page, 0) == before


def test_names_of_classes_and_runs_are_text(opened, digit):
    page = opened()
    page.set_input_files(INPUT, digit)
    wait_for_place(page, "the model’s answer", 1)
    rows = page.locator("#sf-view-1 th").all_inner_texts()
    assert sorted(rows[:-1]) == sorted(NASTY)
    assert page.locator("#sf-view-1 th img").count() == 0
    assert "run <b>" in page.locator("#sf-panel-0").inner_text()


def test_a_phone_shows_it_all_without_scrolling_sideways(opened, digit):
    page = opened(390, 844, has_touch=True, is_mobile=True)
    page.set_input_files(INPUT, digit)
    for panel in (0, 1):
        wait_for_place(page, "the model’s answer", panel)
    page.get_by_role("button", name="What is shown here").click()
    page.get_by_text("no proof of what caused").wait_for()
    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    assert page.evaluate("innerWidth") == 390
    upper, lower = (page.locator(f"#sf-panel-{panel}").bounding_box() for panel in (0, 1))
    assert upper["y"] + upper["height"] <= lower["y"]


def test_what_is_no_image_gives_a_message_and_the_next_image_an_answer(opened, digit, tmp_path):
    wrong = {
        "broken.png": "the image is damaged",
        "text.png": "not an image",
        "empty.png": "not an image",
        "huge.png": "100,000,000 pixels are too many",
    }
    (tmp_path / "broken.png").write_bytes(digit.read_bytes()[:60])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").touch()
    Image.new("1", (10_000, 10_000)).save(tmp_path / "huge.png")
    page = opened()
    for name, message in wrong.items():
        page.set_input_files(INPUT, digit)
        wait_for_place(page, "the model’s answer")
        assert page.get_by_role("alert").count() == 0
        page.set_input_files(INPUT, tmp_path / name)
        page.get_by_role("alert").filter(has_text=f"{name}: {message}").wait_for()
        assert numbers(page) == []  # nothing of the image before it
        assert "Traceback" not in page.locator("body").inner_text()


def test_an_image_of_another_mode_and_size_is_brought_to_the_models(opened, tmp_path):
    file = tmp_path / "wide.webp"
    pixels = np.random.default_rng(0).integers(0, 256, (70, 200, 4), dtype=np.uint8)
    Image.fromarray(pixels, "RGBA").save(file)
    page = opened()
    page.set_input_files(INPUT, file)
    wait_for_place(page, "the model’s answer", 1)
    assert "32 × 32 pixels" in page.locator("#sf-view-1 figcaption").first.inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(opened, digit, scheme):
    page = opened(color_scheme=scheme)
    page.set_input_files(INPUT, digit)
    wait_for_place(page, "the model’s answer")

    def brightness(selector, what):
        colour = page.locator(selector).first.evaluate(f"e => getComputedStyle(e).{what}")
        red, green, blue = (float(part) for part in colour.split("(")[1].rstrip(")").split(",")[:3])
        parts = [
            c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4
            for c in (red, green, blue)
        ]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    ground = brightness("body", "backgroundColor")
    assert (ground > 0.5) == (scheme == "light")
    for selector in (".sf-now", ".sf-number", ".sf-quiet", ".sf figcaption", ".sf caption"):
        bright, dark = sorted((brightness(selector, "color"), ground), reverse=True)
        assert (bright + 0.05) / (dark + 0.05) > 4.5, selector  # WCAG's AA


def test_every_control_has_a_name(opened, digit):
    page = opened()
    page.set_input_files(INPUT, digit)
    wait_for_place(page, "the model’s answer")
    snapshot = page.locator("body").aria_snapshot()
    controls = [line.strip(" -") for line in snapshot.splitlines()]
    kinds = ("button", "slider", "spinbutton", "checkbox", "textbox")
    controls = [line for line in controls if line.startswith(kinds)]
    assert len(controls) > 8
    assert [line for line in controls if '"' not in line] == []


def test_neither_page_nor_server_asks_anyone_outside(opened, address):
    page = opened()  # which checks the page's own requests at the end
    page.locator("#sf-examples").get_by_role("button").first.click()
    wait_for_place(page, "the model’s answer")
    said = page.request.get(address).headers["content-security-policy"]
    assert "default-src 'self'" in said
    assert "http" not in said
    assert {str(host) for host in CALLS} <= {"127.0.0.1", "localhost", "::1"}
    assert urlsplit(address).hostname == "127.0.0.1"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_focus_of_the_keyboard_is_seen_on_every_control(opened, digit, scheme):
    page = opened(color_scheme=scheme)
    page.set_input_files(INPUT, digit)
    wait_for_place(page, "the model’s answer", 1)
    page.get_by_text("Or one of these").click()  # where the keyboard begins
    shown = {}
    for _ in range(30):
        page.keyboard.press("Tab")
        name, width = page.evaluate(FOCUS)
        shown.setdefault(name, width)
    assert {"BUTTON", "range", "number", "file"} <= set(shown)
    assert {name: width for name, width in shown.items() if width < 2 and name != "BODY"} == {}


def test_two_runs_of_one_architecture_have_headings_of_their_own(runs, browser):
    with serving([str(runs[1]), str(runs[1])]) as address:
        page = browser.new_page()
        page.set_default_timeout(PATIENCE)
        page.goto(address)
        page.locator("#sf-panel-1 h2").wait_for()
        first, second = (page.locator(f"#sf-panel-{panel} h2").inner_text() for panel in (0, 1))
        assert first != second
        page.get_by_role("slider", name=second).wait_for(state="attached")
        page.close()


def test_a_newer_image_takes_the_place_of_the_one_before(opened, digit, tmp_path):
    page = opened()
    first, second = tmp_path / "first.png", tmp_path / "second.png"
    for file in (first, second):
        file.write_bytes(digit.read_bytes())
    for _ in range(3):
        page.set_input_files(INPUT, first)
        page.set_input_files(INPUT, second)
        page.get_by_role("status").filter(has_text="second.png").wait_for()
        assert page.get_by_role("alert").count() == 0
        page.locator("#sf-examples").get_by_role("button").first.click()
        page.get_by_role("status").filter(has_text="no. ").wait_for()


def test_a_file_that_is_too_long_is_not_sent(opened, tmp_path, digit):
    (tmp_path / "long.png").write_bytes(digit.read_bytes() + bytes(20 * 2**20))
    page = opened()
    sent = []
    page.on("request", lambda request: sent.append(request.url))
    page.set_input_files(INPUT, tmp_path / "long.png")
    page.get_by_role("alert").filter(has_text="long.png: larger than 20 MiB").wait_for()
    assert sent == []


def test_a_server_that_is_gone_is_a_message(runs, browser, digit):
    with serving([str(runs[1])]) as address:
        page = browser.new_page()
        page.set_default_timeout(PATIENCE)
        page.goto(address)
        page.wait_for_selector(INPUT, state="attached")
    page.set_input_files(INPUT, digit)
    page.get_by_role("alert").filter(has_text="the server does not answer").wait_for()
    page.close()


def test_another_site_can_not_even_send_an_image(address, browser, monkeypatch):
    answered = []
    monkeypatch.setattr("smallfry.demo.routes.answer", lambda *given: answered.append(given))
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto("data:text/html,<p>a page of another site")
    said = page.evaluate(FETCHED, address)
    assert len(said) == 4
    assert not any(said)  # nothing that could be read
    assert answered == []
    page.close()


def test_an_open_page_does_not_keep_the_server(runs, browser, digit):
    def servers():
        return {t for t in threading.enumerate() if t.name == "smallfry-demo" and t.is_alive()}

    before = servers()
    with serving([str(runs[1])]) as address:
        page = browser.new_page()
        page.set_default_timeout(PATIENCE)
        page.goto(address)
        page.set_input_files(INPUT, digit)
        wait_for_place(page, "the model’s answer")
    assert servers() == before
    page.close()
