// What the checks of the clients share: where the server is, and a loud end.
//   node FILE URL FAKE_URL METRICS_URL: the server, one with the fake engine (tests/bench/fake),
// both maybe behind a proxy; and the server itself, for its metrics. The key is in RAMBAD_API_KEY.
import assert from 'node:assert/strict';

export const [url, fakeUrl, metricsUrl] = process.argv.slice(2);
export const key = process.env.RAMBAD_API_KEY;
const checks = [];

// Names a check; they run one after the other, in the order of their names' appearance.
export function check(name, body) {
    checks.push({ name, body });
}

export async function run() {
    const only = process.env.RAMBAD_TEST;
    for (const { name, body } of checks) {
        if (only && !name.includes(only)) continue;
        try {
            await body();
        } catch (error) {
            console.error(`${name}: ${error.stack}`);
            process.exitCode = 1;
        }
    }
    console.log(`  ${process.argv[1].split('/').pop()}: ${checks.length} checks`);
}

// A sample of /metrics; 0 when it is not there.
export async function metric(name) {
    const answer = await fetch(`${metricsUrl}/metrics`, {
        headers: { authorization: `Bearer ${key}` },
    });
    const text = await answer.text();
    const line = text.split('\n').find((l) => l.startsWith(`${name} `));
    return line ? Number(line.slice(name.length + 1)) : 0;
}

export async function until(what, condition) {
    for (let i = 0; i < 500; i++) {
        if (await condition()) return;
        await new Promise((done) => setTimeout(done, 20));
    }
    assert.fail(`never: ${what}`);
}

// The tokens of a stream of the fake engine say which they are and when they were made: none is
// missing, and none was held back by anything on its way until others followed.
export class Arrivals {
    tokens = 0;
    late = 0;
    take(text) {
        const now = process.hrtime.bigint();
        for (const [, index, made] of text.matchAll(/(\d+) (\d+) /g)) {
            assert.equal(Number(index), this.tokens++);
            this.late = Math.max(this.late, Number(now - BigInt(made)) / 1e6);
            this.first ??= now;
            this.last = now;
        }
    }
    // Each came while the next were not even made. A busy machine may be slow; a buffer waits for
    // the end, which is most of the two seconds away.
    finish(count) {
        assert.equal(this.tokens, count);
        const span = Number(this.last - this.first) / 1e6;
        assert.ok(span > 1200, `all came within ${span} ms`);
        assert.ok(this.late < 800, `a token was ${this.late} ms under way`);
    }
}
export const streamTokens = 20; // two seconds of them at the fake engine's rate of ten
