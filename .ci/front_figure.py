"""Draw nbs/images/circuit.png, the figure of the front page, from a run's report: the drawing there, in two rows, because
in one its words would be too small at the width of a page. Needs Chromium."""
import base64, sys
from pathlib import Path

from subspace_circuits.bench.browser import Browser

root = Path(__file__).resolve().parent.parent
WIDTH = 760 # Pixels of the page that the figure is made for; stored at half as many again
FOLD = """
{
const svg = document.querySelector(".circuit svg");
const [x, y, width, height] = svg.getAttribute("viewBox").split(" ").map(Number);
const sites = [...svg.querySelectorAll(".site")].map(o => +o.getAttribute("x"));
const middle = sites.reduce((a, b) => Math.abs(a - width/2) < Math.abs(b - width/2) ? a : b); // drawn in both rows
const room = Math.max(middle + 60, width - middle + 60), legend = document.querySelector(".legend");
const rows = [x - 4, Math.max(x - 4, middle - 60)].map(start => {
  const row = svg.cloneNode(true);
  row.setAttribute("viewBox", `${start} ${y} ${room} ${height}`);
  row.setAttribute("style", "overflow: hidden; margin-bottom: 10px");
  return row;
});
document.body.replaceChildren(...rows, legend);
document.body.classList.add("circuit");
document.body.style = "width: %dpx; padding: 6px; border: none; border-radius: 0; background: white";
document.body.scrollHeight
}
""" % WIDTH


def draw(run):
    "Write the picture of a finished run's circuit."
    with Browser(WIDTH, 900) as page:
        page.open((Path(run)/"report.html").resolve().as_uri())
        height = page.run(FOLD)
        shot = page.send("Page.captureScreenshot", clip=dict(x=0, y=0, width=WIDTH, height=height, scale=1.5),
                         captureBeyondViewport=True)
    (root/"nbs/images/circuit.png").write_bytes(base64.b64decode(shot["data"]))


if __name__ == "__main__": draw(sys.argv[1])
