// A filter over every static gallery of the report, put there by the script, so that without scripts no control is dead.
for (const twin of document.querySelectorAll(".sae-twin")) {
  const items = [...twin.querySelectorAll(".sae-card, .sae-examples > figure")];
  if (items.length < 2) continue;
  const bar = document.createElement("div");
  bar.className = "sae-bar";
  twin.querySelector(".sae-kit").prepend(bar);

  const words = labelled("Filter", document.createElement("input"));
  words.type = "search";
  words.placeholder = "words of labels and prompts";
  const said = document.createElement("span");
  said.setAttribute("role", "status");

  const texts = new Map(items.map((item) => [item, text_of(item)]));
  function choose() {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean).map(beginning);
    for (const item of items) item.hidden = !wanted.every((word) => word.test(texts.get(item)));
    const left = items.filter((item) => !item.hidden).length;
    said.textContent = wanted.length ? `${left} of ${items.length}` : "";
    for (const folded of twin.querySelectorAll("details"))
      if (wanted.length) folded.open = folded.querySelector("figure:not([hidden])") !== null;
  }
  words.addEventListener("input", choose);

  const cards = items.filter((item) => "density" in item.dataset);
  if (cards.length > 1) {
    const order = labelled("Sort by", document.createElement("select"));
    const number = (card) => +card.querySelector("[data-latent]").dataset.latent;
    const keys = { "as it was": (card) => cards.indexOf(card), "latent number": number };
    const names = { density: "density", maximum: "maximum", mean: "mean", moran: "Moran's I" };
    for (const [key, name] of Object.entries(names))
      if (cards.some((card) => key in card.dataset)) keys[name] = (card) => -(card.dataset[key] ?? -Infinity);
    for (const name of Object.keys(keys)) order.add(new Option(name));
    order.addEventListener("change", () => {
      const key = keys[order.value];
      cards[0].parentElement.append(...[...cards].sort((a, b) => key(a) - key(b)));
    });
  }
  bar.append(said);

  function beginning(word) {
    return new RegExp("(?<![\\p{L}\\p{N}_])" + word.replace(/[.*+?^${}()|[\]\\/]/g, "\\$&"), "u");
  }

  function labelled(name, control) {
    const label = document.createElement("label");
    label.append(name, control);
    bar.append(label);
    return control;
  }

  function text_of(item) {
    const leaves = [...item.querySelectorAll("*")].filter((element) => !element.children.length);
    return leaves.map((leaf) => leaf.alt ?? leaf.textContent).join(" ").toLowerCase();
  }
}
