// Light and dark: the system's choice until somebody presses the button.
(() => {
  const theme = document.querySelector(".theme"),
    root = document.documentElement;
  const dark = () =>
    root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const name = () => {
    theme.textContent = dark() ? "Light" : "Dark";
  };
  theme.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    name();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", name);
  name();
  Page.connectRuns();
  root.dataset.ready = "true"; // everything is drawn
})();
