"use strict";
(() => {
  const showNewest = new ResizeObserver((found) => {
    for (const { target } of found) target.scrollLeft = target.scrollWidth;
  });
  for (const table of document.querySelectorAll(".newest")) showNewest.observe(table);
  const list = document.getElementById("list");
  if (!list) return;
  const search = document.getElementById("search");
  const order = document.getElementById("order");
  const shown = document.getElementById("shown");
  const examples = [...list.children].map((node) => ({
    node,
    text: node.textContent.toLowerCase(),
    number: Number(node.dataset.number),
    margin: node.dataset.margin === "" ? -Infinity : Number(node.dataset.margin),
  }));
  const orders = {
    high: (a, b) => b.margin - a.margin,
    low: (a, b) => a.margin - b.margin,
    file: (a, b) => a.number - b.number,
  };

  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const example of examples) {
      const found = words.every((word) => example.text.includes(word));
      example.node.hidden = !found;
      count += found;
    }
    shown.textContent = words.length ? `${count} of ${examples.length} examples` : `${count} examples`;
  };
  const sort = () => {
    list.append(...examples.sort(orders[order.value]).map((example) => example.node));
  };
  search.addEventListener("input", filter);
  order.addEventListener("change", sort);
  // After a reload the browser keeps what was typed and chosen.
  sort();
  filter();
})();
