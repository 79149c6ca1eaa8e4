"""Times `lvlm serve` and a server of thirty lines on transformers' `generate`: the same model, the same requests.

    python tools/bench_server.py --clients 1 8 32 --repeats 3

Needs torch. Prints characters a second and the time to the first token (median and 90th percentile of the requests),
each as the median, minimum and maximum of the measurements, and whether both servers gave the same answers. Caches of
images and prompts are off unless `--caches` is given, because the requests repeat the same images.
"""

import argparse
import http.client
import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from soak_server import Server, pictures

from lvlm_jax.processors.images import open_image
from lvlm_jax.weights.names import pocket_file


def plain_server() -> int:
    """Starts a server that streams transformers' `generate`, one request at a time. Returns its port."""
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration, TextIteratorStreamer

    folder = str(pocket_file("checkpoint"))
    processor = AutoProcessor.from_pretrained(folder)
    model, lock = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            image, text = body["messages"][0]["content"]
            messages = [{"role": "user", "content": [{"type": "image"}, text]}]
            prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
            inputs = processor(images=open_image(image["image_url"]["url"]), text=prompt, return_tensors="pt")
            self.send_response(200)
            self.end_headers()
            with lock:
                streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
                options = {"max_new_tokens": body["max_tokens"], "do_sample": False, "streamer": streamer}
                threading.Thread(target=lambda: model.generate(**inputs, **options)).start()
                for piece in streamer:
                    if piece:
                        self.wfile.write(
                            f"data: {json.dumps({'choices': [{'delta': {'content': piece}}]})}\n\n".encode()
                        )
                self.wfile.write(b"data: [DONE]\n\n")

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.server_port


def timed(port: int, clients: int, requests: int, uris: list[str]) -> tuple[float, float, float, list[str]]:
    """Characters per second, median and 90th percentile of the seconds to the first token, and the answers."""

    def one(number: int) -> tuple[float, str]:
        image = {"type": "image_url", "image_url": {"url": uris[number % len(uris)]}}
        words = {"type": "text", "text": "Please describe this image in detail."}
        body = {"model": "pocket", "messages": [{"role": "user", "content": [image, words]}], "max_tokens": 48,
                "stream": True}  # fmt: skip
        begun, first, text = time.monotonic(), None, ""
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        for line in connection.getresponse():
            if line.startswith(b"data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    if piece := choice["delta"].get("content"):
                        first = first or time.monotonic() - begun
                        text += piece
        return first, text

    begun = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        done = list(pool.map(one, range(requests)))
    seconds = time.monotonic() - begun
    firsts, texts = [first for first, _ in done], [text.strip() for _, text in done]
    middle, late = np.quantile(firsts, [0.5, 0.9])
    return sum(map(len, texts)) / seconds, middle, late, texts


def main() -> int:
    """Times both servers in turn, for each number of clients."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument(
        "--requests", type=int, default=32, help="per measurement; at least one per client (default 32)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each server and number of clients")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--caches", action="store_true", help="leave the server's caches on")
    flags = parser.parse_args()
    uris = pictures(8)
    caches = [] if flags.caches else ["--image-cache", "0", "--prefix-cache", "0"]
    server = Server("--rows", str(flags.rows), "--max-tokens", "64", "--warm-text", "32", *caches)
    print(server.ready)
    ports = {"generate": plain_server(), "lvlm serve": server.port}
    for port in ports.values():
        timed(port, 1, len(uris), uris)  # warms up
    same = True
    for clients in flags.clients:
        rates = {name: [] for name in ports}
        for _ in range(flags.repeats):
            for name, port in ports.items():
                rates[name].append(timed(port, clients, max(clients, flags.requests), uris))
            same = same and rates["generate"][-1][3] == rates["lvlm serve"][-1][3]
        for name, runs in rates.items():
            rate, middle, late = ([run[place] for run in runs] for place in range(3))
            print(f"{clients:3} clients  {name:10}  {spread(rate, 0)} characters/s  "
                  f"first token {spread(middle, 2)} s, 90 %: {spread(late, 2)} s", flush=True)  # fmt: skip
    print(f"answers of both servers equal: {same}; load {os.getloadavg()[0]:.1f}")
    server.process.terminate()
    return server.process.wait() or int(not same)


def spread(values: list[float], digits: int) -> str:
    """Median, minimum and maximum in words."""
    low, middle, high = (f"{value:.{digits}f}" for value in np.quantile(values, [0, 0.5, 1]))
    return f"{middle} ({low} to {high})"


if __name__ == "__main__":
    sys.exit(main())
