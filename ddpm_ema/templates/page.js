"use strict";
// The page works without this: it adds copy buttons, and the values of the nearest point of a plot.
for (const code of document.querySelectorAll("code.command")) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code);
      button.textContent = "Selected: copy it with the keyboard";
    }
  });
  code.after(button);
}
for (const svg of document.querySelectorAll(".plot > svg")) {
  const points = [...svg.querySelectorAll(".hit")];
  const shown = document.createElement("output");
  let current = points.length - 1;
  const show = (point) => {
    points[current].classList.remove("on");
    current = points.indexOf(point);
    point.classList.add("on");
    shown.textContent = point.textContent;
  };
  svg.after(shown);
  svg.tabIndex = 0;
  svg.classList.add("live");
  svg.addEventListener("pointermove", (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const far = (point) => Math.hypot(point.cx.baseVal.value - at.x, point.cy.baseVal.value - at.y);
    show(points.reduce((best, point) => (far(point) < far(best) ? point : best)));
  });
  svg.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (by) show(points[(current + by + points.length) % points.length]);
  });
}
