"""Opens a page in headless Chromium, over its debugging pipe: for a picture, and for the tests.

    python dev/browser.py out/report/report.html docs/img/report.png    # the picture in the README

It needs chromium (Debian: apt install chromium). Nothing else: no driver, no package.
"""
import base64
import json
import os
import re
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from hashlib import sha256
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from support.flags import InputError, Parser, positive_int, run_script

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


class Browser:
    """Talks to a headless Chromium in the protocol of its developer tools. events: all that the
    page reported, such as exceptions, console messages and requests. Use it in a with block."""

    def __enter__(self):
        """Starts Chromium, which reads commands from its file 3 and answers in its file 4, and
        opens an empty page."""
        self.folder = tempfile.mkdtemp(prefix="chromium-")
        (reads, self.commands), (self.answers, writes) = os.pipe(), os.pipe()
        flags = ["--headless", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu",
                 "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars",
                 f"--user-data-dir={self.folder}"]
        move = f'exec 103<&{reads} 104>&{writes}; exec "$@" 3<&103 4>&104'
        self.process = subprocess.Popen(
            ["bash", "-c", move, "bash", CHROMIUM, *flags], pass_fds=(reads, writes),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(reads)
        os.close(writes)
        self.number, self.unread, self.session, self.events = 0, b"", None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target,
                                 flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        os.close(self.commands)
        os.close(self.answers)
        shutil.rmtree(self.folder, ignore_errors=True)

    def read(self):
        """Returns the next message, an answer or an event, as a dict. RuntimeError if there is none
        for a minute."""
        while b"\0" not in self.unread:
            ready, _, _ = select.select([self.answers], [], [], 60)
            more = os.read(self.answers, 1 << 20) if ready else b""
            if not more:
                raise RuntimeError("chromium says nothing more")
            self.unread += more
        message, self.unread = self.unread.split(b"\0", 1)
        return json.loads(message)

    def call(self, method, **params):
        """Sends a command and returns its result. RuntimeError if it fails."""
        self.number += 1
        command = {"id": self.number, "method": method, "params": params}
        if self.session:
            command["sessionId"] = self.session
        os.write(self.commands, json.dumps(command).encode() + b"\0")
        while True:
            message = self.read()
            if message.get("id") == self.number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]
            self.events.append(message)

    def open(self, path, width=1160, height=900, scheme="light"):
        """Opens a file in a window of this size (in pixels of CSS). scheme: "light" or "dark"."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=width < 500)
        self.call("Emulation.setEmulatedMedia",
                  features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self.call("Page.navigate", url=Path(path).resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.read())

    def run(self, script):
        """Returns the value of an expression in JavaScript, or of the promise that it gives.
        RuntimeError if it throws."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True,
                           awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"]["exception"]["description"])
        return result["result"].get("value")

    def press(self, key):
        """Presses a key, such as "j" or "ArrowRight"."""
        text = {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def click(self, selector):
        """Clicks with the mouse on the middle of the first element that matches."""
        x, y = self.run(f"""(async () => {{
            const node = document.querySelector({json.dumps(selector)});
            node.scrollIntoView({{block: "center", inline: "center"}});
            for (const frame of [1, 2]) await new Promise(requestAnimationFrame);
            const box = node.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2];
        }})()""")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self, whole=False):
        """Returns a picture of the window, or of the whole page, the bytes of a PNG."""
        picture = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        return base64.b64decode(picture["data"])

    def complaints(self):
        """Returns what went wrong on the page: exceptions, console messages, and requests for
        anything but the page itself."""
        wrong = [event for event in self.events if event["method"] in
                 ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")]
        requests = [event for event in self.events
                    if event["method"] == "Network.requestWillBeSent"]
        return wrong + requests[1:]


def hash_template(path):
    """Returns a hash of a page without its numbers, by which a picture of an older page is told.
    path: support/report.html, or a page that was made from it."""
    text = re.sub(r'(?s)(<script type="application/json" id="data">).*?(?=</script>)',
                  r"\1{{data}}", Path(path).read_text(encoding="utf-8"))
    return sha256(text.encode()).hexdigest()


def with_note(png, note):
    """Returns a PNG with a comment in it, before its first chunk of pixels. note: ASCII text."""
    chunk = b"tEXtComment\0" + note.encode()
    chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    place = png.index(b"IDAT") - 4
    return png[:place] + chunk + png[place:]


def parse_flags(argv):
    parser = Parser(__doc__)
    parser.add_argument("page", help="an HTML file, such as out/report/report.html")
    parser.add_argument("picture", help="the PNG to write")
    parser.add_argument("--width", type=positive_int, default=980, help="of the window (980)")
    parser.add_argument("--height", type=positive_int, default=1000, help="of the window (1000)")
    parser.add_argument("--whole", action="store_true", help="all of the page, not one window")
    parser.add_argument("--dark", action="store_true", help="the dark colours")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_flags(argv)
    if CHROMIUM is None:
        raise InputError("chromium is not installed (Debian: apt install chromium)")
    with Browser() as browser:
        browser.open(args.page, args.width, args.height, "dark" if args.dark else "light")
        picture = browser.screenshot(args.whole)
    Path(args.picture).write_bytes(with_note(picture, hash_template(args.page)))
    print(f"{args.picture}: {len(picture) / 1000:.0f} kB")


if __name__ == "__main__":
    run_script(main)
