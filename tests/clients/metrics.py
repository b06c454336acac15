"""What /metrics says, through Prometheus' own parser: python3 metrics.py URL. The key is in
RAMBAD_API_KEY. Scrapes, asks for some work, and scrapes again: every family is typed and described,
counters only grow, histograms add up, and the work is in them."""

import http.client
import json
import os
import sys
import urllib.parse

from prometheus_client.parser import text_string_to_metric_families

HEADERS = {"authorization": "Bearer " + os.environ["RAMBAD_API_KEY"]}
WAIT_SECONDS = int(os.environ.get("RAMBAD_WAIT_SECONDS", "60"))
NETLOC = urllib.parse.urlsplit(sys.argv[1]).netloc
# What the API's description promises to operators; each a family, or a part of its name.
PROMISED = """requests prompt_tokens completion_tokens jobs_running jobs_waiting queue_seconds
    prefill_seconds first_token_seconds per_token_seconds token_gap_seconds request_seconds
    pages_resident page_read_bytes page_read_seconds commit_seconds resumes forks
    page_evictions map_used_bytes pages_capacity page_hits page_misses sessions_idle_bytes connections
    disconnects""".split()


def call(method, path, body=None, kind="application/json"):
    connection = http.client.HTTPConnection(NETLOC, timeout=WAIT_SECONDS)
    connection.request(method, path, body, dict(HEADERS, **{"content-type": kind}))
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    assert answer.status < 300, text
    return answer, text


def check_histogram(family):
    """Buckets are cumulative, and the last one is the count; for each set of labels."""
    series = {}
    for sample in family.samples:
        labels = tuple(sorted((k, v) for k, v in sample.labels.items() if k != "le"))
        part = series.setdefault(labels, {"buckets": []})
        if sample.name.endswith("_bucket"):
            part["buckets"].append((float(sample.labels["le"]), sample.value))
        else:
            part[sample.name.rsplit("_", 1)[1]] = sample.value
    assert series, family.name
    for part in series.values():
        limits, counts = zip(*part["buckets"])
        assert list(limits) == sorted(limits) and limits[-1] == float("inf"), family.name
        assert list(counts) == sorted(counts) and counts[-1] == part["count"], family.name
        assert part["sum"] >= 0, family.name


def scrape():
    answer, text = call("GET", "/metrics")
    assert answer.getheader("content-type").startswith("text/plain; version=0.0.4")
    counters, families = {}, {}
    for family in text_string_to_metric_families(text):
        assert family.name.startswith("rambad_") and family.name not in families, family.name
        assert family.type in ("counter", "gauge", "histogram"), family.name
        assert family.documentation.endswith("."), family.name
        assert family.samples or family.name == "rambad_requests", family.name
        families[family.name] = family
        if family.type == "histogram":
            check_histogram(family)
        for sample in family.samples:
            assert sample.value >= 0, sample
            if family.type == "counter":
                assert sample.name.endswith("_total"), sample
            if family.type != "gauge":
                key = (sample.name, tuple(sorted(sample.labels.items())))
                assert key not in counters, key
                counters[key] = sample.value
    for name in PROMISED:
        assert "rambad_" + name in families, name
    return counters


def grown(before, after, name, **labels):
    key = (name, tuple(sorted(labels.items())))
    return after[key] - before.get(key, 0)


def main():
    before = scrape()
    memory = json.loads(call("POST", "/v1/memories", "{}")[1])["id"]
    call("POST", f"/v1/memories/{memory}/append", "a raven " * 500, "text/plain")
    fork = json.loads(call("POST", "/v1/memories", json.dumps({"from": memory}))[1])["id"]
    body = {"prompt": "Where is it?", "memory": fork, "max_tokens": 7, "ignore_eos": True}
    for stream in (False, True):
        call("POST", "/v1/completions", json.dumps(dict(body, stream=stream)))
    after = scrape()
    for key, value in before.items():
        assert after[key] >= value, key
    assert grown(before, after, "rambad_completion_tokens_total") == 14
    assert grown(before, after, "rambad_appended_bytes_total") == 4000
    assert grown(before, after, "rambad_forks_total") == 1
    assert grown(before, after, "rambad_requests_total", handler="completions", status="200") == 2
    assert grown(before, after, "rambad_requests_total", handler="append", status="200") == 1
    rounded = {"state": "rounded"}  # the append's turn and two of the fork
    assert grown(before, after, "rambad_snapshots_total", **rounded) == 3
    assert grown(before, after, "rambad_snapshot_bytes_total", **rounded) > 0
    tiers = {}
    for tier in ("device", "host", "disk"):
        tiers[tier] = after["rambad_page_hits_total", (("tier", tier),)]
    assert tiers["host"] + tiers["disk"] > 0, tiers
    assert tiers["disk"] == after["rambad_page_misses_total", (("tier", "host"),)]
    for name in ("bytes", "seconds"):
        value = after[f"rambad_page_read_{name}_total", (("tier", "disk"),)]
        assert (value > 0) == (tiers["disk"] > 0), (name, value, tiers)
    for name in ("first_token", "per_token", "request"):
        assert grown(before, after, f"rambad_{name}_seconds_count") == 2, name
    print(f"  metrics.py: {len(after)} samples of counters and histograms")


if __name__ == "__main__":
    main()
