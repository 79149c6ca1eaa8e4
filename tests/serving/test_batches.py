"""Files and batches, which a restarted server resumes."""

import json
import time

import openai
import pytest

from tests.serving.conftest import running
from tests.serving.test_chat import asking


def lines(*bodies):
    rows = [
        {"custom_id": f"q{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        for number, body in enumerate(bodies)
    ]
    return "\n".join(map(json.dumps, rows)).encode()


BODIES = [{"model": "small", "messages": asking("Eh?", seed), "max_tokens": 6} for seed in range(4)]


def finished(client, batch):
    until = time.monotonic() + 100
    while (batch := client.batches.retrieve(batch.id)).status == "in_progress":
        assert time.monotonic() < until
        time.sleep(0.1)
    return batch


def test_a_batch_is_answered_and_goes_on_after_a_restart(model, tmp_path):
    expected = [model.generate(body["messages"], max_new_tokens=6).text[0] for body in BODIES]
    with running(model, state=tmp_path) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        wrong = {"model": "small", "messages": asking("a" * 90)}
        file = client.files.create(file=("in.jsonl", lines(*BODIES, wrong)), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
        batch = finished(client, batch)
        assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("completed", 4, 1)
        rows = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
        assert [row["custom_id"] for row in rows] == ["q0", "q1", "q2", "q3"]
        assert [row["response"]["body"]["choices"][0]["message"]["content"] for row in rows] == expected
        (error,) = map(json.loads, client.files.content(batch.error_file_id).text.splitlines())
        assert error["response"]["status_code"] == 400 and error["custom_id"] == "q4"
        with pytest.raises(openai.BadRequestError, match="line 1 is not a request"):
            bad = client.files.create(file=("in.jsonl", b'{"custom_id": 3}'), purpose="batch")
            client.batches.create(input_file_id=bad.id, endpoint="/v1/chat/completions", completion_window="24h")
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve("file-../../etc/passwd")
    # As a killed server leaves it: the batch under way, two answers in the log and half a line.
    log = tmp_path / f"{batch.id}.log"
    kept = b"".join(log.read_bytes().splitlines(keepends=True)[:3])
    log.write_bytes(kept + b'{"id": "ba')
    path = tmp_path / f"{batch.id}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "in_progress", "output_file_id": None}))
    with running(model, state=tmp_path) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        again = finished(client, batch)
        assert client.files.content(again.output_file_id).text.splitlines() and again.request_counts.completed == 4
        rows = [json.loads(line) for line in client.files.content(again.output_file_id).text.splitlines()]
        assert [row["response"]["body"]["choices"][0]["message"]["content"] for row in rows] == expected
        assert log.read_bytes().startswith(kept)
