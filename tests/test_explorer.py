"The explorer, asked by HTTP and driven in headless Chromium."
import json, shutil, signal, subprocess, sys
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import pytest
import torch

from commands import call, refused
from subspace_circuits.activations import capture
from subspace_circuits.partition import Partition
from subspace_circuits.preimages import build_indexes
from subspace_circuits.bench.browser import Browser, find_browser
from subspace_circuits.explorer import Explorer, cell, chosen_rows, open_run, start_server, static_page
from subspace_circuits.toy_models import load_model

mid, post = "blocks.0.hook_resid_mid", "blocks.0.hook_resid_post"
browser = pytest.mark.skipif(find_browser() is None,
                             reason="no Chromium on this machine: the page is not driven in a browser")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run of the bundled model with two sites, cut at random."
    torch.set_num_threads(1)
    folder, (model, task, _) = tmp_path_factory.mktemp("explorer")/"run", load_model("induction")
    store = capture(model, task, [mid, post], folder/"store", shards=2, sequences=32)
    for i, site in enumerate((mid, post)):
        basis = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(i)))[0]
        Partition(dict(zip(("s0", "<b>s1</b>", "rest"), basis.split([20, 20, 24], 1))), site,
                  store[site].mean(0)).save_pretrained(folder/"partitions"/f"x0.{site[-4:].strip('_')}")
    (folder/"config.json").write_text('{"model": "induction"}')
    return folder


@pytest.fixture(scope="module")
def explorer(run): return open_run(run)


@pytest.fixture(scope="module")
def server(explorer):
    server = start_server(explorer)
    yield server
    server.stop()


def ask(server, path, headers={}, **given):
    "Status and answer."
    address = f"http://127.0.0.1:{server.server_port}{path}" + (f"?{urlencode(given)}" if given else "")
    try:
        with urlopen(Request(address, headers=headers)) as reply: return reply.status, reply.read().decode()
    except HTTPError as e: return e.code, e.read().decode()


def refusal(server, path="/view", **given):
    "The one line that a refused link shows."
    status, answer = ask(server, path, **given)
    assert status == 400, answer
    return json.loads(answer)["error"]


def test_view(server, explorer):
    status, answer = ask(server, "/view", row=300, n=7, metric="euclidean")
    o = json.loads(answer)
    assert status == 200 and len(o["neighbours"]) == 7 and sum(o["histogram"]["counts"]) == len(explorer.store)
    assert all(x["document"] != o["query"]["document"] for x in o["neighbours"])
    assert [x["value"] for x in o["neighbours"]] == sorted(x["value"] for x in o["neighbours"])
    assert set(o["glance"]) == {"s0", "<b>s1</b>", "rest"}


def test_listens_here_only(server):
    assert server.server_address[0] == "127.0.0.1"
    assert ask(server, "/view", {"Host": "evil.example"})[0] == 403


def test_links_that_are_refused(server, explorer):
    assert refusal(server,
                   site="../../store").startswith("no site '../../store' here: use one of blocks.0.hook_resid_mid")
    assert refusal(server, subspace="s9") == "no subspace 's9' here: use one of s0, <b>s1</b>, rest"
    assert "'folder' is nothing a link can say" in refusal(server, folder="/etc")
    assert "is not served here" in refusal(server, "/../../config.json")
    assert "is not served here" in refusal(server, "/%2e%2e/config.json")
    assert "no metric 'dot' here" in refusal(server, metric="dot")
    assert "n '101': use a number from 1 to 100" in refusal(server, n=101)
    assert "threshold '2': use a number from -1 to 1" in refusal(server, threshold=2)
    assert "threshold 'nan': use a number" in refusal(server, threshold="nan")
    assert f"row '{10**9}': use a number from 0 to {len(explorer.store) - 1}" in refusal(server, row=10**9)
    assert "attribution of 1 rows" in refusal(server, "/attribution", rows=10**9)
    assert "rows '1;2': use whole numbers, separated by commas" in refusal(server, "/attribution", rows="1;2")
    assert "after 'x': use a number" in refusal(server, "/find", text="53", after="x")


