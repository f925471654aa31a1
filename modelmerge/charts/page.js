"use strict";
// Without it all is there; with it columns sort, and the legend's names single out what they stand for.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  const first = [...body.rows];
  heads.forEach((head, column) => {
    if (head.tagName !== "TH") return;
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const way = head.ariaSort === "descending" ? "ascending" : head.ariaSort === "ascending" ? null : "descending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      if (way) head.ariaSort = way;
      const text = (row) => row.cells[column].textContent.trim();
      const number = (row) => Number.parseFloat(text(row).replace(/,/g, "").replace(/^[^\d.+-]+/, ""));
      const words = head.classList.contains("word");
      const sign = way === "descending" ? -1 : 1;
      const sorted = way === null ? first : [...first].sort((a, b) => {
        if (words) return sign * text(a).localeCompare(text(b), undefined, { numeric: true });
        const [x, y] = [number(a), number(b)];
        // What is n/a is neither the least nor the most: it comes last.
        return Number.isNaN(x) || Number.isNaN(y) ? Number.isNaN(x) - Number.isNaN(y) : sign * (x - y);
      });
      body.append(...sorted);
    });
  });
}
// A digest is shown by its first letters: a click copies all of it.
for (const hash of document.querySelectorAll(".hash")) {
  hash.title += ": click to copy";
  hash.tabIndex = 0;
  hash.role = "button";
  const copy = () => {
    getSelection().selectAllChildren(hash);
    document.execCommand("copy"); // the only way that a page from a disk may copy in every browser
    hash.parentElement.classList.add("copied");
    setTimeout(() => hash.parentElement.classList.remove("copied"), 1500);
  };
  hash.addEventListener("click", copy);
  hash.addEventListener("keydown", (event) => event.key === "Enter" && copy());
}
for (const figure of document.querySelectorAll("figure")) {
  const marked = [...figure.querySelectorAll("[data-series]")];
  const show = (series) => marked.forEach((each) =>
    each.classList.toggle("faded", series !== null && each.dataset.series !== series));
  for (const name of figure.querySelectorAll(".legend li")) {
    for (const event of ["mouseenter", "focus"]) name.addEventListener(event, () => show(name.dataset.series));
    for (const event of ["mouseleave", "blur"]) name.addEventListener(event, () => show(null));
  }
}
