"use strict";
// Point clouds: turn by themselves, and by dragging or the arrow keys.
const still = matchMedia("(prefers-reduced-motion: reduce)").matches;

function cloud(canvas) {
  const bytes = Uint8Array.from(atob(canvas.dataset.points), (c) => c.charCodeAt(0));
  const count = bytes.length / 6, side = canvas.width, pen = canvas.getContext("2d");
  const order = Array.from({ length: count }, (_, i) => i), near = new Float32Array(count);
  let yaw = 0.6, pitch = 0.35, held = false, seen = false;

  function draw() {
    const cy = Math.cos(yaw), sy = Math.sin(yaw), cp = Math.cos(pitch), sp = Math.sin(pitch);
    const xs = new Float32Array(count), ys = new Float32Array(count);
    for (let i = 0; i < count; i++) {
      const x = bytes[6 * i] / 127.5 - 1, y = bytes[6 * i + 1] / 127.5 - 1, z = bytes[6 * i + 2] / 127.5 - 1;
      const across = cy * x + sy * y, away = cy * y - sy * x;
      near[i] = cp * -away + sp * z;
      const size = 0.5 * side * 0.94 / (1.25 - 0.25 * near[i]);
      xs[i] = side / 2 + across * size;
      ys[i] = side / 2 - (cp * z + sp * away) * size;
    }
    order.sort((a, b) => near[a] - near[b]);
    pen.fillStyle = "#1c1c1c";
    pen.fillRect(0, 0, side, side);
    for (const i of order) {
      const light = 0.72 + 0.28 * near[i], radius = side * (0.0105 + 0.003 * near[i]);
      pen.fillStyle = `rgb(${bytes[6 * i + 3] * light},${bytes[6 * i + 4] * light},${bytes[6 * i + 5] * light})`;
      pen.beginPath();
      pen.arc(xs[i], ys[i], radius, 0, 6.2832);
      pen.fill();
    }
  }
  function turn() {
    if (!held && seen && !still) { yaw += 0.012; draw(); }
    requestAnimationFrame(turn);
  }
  canvas.addEventListener("pointerdown", (e) => { held = true; canvas.setPointerCapture(e.pointerId); });
  canvas.addEventListener("pointerup", () => { held = false; });
  canvas.addEventListener("pointercancel", () => { held = false; });
  canvas.addEventListener("pointermove", (e) => {
    if (!held) return;
    yaw += e.movementX * 0.01;
    pitch = Math.max(-1.5, Math.min(1.5, pitch + e.movementY * 0.01));
    draw();
  });
  canvas.addEventListener("keydown", (e) => {
    const step = { ArrowLeft: [-0.15, 0], ArrowRight: [0.15, 0], ArrowUp: [0, 0.15], ArrowDown: [0, -0.15] }[e.key];
    if (!step) return;
    e.preventDefault();
    yaw += step[0];
    pitch = Math.max(-1.5, Math.min(1.5, pitch + step[1]));
    draw();
  });
  new IntersectionObserver((entries) => { seen = entries[entries.length - 1].isIntersecting; }).observe(canvas);
  draw();
  turn();
}
document.querySelectorAll("canvas[data-points]").forEach(cloud);

// Figures: pointing at a line or a name dims the others, in every figure.
for (const series of document.querySelectorAll(".series")) {
  const same = () => [...document.querySelectorAll(".series")].filter((s) => s.dataset.series === series.dataset.series);
  series.addEventListener("pointerenter", () => same().forEach((s) => { s.classList.add("chosen"); s.ownerSVGElement.classList.add("choosing"); }));
  series.addEventListener("pointerleave", () => same().forEach((s) => { s.classList.remove("chosen"); s.ownerSVGElement.classList.remove("choosing"); }));
}

// Navigation: mark the section in view.
const links = new Map([...document.querySelectorAll("nav a")].map((a) => [a.hash.slice(1), a]));
const watch = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    links.forEach((a) => a.classList.remove("here"));
    links.get(entry.target.id).classList.add("here");
  }
}, { rootMargin: "-20% 0px -70% 0px" });
links.forEach((_, id) => watch.observe(document.getElementById(id)));
