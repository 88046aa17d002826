"""A headless Chromium that is driven through its debugging pipe, where there is one."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from itertools import count

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 60  # seconds until an answer


def find_chromium():
    """The program that ``CHROMIUM`` names, or one on the path; ``None`` where there is none."""
    named = os.environ.get("CHROMIUM")
    return shutil.which(named) if named else next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One tab; messages are JSON, each ended by a zero byte, over the descriptors 3 and 4."""

    def __init__(self, program, profile):
        inward, self.write = os.pipe()
        self.read, outward = os.pipe()
        switches = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
                    f"--user-data-dir={profile}", "--no-first-run", "--disable-dev-shm-usage",
                    "--disable-background-networking", "--disable-component-update",
                    "--force-color-profile=srgb", "--hide-scrollbars"]  # fmt: skip
        # the shell puts the pipe's ends where Chromium looks for them, whatever their numbers are
        wiring = f'exec "$@" 3<&{inward} 4>&{outward}'
        self.process = subprocess.Popen(
            ["bash", "-c", wiring, "chromium", program, *switches, "about:blank"],
            pass_fds=(inward, outward), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(inward)
        os.close(outward)
        self.numbers, self.buffer, self.session = count(1), b"", None
        self.trouble = []  # what the console and the security policy say
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.requests = []

    def call(self, method, **params):
        """The result of one command of the protocol."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _next(self):
        while b"\0" not in self.buffer:
            assert select.select([self.read], [], [], PATIENCE)[0], "Chromium does not answer"
            part = os.read(self.read, 1 << 16)
            assert part, "Chromium has ended"
            self.buffer += part
        text, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(text)
        method, params = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.trouble.append(params["exceptionDetails"]["exception"].get("description"))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.trouble.append(params["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.trouble.append(str(params["args"]))
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        return message

    def open(self, path, *, width=1280, height=900, dark=False, still=True, script=True):
        """Load a file in a window of that size."""
        self.trouble.clear()
        self.requests.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=False)  # fmt: skip
        features = {"prefers-color-scheme": "dark" if dark else "light",
                    "prefers-reduced-motion": "reduce" if still else "no-preference"}  # fmt: skip
        self.call("Emulation.setEmulatedMedia",
                  features=[{"name": k, "value": v} for k, v in features.items()])  # fmt: skip
        self.call("Emulation.setScriptExecutionDisabled", value=not script)
        self.call("Page.navigate", url=path.as_uri())
        ready = "document.documentElement.dataset.ready === '1'" if script else "true"
        loaded = "document.readyState === 'complete' && location.protocol === 'file:'"
        self.until(f"{loaded} && {ready}")

    def eval(self, code):
        """The JSON value of an expression in the page, of a promise what it becomes."""
        done = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def until(self, code):
        """Wait for an expression to become true."""
        end = time.monotonic() + PATIENCE
        while not self.eval(code):
            assert time.monotonic() < end, (code, self.trouble)

    def press(self, *keys):
        """Press and release keys by their names."""
        for key in keys:
            codes = {"Enter": 13, "Tab": 9, " ": 32}
            extra = {"text": "\r" if key == "Enter" else key} if key in ("Enter", " ") else {}
            for kind in ("keyDown", "keyUp"):
                self.call("Input.dispatchKeyEvent", type=kind, key=key,
                          windowsVirtualKeyCode=codes.get(key, 0), **extra)  # fmt: skip

    def screenshot(self, *, whole=False):
        """The page as PNG."""
        options = {"captureBeyondViewport": whole}
        if whole:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            width, height = size["width"], size["height"]
            options["clip"] = {"x": 0, "y": 0, "scale": 1, "width": width, "height": height}
        return base64.b64decode(self.call("Page.captureScreenshot", **options)["data"])

    def close(self):
        """End it."""
        try:
            self.session = None
            self.call("Browser.close")
        except (AssertionError, OSError):
            self.process.kill()
        self.process.wait(PATIENCE)
        os.close(self.write)
        os.close(self.read)
