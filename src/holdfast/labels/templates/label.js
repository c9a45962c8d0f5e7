"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const known = new Set(data.choices.map((c) => c.label));
  const slot = "holdfast-labels-" + data.draw + "-" + data.annotator;
  let said = new Map();
  let place = 0;

  // A browser may forbid storage to a file; the form then works until it is closed.
  const stored = (() => { try { return JSON.parse(localStorage.getItem(slot) || "null"); } catch (e) { return null; } })();
  if (stored && Array.isArray(stored.labels)) {
    const numbers = new Set(data.items.map((i) => i.item));
    said = new Map(stored.labels.filter(([n, l]) => numbers.has(n) && known.has(l)));
  }
  at("name").value = data.annotator || (stored && String(stored.name || "")) || "";
  at("name").readOnly = Boolean(data.annotator);

  const keep = () => {
    try { localStorage.setItem(slot, JSON.stringify({ name: at("name").value, labels: [...said] })); } catch (e) { at("said").textContent = "This browser keeps nothing between visits: save before you close the page."; }
  };
  const firstOpen = () => data.items.findIndex((i) => !said.has(i.item));

  const buttons = data.choices.map((choice) => {
    const button = document.createElement("button");
    button.type = "button";
    const key = document.createElement("kbd");
    key.textContent = choice.key;
    const means = document.createElement("small");
    means.textContent = choice.means;
    button.append(key, choice.name, means);
    button.addEventListener("click", () => choose(choice.label));
    at("choices").append(button);
    return button;
  });

  function show() {
    const item = data.items[place];
    // Text nodes only: whatever a model wrote stays text.
    at("request").textContent = item.request || "(no text)";
    at("reply").textContent = item.reply === "" ? "(empty reply)" : item.reply;
    at("reply").scrollTop = 0;
    at("images").replaceChildren(...item.images.map((uri) => {
      const image = document.createElement("img");
      // A picture of some 50 pixels is looked at pixel by pixel.
      image.addEventListener("load", () => image.classList.toggle("tiny", image.naturalWidth < 144));
      image.src = uri;
      image.alt = "picture that belongs to the request";
      return image;
    }));
    data.choices.forEach((c, i) => buttons[i].setAttribute("aria-pressed", String(said.get(item.item) === c.label)));
    at("where").textContent = `Reply ${place + 1} of ${data.items.length}; ${said.size} labelled`;
    at("bar").style.width = `${(100 * said.size) / data.items.length}%`;
    at("back").disabled = place === 0;
    at("next").disabled = place === data.items.length - 1;
    at("open").disabled = firstOpen() < 0;
  }
  function move(to) {
    place = Math.max(0, Math.min(data.items.length - 1, to));
    show();
  }
  function choose(label) {
    said.set(data.items[place].item, label);
    keep();
    if (said.size === data.items.length) at("said").textContent = "All are labelled. Save them now.";
    move(place + 1);
  }
  function lines() {
    const name = at("name").value.trim();
    return [...said].sort((a, b) => a[0] - b[0])
      .map(([item, label]) => JSON.stringify({ draw: data.draw, item, label, annotator: name }) + "\n").join("");
  }
  at("save").addEventListener("click", () => {
    const name = at("name").value.trim();
    if (!/^[A-Za-z0-9][A-Za-z0-9._-]{0,39}$/.test(name)) {
      at("said").textContent = "Please give your name first: letters, digits, '.', '_' and '-', beginning with a letter or digit.";
      at("name").focus();
      return;
    }
    keep();
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([lines()], { type: "application/x-ndjson" }));
    link.download = `labels-${name}.jsonl`;
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    at("said").textContent = `Saved ${said.size} labels as ${link.download}.`;
  });
  at("back").addEventListener("click", () => move(place - 1));
  at("next").addEventListener("click", () => move(place + 1));
  at("open").addEventListener("click", () => move(firstOpen()));
  at("name").addEventListener("input", keep);
  document.addEventListener("keydown", (event) => {
    if (event.target === at("name") || event.ctrlKey || event.metaKey || event.altKey) return;
    const choice = data.choices.find((c) => c.key === event.key);
    if (choice) choose(choice.label);
    else if (event.key === "ArrowLeft") move(place - 1);
    else if (event.key === "ArrowRight") move(place + 1);
    else return;
    event.preventDefault();
  });
  if (data.items.length) move(firstOpen() < 0 ? 0 : firstOpen());
})();
