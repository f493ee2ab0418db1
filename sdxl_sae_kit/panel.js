// HTML in which latents can be opened: with the mouse, or with Tab or the arrows and Enter. Page Up and Down turn pages.
const TURNS = { PageUp: -1, PageDown: 1 };
const MOVES = { ArrowLeft: -1, ArrowRight: 1 };

function render({ model, el }) {
  el.classList.add("sae-live");
  el.dataset.lmSuppressShortcuts = "true"; // else Enter and the arrows would act on the notebook's cells

  const places = () => [...el.querySelectorAll("[data-latent]")];

  function draw() {
    const held = el.contains(document.activeElement);
    el.innerHTML = model.get("value"); // made by sdxl_sae_kit.html, which escapes; scripts set this way do not run
    for (const place of places()) {
      place.tabIndex = 0;
      place.setAttribute("role", "button");
      place.setAttribute("aria-label", `Open latent ${place.dataset.latent}`);
    }
    if (held) places()[0]?.focus();
    take_focus();
  }

  // Where Python wants the focus, once: without this, who uses the keyboard would start from the top after each opening.
  function take_focus() {
    const wanted = model.get("takes_focus") && el.querySelector(model.get("takes_focus"));
    if (!wanted) return;
    if (!wanted.hasAttribute("tabindex")) wanted.tabIndex = -1;
    requestAnimationFrame(() => wanted.focus());
    model.set("takes_focus", "");
    model.save_changes();
  }

  function open(target) {
    const place = target.closest("[data-latent]") ?? target.closest(".sae-card")?.querySelector("[data-latent]");
    if (place) model.send({ open: Number(place.dataset.latent) });
    return Boolean(place);
  }

  function key(event) {
    const at = places().indexOf(event.target);
    if (event.key in TURNS && model.get("turns")) model.send({ turn: TURNS[event.key] });
    else if (event.key in MOVES && at >= 0) places()[at + MOVES[event.key]]?.focus();
    else if (!(event.key === "Enter" || event.key === " ") || !open(event.target)) return;
    event.preventDefault();
  }

  el.addEventListener("click", (event) => open(event.target));
  el.addEventListener("keydown", key);
  model.on("change:value", draw);
  model.on("change:takes_focus", take_focus);
  draw();
  return () => {
    model.off("change:value", draw);
    model.off("change:takes_focus", take_focus);
  };
}

export default { render };
