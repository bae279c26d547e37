// Query, key and weight under the pointer. A map is an image of one pixel per weight, rows being queries.
const tip = document.querySelector(".tip");
for (const figure of document.querySelectorAll("figure[data-weights]")) {
  const tokens = JSON.parse(figure.closest("[data-tokens]").dataset.tokens);
  const bytes = Uint8Array.from(atob(figure.dataset.weights), (character) => character.charCodeAt(0));
  const weights = new Float32Array(bytes.buffer);
  const size = Math.sqrt(weights.length);
  const image = figure.querySelector("image");
  figure.addEventListener("pointermove", (event) => {
    const box = image.getBoundingClientRect();
    const key = Math.floor(((event.clientX - box.left) / box.width) * size);
    const query = Math.floor(((event.clientY - box.top) / box.height) * size);
    tip.hidden = Math.min(key, query) < 0 || Math.max(key, query) >= size;
    if (tip.hidden) return;
    const token = (position) => `${position}  ${tokens[position] ?? ""}`;
    const weight = weights[query * size + key].toPrecision(3);
    tip.textContent = `query ${token(query)}\nkey ${token(key)}\nweight ${weight}`;
    tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)}px`;
    tip.style.top = `${Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8)}px`;
  });
  figure.addEventListener("pointerleave", () => { tip.hidden = true; });
}
