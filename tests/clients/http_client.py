"""Python's http.client against the server: python3 http_client.py URL FAKE_URL. The key is in
RAMBAD_API_KEY. See check.mjs for the two URLs."""

import http.client
import json
import os
import re
import sys
import time
import urllib.parse

STREAM_TOKENS = 20
WAIT_SECONDS = int(os.environ.get("RAMBAD_WAIT_SECONDS", "60"))
HEADERS = {
    "authorization": "Bearer " + os.environ["RAMBAD_API_KEY"],
    "content-type": "application/json",
}


def connect(url):
    return http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=WAIT_SECONDS)


def call(connection, method, path, body=None):
    connection.request(method, path, None if body is None else json.dumps(body), HEADERS)
    answer = connection.getresponse()
    return answer, json.loads(answer.read())


def check_calls(url):
    """Several on one connection, an error among them."""
    connection = connect(url)
    body = {"prompt": "Once upon a time", "max_tokens": 4, "temperature": 0}
    answer, first = call(connection, "POST", "/v1/completions", body)
    assert answer.status == 200 and first["usage"]["completion_tokens"] <= 4, first
    answer, error = call(connection, "POST", "/v1/completions", {"prompt": 1})
    assert answer.status == 400 and error["error"]["param"] == "prompt", error
    assert answer.getheader("x-request-id")
    answer, again = call(connection, "POST", "/v1/completions", body)
    assert again["choices"] == first["choices"], again
    connection.close()


def check_upload(url):
    """Text of unknown length, in chunks, to a memory."""
    connection = connect(url)
    answer, memory = call(connection, "POST", "/v1/memories", {})
    assert answer.status == 201, memory
    lines = [f"{i}: the raven sat on the bust of Pallas\n".encode() for i in range(400)]
    path = f"/v1/memories/{memory['id']}/append"
    headers = dict(HEADERS, **{"content-type": "text/plain"})
    connection.request("POST", path, iter(lines), headers, encode_chunked=True)
    told = json.loads(connection.getresponse().read())
    assert told["text_bytes"] == sum(map(len, lines)), told
    answer, gone = call(connection, "DELETE", f"/v1/memories/{memory['id']}")
    assert answer.status == 200, gone
    connection.close()


def check_stream(url):
    """Each token is here before most of the others are made; it says itself when it was."""
    connection = connect(url)
    body = {"prompt": "x", "max_tokens": STREAM_TOKENS, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body), HEADERS)
    answer = connection.getresponse()
    assert answer.status == 200
    assert answer.getheader("content-type").startswith("text/event-stream")
    times, late, last = [], 0, b""
    while line := answer.readline():
        now = time.monotonic_ns()
        for index, made in re.findall(rb"(\d+) (\d{9,}) ", line):
            assert int(index) == len(times), line
            late = max(late, (now - int(made)) / 1e6)
            times.append(now)
        last = line.strip() or last
    assert last == b"data: [DONE]", last
    assert len(times) == STREAM_TOKENS, len(times)
    assert (times[-1] - times[0]) / 1e6 > 1200, "all came at once"
    assert late < 800, f"a token was {late} ms under way"
    connection.close()


if __name__ == "__main__":
    check_calls(sys.argv[1])
    check_upload(sys.argv[1])
    check_stream(sys.argv[2])
    print("  http_client.py: 3 checks")
