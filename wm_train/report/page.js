"use strict";
// Samples play while they are in view, unless the reader has asked for less motion.
if ("IntersectionObserver" in window && !matchMedia("(prefers-reduced-motion: reduce)").matches) {
  const seen = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) target.play().catch(() => {});
      else target.pause();
    }
  }, { threshold: 0.25 });
  document.querySelectorAll("video").forEach((video) => seen.observe(video));
}
// A chart says its figures at the pointer.
for (const chart of document.querySelectorAll(".chart")) {
  const svg = chart.querySelector("svg"), out = chart.querySelector("output");
  const cursor = document.createElementNS(svg.namespaceURI, "line");
  cursor.setAttribute("class", "cursor");
  cursor.setAttribute("y1", 0);
  cursor.setAttribute("y2", 100);
  const lines = [...chart.querySelectorAll("path.line:not(.faint)")].map((path) => ({
    label: path.dataset.label, points: JSON.parse(path.dataset.points),
  }));
  const left = Number(chart.dataset.left), right = Number(chart.dataset.right);
  const number = (value) => Number(value.toPrecision(4)).toString();
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const share = (event.clientX - box.left) / box.width, at = left + share * (right - left);
    let step = null;
    const said = lines.map(({ label, points }) => {
      const near = points.reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a));
      step = step ?? near[0];
      return lines.length > 1 ? `${label} ${number(near[1])}` : number(near[1]);
    });
    cursor.setAttribute("x1", 100 * share);
    cursor.setAttribute("x2", 100 * share);
    svg.append(cursor);
    out.textContent = `${chart.dataset.x} ${Math.round(step)}: ${said.join(", ")}`;
  });
  svg.addEventListener("pointerleave", () => {
    cursor.remove();
    out.textContent = "";
  });
}
