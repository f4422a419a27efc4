"A headless browser, driven over a pipe, for measuring the explorer as a reader sees it."
import base64, json, os, shutil, subprocess, sys, time
from pathlib import Path
from tempfile import TemporaryDirectory


def find_browser()->str|None: # A command
    "Find a Chromium on this machine."
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    return next(filter(None, map(shutil.which, names)), None)


class Browser:
    "A page in a headless Chromium, as a context."
    def __init__(self,
                 width:int=1400, height:int=1000, # Of the window
    ): self.width, self.height = width, height

    def __enter__(self):
        self.folder = TemporaryDirectory(ignore_cleanup_errors=True) # its helpers may still be writing when it ends
        self.pipe = _Pipe(self.width, self.height, self.folder.name)
        self.send, self.events = self.pipe.send, self.pipe.events
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.pipe.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for o in ("Page", "Runtime", "Log", "Network"): self.send(f"{o}.enable")
        self.send("Emulation.setDeviceMetricsOverride", width=self.width, height=self.height, deviceScaleFactor=1,
                  mobile=False)
        return self

    def __exit__(self, *_):
        self.pipe.close()
        self.folder.cleanup()

    def run(self, script:str):
        "The value of an expression; a promise is waited for."
        o = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in o:
            raise ValueError(o["exceptionDetails"]["exception"].get("description", "the script failed"))
        return o["result"].get("value")

    def wait(self, script:str, seconds:float=300):
        "Wait until an expression is true."
        end = time.monotonic() + seconds
        while not self.run(script):
            if time.monotonic() > end: raise ValueError(f"{script} was not true within {seconds} s")
            time.sleep(.02)

    def open(self, address:str):
        "Load a page."
        self.send("Page.navigate", url=address)
        self.wait("document.readyState === 'complete'")

    def problems(self)->list[str]:
        "What the page complained about."
        said = [o["params"] for o in self.events if o.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")
                or (o.get("method") == "Runtime.consoleAPICalled"
                    and o["params"]["type"] in ("error", "warning", "assert"))]
        return [json.dumps(o)[:400] for o in said]

    def picture(self, file:str|Path, whole:bool=True):
        "Save a screenshot."
        Path(file).write_bytes(base64.b64decode(self.send("Page.captureScreenshot",
                                                          captureBeyondViewport=whole)["data"]))


class _Pipe:
    "A headless Chromium at the other end of a pipe: messages are JSON, a zero byte ends each."
    def __init__(self, width, height, folder):
        if not (found := find_browser()): raise ValueError("no browser: install chromium")
        (theirs, self.out), (into, ours) = os.pipe(), os.pipe()
        start = ("import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); "
                 "os.execvp(sys.argv[3], sys.argv[3:])")
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe",
                 f"--user-data-dir={folder}", f"--window-size={width},{height}", "about:blank"]
        self.process = subprocess.Popen([sys.executable, "-c", start, str(theirs), str(ours), found, *flags],
                                        pass_fds=(theirs, ours), stderr=subprocess.DEVNULL)
        os.close(theirs), os.close(ours)
        self.reader, self.session, self.count, self.events = os.fdopen(into, "rb"), None, 0, []

    def close(self):
        self.process.kill()
        self.process.wait()
        self.reader.close()
        os.close(self.out)

    def read(self):
        message = bytearray()
        while (o := self.reader.read(1)) != b"\0":
            if not o: raise ValueError("the browser has ended: start it again")
            message += o
        return json.loads(message)

    def send(self, method, **params):
        "Send a command and wait for its result; events on the way are kept."
        self.count += 1
        message = (dict(id=self.count, method=method, params=params)
                   | (dict(sessionId=self.session) if self.session else {}))
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while (o := self.read()).get("id") != self.count: self.events.append(o)
        if "error" in o: raise ValueError(f"{method}: {o['error']['message']}")
        return o["result"]
