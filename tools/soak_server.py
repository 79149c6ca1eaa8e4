"""Soak test of `lvlm serve`: many mixed requests from many clients; each answer is compared with `LVLM.generate`'s.

    python tools/soak_server.py --requests 2000 --clients 32

Requests mix methods, strengths, images, greedy and sampled answers, whole and streamed ones; 5 % of the clients
disconnect, 2 % of the requests are malformed, and 1 % are too large. The tool ends by itself. It reports lost or wrong
answers, programs compiled after the start, growth of memory, and losses after SIGTERM. Exit code 1 if there is a fault.
"""

import argparse
import base64
import http.client
import io
import json
import random
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from lvlm_jax import LVLM
from lvlm_jax.pocket import scenes

METHODS = ("none", "cmac", "cmac:alpha=1", "cmac:alpha=0.5,beta=0.1", "vcd:alpha=0.5")
# The answers to these questions are long and differ, so that swapped answers are noticed.
QUESTIONS = ("Please describe this image in detail.", "Describe this image.", "Is there a cup in the image?")
DECODINGS = ({}, {"temperature": 0.9, "top_p": 0.9, "seed": 7})
LIMIT = 24  # tokens


def pictures(count: int) -> list[str]:
    """Images of the pocket world as data URIs."""
    uris = []
    for number in range(count):
        file = io.BytesIO()
        Image.fromarray(scenes.render(scenes.scene_at("test", number))).save(file, "png")
        uris.append("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())
    return uris


class Server:
    """`lvlm serve` in its own process."""

    def __init__(self, *flags: str):
        words = [sys.executable, "-m", "lvlm_jax", "serve", "--port", "0", *flags]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.port = int(re.search(r":(\d+) answers", self.process.stdout.readline())[1])
        self.ready = self.process.stdout.readline().strip()
        self.errors: list[str] = []
        threading.Thread(target=lambda: self.errors.extend(self.process.stderr), daemon=True).start()

    def ask(self, body: bytes, leave: bool = False) -> tuple[int, str]:
        """Status and text of an answer, streamed or not. With `leave`, disconnects early and returns status 0."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        try:
            connection.request("POST", "/v1/chat/completions", body)
            if leave:
                time.sleep(random.random() / 2)
                return 0, ""
            response = connection.getresponse()
            content = response.read()
            if response.status != 200:
                return response.status, content.decode()
            if response.headers["content-type"] == "application/json":
                return 200, json.loads(content)["choices"][0]["message"]["content"]
            *events, end, empty = content.split(b"\n\n")
            if end != b"data: [DONE]" or empty:
                raise ConnectionError(f"a stream ends in {content[-60:]!r}")
            deltas = [choice["delta"] for event in events for choice in json.loads(event[6:]).get("choices", ())]
            return 200, "".join(delta.get("content", "") for delta in deltas)
        finally:
            connection.close()

    def metric(self, name: str) -> float:
        """The value of a metric of /metrics."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        return float(re.search(rf"^{name} (\S+)$", text, re.MULTILINE)[1])

    def memory(self) -> int:
        """The server's resident memory in MiB."""
        with open(f"/proc/{self.process.pid}/status") as file:
            return int(re.search(r"VmRSS:\s+(\d+)", file.read())[1]) // 1024


def main() -> int:
    """Runs the soak test, then a shorter one that is interrupted by SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--rows", type=int, default=8)
    flags = parser.parse_args()
    chance, uris = random.Random(0), pictures(4)
    kinds = [(method, question, uri, drawn) for method in METHODS for question in QUESTIONS for uri in uris
             for drawn in range(len(DECODINGS))]  # fmt: skip
    model, expected = LVLM.from_pretrained("pocket"), {}

    def messages(kind):
        image = {"type": "image_url", "image_url": {"url": kind[2]}}
        return [{"role": "user", "content": [image, {"type": "text", "text": kind[1]}]}]

    def body_of(kind, stream):
        words = {"model": "pocket", "messages": messages(kind), "max_tokens": LIMIT, "method": kind[0]}
        return words | {"stream": stream} | DECODINGS[kind[3]]

    for method in METHODS:
        for drawn, settings in enumerate(DECODINGS):
            own = [kind for kind in kinds if kind[0] == method and kind[3] == drawn]
            settings = settings | {"max_new_tokens": LIMIT, "seed": [settings.get("seed", 0)] * len(own)}
            texts = model.generate(list(map(messages, own)), method=method, **settings).text
            expected |= dict(zip(own, texts, strict=True))
    print(f"{len(set(expected.values()))} different answers to {len(kinds)} requests", flush=True)
    server = Server("--methods", "cmac,vcd", "--rows", str(flags.rows), "--max-tokens", "64", "--max-body", "1",
                    "--warm-text", "32", "--queue", "4096")  # fmt: skip
    print(server.ready, flush=True)
    counts, wrong, memory, lock = {}, [], [], threading.Lock()

    def one(number: int) -> None:
        kind, draw = chance.choice(kinds), chance.random()
        body = body_of(kind, chance.random() < 0.4)
        content = json.dumps(body).encode()
        what, good = "answered", 200
        if draw < 0.02:
            what, good = "malformed", (400, 422)
            content = chance.choice([content[:-9], b"[]", json.dumps(body | {"temperature": "x"}).encode()])
        elif draw < 0.03:
            what, good, content = "oversized", 413, b" " * (2 << 20)
        try:
            status, answer = server.ask(content, leave=0.03 <= draw < 0.08)
        except OSError:
            status, answer = (413 if what == "oversized" else -1), ""  # refused while it was still being sent
        with lock:
            what = "left" if status == 0 else what
            counts[what] = counts.get(what, 0) + 1
            if status and (status not in good if isinstance(good, tuple) else status != good):
                wrong.append(f"{what}: status {status} {answer}")
            elif what == "answered" and answer != expected[kind]:
                wrong.append(f"{kind[:2]}: {answer!r}, expected {expected[kind]!r}")
            if number % (flags.requests // 10) == 0:
                memory.append(server.memory())

    begun = time.monotonic()
    with ThreadPoolExecutor(flags.clients) as pool:
        list(pool.map(one, range(flags.requests)))
    seconds = time.monotonic() - begun
    compiles = int(server.metric("lvlm_compiles_after_ready"))
    print(f"{flags.requests} requests in {seconds:.0f} s: {counts}; {len(wrong)} wrong; {compiles} programs compiled; "
          f"MB by tenths: {memory}", flush=True)  # fmt: skip

    def last(number: int) -> int:
        kind = kinds[number % len(kinds)]
        try:
            status, answer = server.ask(json.dumps(body_of(kind, number % 3 == 0)).encode())
        except ConnectionRefusedError:
            return 0
        except OSError:
            return -1
        if status == 200 and answer != expected[kind]:
            wrong.append(f"{kind[:2]} after SIGTERM")
        return status

    with ThreadPoolExecutor(flags.clients) as pool:
        running = [pool.submit(last, number) for number in range(3 * flags.clients)]
        running[0].result()
        server.process.send_signal(signal.SIGTERM)
        ends = [request.result() for request in running]
    code = server.process.wait(120)
    statuses = {status: ends.count(status) for status in set(ends)}
    print(f"SIGTERM: exit code {code}; answers by status, 0 refused: {statuses}")
    print(*wrong[:5], *server.errors[:20], sep="\n")
    lost = statuses.get(-1, 0)
    return int(bool(wrong or compiles or code or server.errors or lost or memory[-1] > 1.05 * memory[len(memory) // 2]))


if __name__ == "__main__":
    sys.exit(main())