def test_texts(server):
    o = json.loads(ask(server, "/view", text="5 9 3 sep 5")[1])
    assert o["query"]["ids"] == [150, 5, 9, 3, 151, 5] and o["query"]["at"] == 5
    assert json.loads(ask(server, "/view", text="5 9 3 sep 5", at=2)[1])["query"]["at"] == 2
    assert "at '9': use a number from 0 to 5" in refusal(server, text="5 9 3 sep 5", at=9)
    assert "the text has 301 tokens and this model takes 256: shorten it by 45" in refusal(server,
                                                                                           text=" ".join(["5"]*300))
    assert "'hello' is no symbol" in refusal(server, text="hello")


def test_empty_result_shows_the_nearest(server):
    o = json.loads(ask(server, "/view", row=300, threshold=1)[1])
    assert o["empty"] and o["count"] == 0 and len(o["neighbours"]) == 3
    o = json.loads(ask(server, "/view", row=300, threshold=-1)[1])
    assert not o["empty"] and o["count"] > 1000 and len(o["neighbours"]) == 20


def test_find(server, explorer):
    first = json.loads(ask(server, "/find", text="53")[1])
    second = json.loads(ask(server, "/find", text="53", after=first["row"])[1])
    assert explorer.columns["token"][[first["row"], second["row"]]].tolist() == [53, 53]
    assert second["row"] > first["row"] and first["count"] == second["count"]
    assert "stands nowhere in the store" in refusal(server, "/find", text="53 53")


def test_tokens_that_are_html(explorer):
    class Bad:
        vocab = ["<img src=x onerror=alert(1)>", "</script><script>alert(2)</script>"]
        bos = 150
        def decode(self, ids): return " ".join(self.vocab[o % 2] for o in ids)
    bad = Explorer(list(explorer.sites.values()), explorer.model, Bad(), "<title>")
    page = static_page(bad, [300], n=3, metrics=("cosine",), shadings=())
    assert "<img" not in page and page.count("<script") == 2 and "alert(2)</script>" not in page


def test_static_page_limits(explorer):
    with pytest.raises(ValueError, match="no queries: choose rows"): static_page(explorer, [])
    with pytest.raises(ValueError, match="no site 'x' here"): static_page(explorer, [1], sites=["x"])
    page = static_page(explorer, [300], n=3, shadings=())
    assert len(page.encode()) < 300_000 and "http://" not in page.replace("http://www.w3.org/2000/svg", "")


def test_runs_that_are_refused(run, tmp_path):
    with pytest.raises(ValueError, match="holds no store/store.json"): open_run(tmp_path)
    copy = tmp_path/"run"
    shutil.copytree(run, copy)
    with pytest.raises(ValueError, match="not of"): open_run(copy, "bigram_copy")
    (copy/"config.json").unlink()
    with pytest.raises(ValueError, match="does not name its model: pass --model"): open_run(copy)
    shutil.rmtree(copy/"store")
    (copy/"store").symlink_to(run/"store")
    with pytest.raises(ValueError, match="leads out of"): open_run(copy, "induction")


def choose(page, id, value):
    "Set a control as a person would."
    turn = int(page.run("document.body.dataset.turn"))
    page.run(f"{{ const o = document.getElementById({json.dumps(id)}); o.value = {json.dumps(value)}; "
             "o.dispatchEvent(new Event('change')); }")
    settle(page, turn)


def click(page, selector):
    turn = int(page.run("document.body.dataset.turn"))
    page.run(f"document.querySelector({json.dumps(selector)}).click()")
    settle(page, turn)


def settle(page, turn):
    page.wait(f"Number(document.body.dataset.turn) > {turn} && document.body.getAttribute('aria-busy') === 'false'")
