// Formulas first, while every slide is laid out; then each slide is made to fit; then reveal.js,
// which shows one at a time.
const WIDTH = 1280, HEIGHT = 720, SMALLEST = 0.5;

function fit() {
  for (const formula of document.querySelectorAll("mjx-container[display]")) {
    const [room, needed] = [formula.clientWidth, formula.scrollWidth];
    if (needed > room) formula.style.fontSize = `${room / needed}em`;
  }
  for (const slide of document.querySelectorAll(".slides > section > section")) {
    let size = 1;
    while (slide.scrollHeight > HEIGHT && size > SMALLEST) {
      size -= 0.04;
      slide.style.fontSize = `${size}em`;
    }
  }
}

window.MathJax = {
  tex: {
    inlineMath: [["$", "$"], ["\\(", "\\)"]],
    displayMath: [["$$", "$$"], ["\\[", "\\]"]],
    processEscapes: true,
  },
  options: { enableMenu: false },
  startup: {
    pageReady: async () => {
      document.body.classList.add("laying-out");
      await MathJax.startup.defaultPageReady();
      await Promise.all([...document.images].map((image) => image.decode().catch(() => {})));
      fit();
      document.body.classList.remove("laying-out");
      await Reveal.initialize({
        width: WIDTH, height: HEIGHT, margin: 0.03,
        center: false, hash: true, slideNumber: "c/t", transition: "none",
      });
    },
  },
};
