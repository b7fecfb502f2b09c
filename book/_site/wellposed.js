// Filters and sorting for the gallery and the ledger. Without this script both show everything.
// What is chosen stands in the address after "#", so that a view can be linked; a fragment works
// for pages opened as files too, where a query string would not.
"use strict";

function browse(root) {
  const form = root.querySelector("[data-wp-filters]");
  const shown = root.querySelector("[data-wp-shown]");
  const none = root.querySelector("[data-wp-none]");
  const items = [...root.querySelectorAll("[data-wp-item]")];
  const planned = [...root.querySelectorAll("[data-wp-planned]")];
  const groups = [...root.querySelectorAll("[data-wp-group]")];
  const heads = [...root.querySelectorAll("[data-wp-sort]")];
  const words = new Map([...items, ...planned].map((item) => [item, wordsOf(item)]));

  function chosen() {
    return [...new FormData(form)].filter(([, value]) => value.trim() !== "");
  }

  function fits(item) {
    return chosen().every(([name, value]) => {
      if (name === "sort") return true;
      if (name === "q") return fold(value).split(/\s+/).every((w) => words.get(item).includes(w));
      return (item.dataset[name] || "").split(" ").includes(value);
    });
  }

  function apply() {
    for (const item of [...items, ...planned]) item.hidden = !fits(item);
    for (const group of groups) {
      const left = [...group.querySelectorAll("[data-wp-planned]")].filter((item) => !item.hidden);
      group.hidden = left.length === 0;
      group.open = left.length > 0 && form.elements.q.value.trim() !== "";
    }
    const count = items.filter((item) => !item.hidden).length;
    shown.textContent = `${count} of ${items.length} ${shown.dataset.wpShown} shown`;
    none.hidden = count > 0;
    sort();
  }

  function sort() {
    const wish = form.elements.sort ? form.elements.sort.value : "";
    const name = wish.replace(/^-/, "");
    const down = wish.startsWith("-");
    const ordered = [...items];
    for (const head of heads) {
      head.removeAttribute("aria-sort");
      if (head.dataset.wpSort !== name) continue;
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (item) => item.cells[head.cellIndex].dataset.value ?? item.cells[head.cellIndex].textContent;
      const compare = new Intl.Collator("en", { numeric: true }).compare;
      ordered.sort((a, b) => (down ? -1 : 1) * compare(value(a), value(b)));
    }
    if (heads.length) items[0]?.parentElement.append(...ordered);
  }

  function write() {
    const state = new URLSearchParams(chosen()).toString();
    history.replaceState(null, "", state ? `#${state}` : location.href.split("#")[0]);
  }

  function read() {
    if (location.hash && !location.hash.includes("=")) return;
    const state = new URLSearchParams(location.hash.slice(1));
    for (const field of form.elements) {
      if (!field.name) continue;
      field.value = state.get(field.name) ?? "";
      if (field.selectedIndex === -1) field.value = "";
    }
    apply();
  }

  for (const head of heads) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => {
      const name = head.dataset.wpSort;
      form.elements.sort.value = form.elements.sort.value === name ? `-${name}` : name;
      apply();
      write();
    });
    head.append(button);
  }
  form.addEventListener("input", () => { apply(); write(); });
  form.addEventListener("submit", (event) => event.preventDefault());
  // The fields are empty only after the event.
  form.addEventListener("reset", () => setTimeout(() => { apply(); write(); }));
  addEventListener("hashchange", read);
  apply();
  read();
}

function wordsOf(item) {
  return fold(`${item.textContent} ${item.dataset.more || ""}`);
}

function fold(text) {
  return text.normalize("NFD").replace(/\p{Diacritic}/gu, "").toLowerCase().trim();
}

document.querySelectorAll("[data-wp-browse]").forEach(browse);
