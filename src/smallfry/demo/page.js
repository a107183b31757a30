"use strict";

// The page's own script: it sends an image, keeps the answer, and moves through its moments.
const smallfry = (() => {
  const FRAME_MS = 500; // of "Watch it think"
  const MOST_FRAMES = 40; // longer thoughts are shown in leaps
  const PICTURE = 'src="#picture"'; // stands in every view for the one picture of a panel

  let status = "";
  let panels = []; // of each model: the moment of its answer, its picture, its views by moment
  let latest = Promise.resolve();
  let sending = new AbortController();
  let playing;

  function alertOf(text) {
    const paragraph = document.createElement("p");
    paragraph.className = "sf-alert";
    paragraph.setAttribute("role", "alert");
    paragraph.textContent = text;
    return `<div class="sf">${paragraph.outerHTML}</div>`;
  }

  async function fetchAnswer(path, body, signal) {
    const headers = { "content-type": "application/octet-stream" };
    const response = await fetch(path, { method: "POST", headers, body, signal });
    if (!response.ok) throw new RangeError(await response.text());
    return response.json();
  }

  // Ask for an answer; a question that waits for its own is abandoned.
  function ask(name, answer) {
    sending.abort();
    clearInterval(playing);
    const { signal } = (sending = new AbortController());
    latest = answer(signal)
      .catch((error) => {
        const why = error instanceof RangeError ? error.message : "the server does not answer";
        return { status: alertOf(`${name}: ${why}`), panels: [] };
      })
      .then((answered) => {
        if (!signal.aborted) ({ status, panels } = answered);
      });
  }

  function view(panel, moment) {
    const { picture, views } = panels[panel] ?? { views: [] };
    const html = views[Math.min(moment, views.length - 1)] ?? "";
    return html.replaceAll(PICTURE, () => `src="${picture}"`);
  }

  // New values of the status, of every slider and of every view, once there is an answer.
  async function look(...moments) {
    for (let awaited; awaited !== latest; await awaited) awaited = latest;
    const ends = moments.map((moment, panel) => panels[panel]?.answer ?? moment);
    return [status, ...ends, ...ends.map((end, panel) => view(panel, end))];
  }

  // Move the sliders from the first moment to the models' answers.
  function play() {
    clearInterval(playing);
    const last = Math.max(0, ...panels.map((panel) => panel.answer));
    const stride = 1 + Math.floor(last / MOST_FRAMES);
    let moment = 0;
    function step() {
      panels.forEach(({ answer }, panel) => {
        const slider = document.querySelector(`#sf-slider-${panel} input[type=range]`);
        if (!slider || answer === 0) return;
        slider.value = Math.min(moment, answer);
        slider.dispatchEvent(new Event("input", { bubbles: true }));
      });
      if (moment >= last) clearInterval(playing);
      moment += stride;
    }
    if (last === 0) return;
    playing = setInterval(step, FRAME_MS);
    step();
  }

  function listen(input, mostBytes, submit) {
    function send(file) {
      if (!file) return;
      ask(file.name, async (signal) => {
        if (file.size > mostBytes) {
          throw new RangeError(`larger than ${mostBytes / 2 ** 20} MiB; make it smaller`);
        }
        return fetchAnswer(`look?name=${encodeURIComponent(file.name)}`, file, signal);
      });
      submit();
    }
    input.addEventListener("change", ({ target }) => {
      send(target.files[0]);
      target.value = ""; // so that the same file can be picked again
    });
    input.addEventListener("dragover", (event) => event.preventDefault());
    input.addEventListener("drop", (event) => {
      event.preventDefault();
      send(event.dataTransfer.files[0]);
    });
    document.addEventListener("paste", ({ clipboardData }) =>
      send([...clipboardData.files].find((file) => file.type.startsWith("image/"))),
    );
    document.addEventListener("click", ({ target }) => {
      const example = target.closest("[data-example]");
      if (!example) return;
      const path = `examples/${example.dataset.example}`;
      ask(example.innerText, (signal) => fetchAnswer(path, null, signal));
      submit();
    });
    for (const touch of ["keydown", "pointerdown"]) {
      document.addEventListener(touch, () => clearInterval(playing));
    }
  }

  return { listen, look, play, view };
})();
