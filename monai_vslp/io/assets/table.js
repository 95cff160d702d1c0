"use strict";
// Tables of class "sortable": a click on a heading sorts by that column, another one turns the order round.
document.querySelectorAll("table.sortable").forEach(table => {
  const body = table.tBodies[0], headings = [...table.tHead.rows[0].cells];
  const value = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const sign = heading.getAttribute("aria-sort") === "descending" ? 1 : -1;
      headings.forEach(other => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const compare = (a, b) => {
        const [x, y] = [value(a, column), value(b, column)];
        if (x === "" || y === "") return (x === "") - (y === ""); // what is not known stays last
        const numbers = [Number(x), Number(y)];
        return sign * (numbers.every(Number.isFinite) ? numbers[0] - numbers[1] : x.localeCompare(y, undefined, {numeric: true}));
      };
      body.append(...[...body.rows].sort(compare));
    });
  });
});