def text(page, selector): return page.run(f"document.querySelector({json.dumps(selector)}).textContent")
def count(page, selector): return page.run(f"document.querySelectorAll({json.dumps(selector)}).length")


@browser
@pytest.mark.parametrize("width", [1400, 700])
def test_in_a_browser(server, width):
    with Browser(width) as page:
        page.open(f"http://127.0.0.1:{server.server_port}/#row=300")
        page.wait("document.body.dataset.turn === '1'")
        assert count(page, ".context") == 20 and text(page, ".side h3") == "s0" and count(page, "#glance tbody tr") == 4
        assert page.run("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the window"

        click(page, "#next")                                                   # step
        assert text(page, ".side h3") == "<b>s1</b>" and count(page, "h3 b") == 0
        click(page, "#previous")
        choose(page, "site", post)                                             # choose
        choose(page, "other", "rest")
        assert count(page, ".side") == 2 and text(page, ".side:nth-child(2) h3") == "rest"
        choose(page, "metric", "euclidean")
        choose(page, "n", "5")
        assert count(page, ".side:first-child .context") == 5

        page.run("document.getElementById('text').value = '5 9 3 sep 5'")      # type a text
        click(page, "#run")
        assert [page.run(f"document.querySelectorAll('#query .token')[{i}].textContent")
                for i in range(6)] == "bos 5 9 3 sep 5".split()
        click(page, "#query .token:nth-child(3)")
        assert text(page, "#query .here") == "9"

        choose(page, "shading", "frozen")                                      # attribution
        assert count(page, ".shaded .token[title^='+'], .shaded .token[title^='−']") > 20
        assert "completeness error" in text(page, ".explained")
        choose(page, "shading", "off")
        assert count(page, ".token[title]") == 0
        page.run("document.getElementById('search').value = '53'")
        click(page, "#find")
        assert text(page, "#query .here") == "53"
        click(page, "#random")

        choose(page, "metric", "cosine")
        choose(page, "threshold", "1")                                         # nothing there
        assert "No context has a cosine at least 1" in text(page, ".count")
        assert count(page, ".side:first-child .context") == 3
        view = page.run("document.getElementById('sides').innerHTML")          # the link reproduces the view
        link = page.run("location.href")
        page.open("about:blank")
        page.open(link)
        page.wait("document.body.dataset.turn === '1'")
        assert page.run("document.getElementById('sides').innerHTML") == view
        assert page.problems() == []
        page.run("console.error(1)")
        assert len(page.problems()) == 1


@browser
def test_a_bad_link_says_so(server):
    with Browser() as page:
        page.open(f"http://127.0.0.1:{server.server_port}/#subspace=..%2F..%2Fetc&row=3")
        page.wait("!document.getElementById('error').hidden")
        assert "no subspace '../../etc' here" in text(page, "#error")
        page.open(f"http://127.0.0.1:{server.server_port}/#folder=%2Fetc")
        page.wait("document.getElementById('error').textContent.startsWith('“folder” is nothing a link can say')")
        page.wait("document.querySelectorAll('.context').length === 20")


@browser
@pytest.mark.parametrize("width", [1400, 700])
def test_file_and_cell(explorer, tmp_path, width):
    queries = [300, "5 9 3 sep 5"]
    (tmp_path/"page.html").write_text(static_page(explorer, queries, n=4), encoding="utf-8")
    (tmp_path/"cell.html").write_text("<!doctype html>" + cell(static_page(explorer, queries, n=4, mode="cell")),
                                      encoding="utf-8")
    with Browser(width) as page:
        page.open(f"file://{tmp_path}/page.html#site={post}&subspace=rest&row=300")
        page.wait("document.body.dataset.turn === '1'")
        assert text(page, ".side h3") == "rest" and count(page, ".context") == 4 and count(page, "#chosen option") == 2
        choose(page, "shading", "free")
        assert count(page, ".token[title]") > 4
        turn = int(page.run("document.body.dataset.turn"))
        page.run("{ const o = document.getElementById('chosen'); o.selectedIndex = 1; o.dispatchEvent(new "
                 "Event('change')); }")
        settle(page, turn)
        assert text(page, "#query .here") == "5" and page.problems() == []
        fetched = [o["params"]["request"]["url"] for o in page.events if o.get("method") == "Network.requestWillBeSent"]
        assert all(o.startswith(("file:", "data:", "about:")) for o in fetched), fetched
        page.open(f"file://{tmp_path}/cell.html")
        page.run("new Promise(done => setTimeout(done, 700))")
        assert page.problems() == []


@browser
def test_tokens_are_text_in_a_browser(explorer, tmp_path):
    class Bad:
        bos = 150
        def decode(self, ids): return "<img src=x onerror='document.title=1'>"
    bad = Explorer(list(explorer.sites.values()), explorer.model, Bad(), "</title><script>document.title = 2</script>")
    (tmp_path/"page.html").write_text(static_page(bad, [300], n=3, metrics=("cosine",), shadings=()), encoding="utf-8")
    with Browser() as page:
        page.open(f"file://{tmp_path}/page.html")
        page.wait("document.body.dataset.turn === '1'")
        assert count(page, "img") == 0 and "<img" in text(page, ".context .token")
        assert "script" in page.run("document.title") and page.problems() == []


def test_page_needs_nothing_else(explorer, server):
    status, page = ask(server, "/")
    assert status == 200
    assert "default-src 'none'" in page and "unsafe-eval" not in page and "src=" not in page.split("<script", 1)[0]
    assert chosen_rows(explorer, 3) == chosen_rows(explorer, 3)


def test_command_writes_a_file(run, tmp_path):
    file = tmp_path/"page.html"
    code, out, error = call("explore", run, "--static", file, "--queries", 1, "--text", "5 9 3 sep 5")
    assert code == 0 and out.startswith(f"{file}: 0."), error
    assert f"{file} exists: name another file, or pass --overwrite" in refused("explore", run, "--static", file)
    assert "holds no store/store.json" in refused("explore", tmp_path)
    assert "unknown model 'inductoin'" in refused("explore", run, "--model", "inductoin")


def test_command_serves_until_it_is_stopped(run):
    process = subprocess.Popen([sys.executable, "-m", "subspace_circuits.cli", "explore", run],
                               stdout=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) # else ignored
    try:
        address = process.stdout.readline().split()[0]
        assert address.startswith("http://127.0.0.1:")
        with urlopen(address) as reply: assert "What does a subspace see?" in reply.read().decode()
        assert f"port {address.rsplit(':', 1)[1]} cannot be used" in refused("explore", run, "--port",
                                                                             address.rsplit(":", 1)[1])
        process.send_signal(signal.SIGINT)
        assert process.wait(300) == 0
    finally: process.kill()


def test_command_replaces_an_index_of_another_partition(run, tmp_path):
    copy = tmp_path/"run"
    shutil.copytree(run, copy)
    job = ("explore", copy, "--static", tmp_path/"page.html", "--queries", 1, "--overwrite")
    assert call(*job)[0] == 0
    old = Partition.from_pretrained(copy/"partitions"/"x0.mid")
    Partition(dict(zip(old.names, old.basis.flip(1).split([20, 20, 24], 1))), old.site,
              old.mean).save_pretrained(copy/"partitions"/"x0.mid")
    assert "x0.mid is an index of another partition: it was made from" in refused(*job[:-1], "--static",
                                                                                  tmp_path/"other.html")
    assert call(*job)[0] == 0


def test_benchmark(tmp_path):
    code, out, error = call("benchmark", "preimages", "--quick", "--json", tmp_path/"figures.json")
    figures = json.loads((tmp_path/"figures.json").read_text())["figures"]
    assert code == 0 and len(out.splitlines()) == len(figures), error
    assert all(o["held"] for o in figures if o["what"].startswith(("recall", "static")))
    assert sum(o["what"].startswith("query p50") for o in figures) == 4
