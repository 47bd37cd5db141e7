// Sorts tables by a click on a column's name. The page is whole without it.
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [];
  [...table.tHead.rows].forEach((row, r) => {
    let column = 0;
    for (const cell of row.cells) {
      while (heads[r]?.[column]) column += 1;
      for (let y = 0; y < cell.rowSpan; y += 1) {
        for (let x = 0; x < cell.colSpan; x += 1) (heads[r + y] ??= [])[column + x] = cell;
      }
    }
  });
  const value = (row, column) => {
    const text = (row.cells[column]?.innerText ?? "").trim().replace(/\u2212/g, "-").replace(/\u202f/g, "");
    const number = /^[+-]?\d[\d,]*(\.\d+)?/.exec(text);
    return number ? Number(number[0].replace(/,/g, "")) : text;
  };
  const compare = (a, b) => {
    if (typeof a === "number" && typeof b === "number") return a - b;
    if (typeof a === "number") return -1;
    if (typeof b === "number") return 1;
    return a.localeCompare(b);
  };
  const last = heads[heads.length - 1];
  last.forEach((head, column) => {
    if (!head || head.colSpan > 1 || head.querySelector("button")) return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      last.forEach((other) => other?.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      for (const body of table.tBodies) {
        const moving = [...body.rows].filter((row) => !row.matches(".seat, .baseline, .fixed"));
        const after = [...body.rows].find((row) => row.matches(".baseline, .fixed")) ?? null;
        moving.sort((a, b) => compare(value(a, column), value(b, column)) * (down ? -1 : 1));
        for (const row of moving) body.insertBefore(row, after);
      }
    });
  });
}
