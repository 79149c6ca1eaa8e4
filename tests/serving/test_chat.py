"""Chat completions over HTTP: answers are those of `LVLM.generate`, errors are OpenAI's."""

import base64
import io
import json
import re
import shutil
import socket
import subprocess
import time

import numpy as np
import openai
import pytest
from PIL import Image

from lvlm_jax import methods
from lvlm_jax.processors import text
from lvlm_jax.serving.replies import DONE, Pieces, Reply, event
from lvlm_jax.serving.work import Update
from tests.serving.conftest import running


def uri(seed, size=28, kind="png"):
    """A random picture as a data URI."""
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def asking(text, *seeds):
    """OpenAI's messages: pictures, then a text."""
    pictures = [{"type": "image_url", "image_url": {"url": uri(seed)}} for seed in seeds]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


SAMPLED = {"temperature": 0.9, "top_p": 0.9, "seed": 3}
ASKED = [  # messages, the request's extras, the method they mean
    (asking("Eh?", 1), {}, None),
    (asking("Eh?", 1), {"extra_body": {"method": "cmac", "method_settings": {"alpha": 1.0}}}, methods.CMAC(alpha=1.0)),
    (asking("Oh", 2), {"model": "small+cmac:alpha=2"}, methods.CMAC(alpha=2.0)),
    (asking("Oh", 2), {"model": "strong"}, methods.CMAC(alpha=5.0)),
    (asking("Ah", 1, 2), {"extra_body": {"top_k": 30, "repetition_penalty": 1.3}, **SAMPLED}, None),
    (asking("No picture"), {}, None),
]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_answers_are_those_of_generate(server, client, model, stream):
    for messages, extras, method in ASKED:
        extras = {"model": "small", "max_tokens": 12} | extras
        settings = {name: extras[name] for name in SAMPLED if name in extras} | extras.get("extra_body", {})
        settings = {name: value for name, value in settings.items() if not name.startswith("method")}
        expected = model.generate(messages, method=method, max_new_tokens=12, **settings)
        if stream:
            chunks = list(client.chat.completions.create(
                messages=messages, stream=True, stream_options={"include_usage": True}, **extras))  # fmt: skip
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            usage, reasons = chunks[-1].usage, [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
            assert chunks[0].choices[0].delta.role == "assistant" and not chunks[-1].choices
            assert [reason for reason in reasons if reason] == expected.finish_reason
        else:
            answer = client.chat.completions.create(messages=messages, logprobs=True, top_logprobs=2, **extras)
            text, usage = answer.choices[0].message.content, answer.usage
            shown = answer.choices[0].logprobs.content
            np.testing.assert_allclose([one.logprob for one in shown], expected.logprobs[0], atol=1e-4)
            for one in shown:
                likely = [other.logprob for other in one.top_logprobs]  # not the tokens that the method rules out
                assert likely == sorted(likely, reverse=True) and one.logprob <= likely[0] + 1e-6
            assert answer.choices[0].finish_reason == expected.finish_reason[0]
        assert text == expected.text[0]
        assert usage.completion_tokens == len(expected.tokens[0])
        assert usage.prompt_tokens == int(model.prepare(messages).lengths[0])


def test_several_choices_have_seeds_of_their_own_and_stop_strings_stop(server, client, model):
    messages = asking("Eh?", 1)
    answer = client.chat.completions.create(model="small", messages=messages, max_tokens=12, n=3, **SAMPLED)
    expected = [model.generate(messages, max_new_tokens=12, **SAMPLED | {"seed": 3 + more}) for more in range(3)]
    assert [choice.message.content for choice in answer.choices] == [one.text[0] for one in expected]
    assert answer.lvlm == {"method": None, "seed": 3}
    whole = model.generate(messages, max_new_tokens=12).text[0]
    stop = whole[4:6]
    cut = model.generate(messages, max_new_tokens=12, stop=stop)
    answer = client.chat.completions.create(model="small", messages=messages, max_tokens=12, stop=stop)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (cut.text[0], "stop")
    assert answer.usage.completion_tokens == len(cut.tokens[0])


def test_nothing_is_compiled_for_other_strengths_seeds_images_and_questions(server):
    def ask(alpha, seed, text, picture):
        body = {"model": "small", "messages": asking(text, picture), "max_tokens": 6, "seed": seed, "temperature": 0.5,
                "method": "cmac", "method_settings": {"alpha": alpha}, "top_p": 0.9}  # fmt: skip
        status, _, answer = server.post(body)
        assert status == 200
        return answer["choices"][0]["message"]["content"]

    ask(1.0, 0, "Eh?", 1)
    before, hits = server.service.compiles.total, server.service.engine.prefill.prefixes.hits
    said = {ask(*given) for given in [(2.0, 1, "Oh", 1), (0.5, 2, "Who", 7), (9.0, 3, "Eh", 8)]}
    assert server.service.compiles.total == before and len(said) == 3
    assert server.service.engine.prefill.prefixes.hits == hits + 1  # the picture that was there before


def golden(head, pieces, reason, prompt, written, extra):
    """The bytes of a stream with usage: role, content, finish, usage, the end."""

    def choice(delta, reason):
        return f'"choices":[{{"index":0,"delta":{delta},"logprobs":null,"finish_reason":{reason}}}]'

    lines = [
        choice('{"role":"assistant","content":""}', "null"),
        *(choice(f'{{"content":{json.dumps(piece, ensure_ascii=False)}}}', "null") for piece in pieces),
        choice("{}", f'"{reason}"'),
        f'"choices":[],"usage":{{"prompt_tokens":{prompt},"completion_tokens":{written},'
        f'"total_tokens":{prompt + written}}},"lvlm":{extra}',
    ]
    return ("".join(f"data: {{{head},{line}}}\n\n" for line in lines) + "data: [DONE]\n\n").encode()


def test_golden_bytes_of_a_stream(model):
    reply = Reply("chatcmpl-1", 7, "small", 20, model.processor.tokenizer, None, {"method": "CMAC", "seed": 0})
    pieces = Pieces(reply, 0, ["END"])
    updates = [Update("Hé E", [1, 2], [0.0, 0.0], None, None, None), Update("Hé", [1], [0.0], None, None, "stop")]
    chunks = [pieces.first(), *(chunk for said in updates for chunk in pieces.chunks(said)), reply.last(updates[1:])]
    head = '"id":"chatcmpl-1","object":"chat.completion.chunk","created":7,"model":"small"'
    expected = golden(head, ["Hé "], "stop", 20, 1, '{"method":"CMAC","seed":0}')
    assert b"".join(map(event, chunks)) + DONE == expected


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_curl(server, model):
    def curl(body):
        words = ["curl", "-sN", f"{server.url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", "@-"]
        return subprocess.run(words, input=json.dumps(body).encode(), capture_output=True, check=True).stdout

    body = {"model": "small+cmac:alpha=2", "messages": asking("Oh", 2), "max_tokens": 12, "seed": 4}
    expected = model.generate(body["messages"], methods.CMAC(alpha=2.0), max_new_tokens=12)
    assert json.loads(curl(body))["choices"][0]["message"]["content"] == expected.text[0]
    found = curl(body | {"stream": True, "stream_options": {"include_usage": True}})
    head = re.match(rb'data: \{("id":"chatcmpl-\w{24}","object":"chat.completion.chunk","created":\d{10},'
                    rb'"model":"small\+cmac:alpha=2"),"choices"', found)[1].decode()  # fmt: skip
    chunks = [json.loads(line[6:])["choices"] for line in found.split(b"\n\n")[1:-4]]
    pieces = [chunk[0]["delta"]["content"] for chunk in chunks]
    assert "".join(pieces) == expected.text[0] and len(pieces) > 1
    counts = int(model.prepare(body["messages"]).lengths[0]), len(expected.tokens[0])
    assert found == golden(head, pieces, expected.finish_reason[0], *counts, '{"method":"CMAC","seed":4}')


GOOD = {"model": "small", "messages": asking("Eh?")}
LARGE = Image.new("RGB", (7000, 7000))


def png(image):
    file = io.BytesIO()
    image.save(file, "png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def picture(url):
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        (b"{", 400, "the body is not JSON"),
        ([], 422, "expected an object"),
        ({"messages": []}, 422, "messages: "),
        ({"temperature": "1"}, 422, "temperature"),
        ({"temperature": -1}, 400, "temperature is -1; expected 0, or a number"),
        ({"max_tokens": 0}, 400, "max_new_tokens is 0"),
        ({"temperature": float("nan")}, 400, "temperature is nan"),
        ({"stop": [""]}, 400, "stop"),
        ({"messages": asking("\ud800")}, 400, ""),
        ({"n": 9}, 400, "n is 9; expected 1 to 4"),
        ({"stop": ["a"] * 5}, 400, "stop has 5 strings"),
        ({"top_logprobs": 3}, 400, "beside logprobs: true"),
        ({"model": "large"}, 404, "there is no model 'large' here; expected one of small, strong"),
        ({"model": "small+nothing"}, 400, "there is no method 'nothing'"),
        ({"model": "small+os:system"}, 400, "names code or a file"),
        ({"method": "./evil.py:Evil"}, 400, "names code or a file"),
        ({"method": "vti:lambda=1,fitted=/etc/passwd"}, 400, "fitted names a file"),
        ({"method": "learned:/etc/passwd"}, 400, "learned names a file"),
        ({"method": "vti", "method_settings": {"vti_fitted": "a"}}, 400, "fitted names a file"),
        ({"method": "cmac", "method_settings": {"alpha": -2}}, 400, "alpha is -2.0; expected a number >= 0"),
        ({"method": "cmac", "method_settings": {"gain": 2}}, 400, "gain is not a setting"),
        ({"method": "opera", "stream": True}, 400, "OPERA is a search"),
        ({"tools": [{}]}, 400, "tools are not supported"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "role is 'tool'"),
        ({"messages": asking("<image>")}, 400, "image placeholders"),
        ({"messages": asking("a" * 90)}, 400, "the model's context is 96"),
        (picture("/etc/passwd"), 400, "expected data:image/png"),
        (picture("file:///etc/passwd"), 400, "expected data:image/png"),
        (picture("http://127.0.0.1/a.png"), 400, "are not downloaded"),
        (picture("data:image/png;base64,####"), 400, "not base64"),
        (picture("data:image/png;base64,AAAA"), 400, "is none of PNG, JPEG"),
        (picture(png(LARGE)), 413, "7000 x 7000 pixels; the limit is 40 million"),
        ({"messages": asking("a" * 2_000_000)}, 413, "the body has more than 1 MiB"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors(server, change, status, words):
    body = change if isinstance(change, bytes | list) else GOOD | change
    found, _, answer = server.post(body)
    assert found == status, answer
    error = answer["error"]
    assert words in error["message"] and len(error["message"]) <= 300 and "Traceback" not in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_unknown_fields_and_cut_limits_are_told_in_a_header(server):
    status, headers, answer = server.post(GOOD | {"max_tokens": 900, "logit_bias": {}, "user": "me", "é\r\nA: b": 1})
    assert status == 200 and answer["usage"]["completion_tokens"] == 24
    assert headers["X-LVLM-Ignored"] == "logit_bias, ???A: b, max_tokens>24" and "A" not in headers


def test_a_client_that_leaves_frees_its_rows(server):
    body = json.dumps(GOOD | {"n": 4, "max_tokens": 24, "temperature": 1.0, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head + body)
            connection.recv(100)
    engine, until = server.service.engine, time.monotonic() + 20
    while engine.under_way or engine.waiting:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert server.post(GOOD)[0] == 200


def test_keys_queues_and_times(model):
    with running(model, key="secret", names=["127.0.0.1"], queue=1, rows=1, timeout=0.3) as server:
        for headers in ({"Host": "evil.example:80"}, {"Sec-Fetch-Site": "cross-site"}):
            status, _, answer = server.post(GOOD, Authorization="Bearer secret", **headers)
            assert status == 403 and answer["error"]["type"] == "permission_error"
        assert server.post(GOOD)[0] == 401 and server.post(GOOD, Authorization="Bearer secre")[0] == 401
        assert server.request("GET", "/health")[0] == 200
        key = {"Authorization": "Bearer secret"}
        status, headers, answer = server.post(GOOD | {"n": 3}, **key)
        assert status == 429 and int(headers["Retry-After"]) >= 1 and "already waiting" in answer["error"]["message"]
        engine = server.service.engine
        for body in (GOOD, GOOD | {"method": "opera"}):
            engine.call(lambda: time.sleep(1.0))  # a busy device
            status, headers, answer = server.post(body, **key)
            assert status == 503 and headers["Retry-After"] and "no answer within 0.3 s" in answer["error"]["message"]


def test_the_other_paths(server):
    assert [server.request("GET", path)[0] for path in ("/health", "/version", "/nothing", "/v1/models/none")] == [
        200, 200, 404, 404,
    ]  # fmt: skip
    assert server.request("GET", "/ready")[0] == 503  # nothing was warmed up
    names = [one["id"] for one in server.request("GET", "/v1/models")[2]["data"]]
    assert names[:2] == ["small", "strong"] and "small+cmac" in names
    cmac = next(one for one in server.request("GET", "/v1/methods")[2]["data"] if one["id"] == "cmac")
    assert {"name": "alpha", "kind": "strength", "default": 3.0, "low": 0.0, "high": None}.items() <= (
        cmac["settings"][0].items()
    )
    text = server.request("GET", "/metrics")[2].decode()
    assert 'lvlm_answers_total{method="CMAC",reason="length"}' in text and "lvlm_compiles_after_ready" in text
    _, headers, page = server.request("GET", "/")
    assert "default-src 'none'" in headers["Content-Security-Policy"] and b"Ask small" in page


@pytest.mark.slow
def test_an_answer_links_to_its_attention(server, model):
    body = {"model": "small+cmac", "messages": asking("Eh?", 1, 2), "max_tokens": 24, "lvlm": {"attention": True}}
    answer = server.post(body)[2]
    link = answer["lvlm"]["attention"]
    status, _, maps = server.request("GET", f"{link}/maps")
    assert status == 200 and maps["words"] and maps["text"] == answer["choices"][0]["message"]["content"]
    assert maps["grids"] == [[4, 4], [4, 4]] and maps["regions"] == [[0, 0, 1, 1]] * 2  # of each picture
    scales, cells = (
        np.frombuffer(base64.b64decode(maps[name]), kind) for name, kind in (("scales", "<f4"), ("maps", "u1"))
    )
    (said,) = model.generate(body["messages"], "cmac", max_new_tokens=24).tokens
    (weights,) = model.attention(model.prepare(body["messages"]), [said], methods.CMAC())
    tokens = weights.mean((0, 2))  # of each token of the answer, over both pictures
    ends = np.asarray([len(text.decode(model.processor.tokenizer, said[: place + 1])) for place in range(len(said))])
    for (_, start, end), scale, row in zip(maps["words"], scales, cells.reshape(-1, 32), strict=True):
        own = (ends > start) & (np.append(0, ends[:-1]) < end)
        np.testing.assert_allclose(scale * (row / 255) ** 2, tokens[own].mean(0), atol=0.01 * scale)
    status, _, page = server.request("GET", link)
    assert status == 400 and "use a deeper model" in page["error"]["message"]  # than two layers
    assert server.request("GET", "/attention/nothing")[0] == 404
    answer = server.post({"model": "small", "messages": asking("Eh?"), "max_tokens": 6, "lvlm": {"attention": True}})[2]
    status, _, error = server.request("GET", answer["lvlm"]["attention"])
    assert status == 400 and error["error"]["code"] == "no_images"


@pytest.mark.slow
def test_searches_run_alone(server, model):
    expected = model.generate(asking("Eh?", 1), "opera", max_new_tokens=6)
    answer = server.post({"model": "small+opera", "messages": asking("Eh?", 1), "max_tokens": 6})[2]
    assert answer["choices"][0]["message"]["content"] == expected.text[0]
