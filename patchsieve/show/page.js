"use strict";
// Without this script every panel of every place is on the page; with it a slider shows one.
const data = JSON.parse(document.getElementById("data").textContent);
const slider = document.getElementById("place");
const views = [...document.querySelectorAll(".view")];
let pointed = null; // { picture, patch }

function current() {
  return slider ? Number(slider.value) : 0;
}

function placeName(number) {
  return number === 0 ? "all tokens" : data.places[number - 1];
}

function showPlace() {
  const number = current();
  for (const panel of document.querySelectorAll("[data-place]")) {
    panel.hidden = Number(panel.dataset.place) !== number;
  }
  for (const tick of document.querySelectorAll("[data-tick]")) {
    tick.classList.toggle("is-current", Number(tick.dataset.tick) === number);
  }
  slider.setAttribute("aria-valuetext", placeName(number));
  document.getElementById("named").textContent = placeName(number);
  showPatch();
}

// What became of a patch at the place shown, in words.
function describe(places, patch, columns) {
  const words = [`row ${Math.floor(patch / columns) + 1}, column ${(patch % columns) + 1}`];
  const number = current();
  const end = number === 0 ? places.length : number;
  const lost = places.slice(0, end).findIndex((place) => !place.kept.includes(patch));
  const place = places[number - 1];
  if (place && place.scores && place.scores[patch] !== null) {
    const scored = place.ranks.filter((rank) => rank !== null).length;
    words.push(`score ${place.scores[patch]}, rank ${place.ranks[patch]} of ${scored}`);
  }
  if (place && place.groups && place.groups[patch] >= 0) {
    const size = place.groups.filter((group) => group === place.groups[patch]).length;
    words.push(size > 1 ? `merged, ${size} patches in one token` : "not merged");
  }
  if (places.length) {
    words.push(lost < 0 ? (number === 0 ? "in every layer" : "kept") : `dropped: ${data.places[lost]}`);
  }
  return words.join(" · ");
}

function showPatch() {
  for (const view of views) {
    const [prompt, picture] = view.dataset.view.split("-").map(Number);
    const isHere = pointed !== null && pointed.picture === picture;
    const columns = data.grids[picture][1];
    for (const cursor of view.querySelectorAll(".cursor")) {
      cursor.classList.toggle("is-on", isHere);
      if (isHere) {
        cursor.setAttribute("x", pointed.patch % columns);
        cursor.setAttribute("y", Math.floor(pointed.patch / columns));
      }
    }
    const readout = view.querySelector(".readout");
    readout.textContent = isHere
      ? describe(data.views[prompt][picture], pointed.patch, columns)
      : view === views[0] ? "Point at a patch, or use the arrow keys in a figure." : "";
  }
}

function listen(grid, picture) {
  const [rows, columns] = data.grids[picture];
  const point = (event) => {
    const box = grid.getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left) / box.width) * columns);
    const row = Math.floor(((event.clientY - box.top) / box.height) * rows);
    if (row < 0 || row >= rows || column < 0 || column >= columns) return;
    pointed = { picture, patch: row * columns + column };
    showPatch();
  };
  const leave = () => {
    pointed = null;
    showPatch();
  };
  grid.tabIndex = 0;
  grid.addEventListener("pointermove", point);
  grid.addEventListener("pointerdown", point);
  grid.addEventListener("pointerleave", leave);
  grid.addEventListener("blur", leave);
  grid.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (!(event.key in steps)) return;
    event.preventDefault();
    const old = pointed && pointed.picture === picture ? pointed.patch : 0;
    const row = Math.min(Math.max(Math.floor(old / columns) + steps[event.key][0], 0), rows - 1);
    const column = Math.min(Math.max((old % columns) + steps[event.key][1], 0), columns - 1);
    pointed = { picture, patch: row * columns + column };
    showPatch();
  });
}

for (const view of views) {
  const picture = Number(view.dataset.view.split("-")[1]);
  for (const grid of view.querySelectorAll(".grid")) listen(grid, picture);
}
if (slider) {
  document.documentElement.classList.add("is-scripted");
  slider.closest(".slider").hidden = false;
  slider.addEventListener("input", showPlace);
  for (const tick of document.querySelectorAll("[data-tick]")) {
    tick.addEventListener("click", () => {
      slider.value = tick.dataset.tick;
      showPlace();
    });
  }
  showPlace();
} else {
  showPatch();
}
