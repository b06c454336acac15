// The official openai package, unmodified, against the server: see check.mjs.
import assert from 'node:assert/strict';
import OpenAI from 'openai';
import { Arrivals, check, fakeUrl, key, metric, metricsUrl, run, streamTokens, until, url } from './check.mjs';

const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0 });
const fake = new OpenAI({ baseURL: `${fakeUrl}/v1`, apiKey: key, maxRetries: 0 });
const model = (await client.models.list()).data[0].id;
const messages = [
    { role: 'system', content: 'You answer questions about what you were told.' },
    { role: 'user', content: "The secret code of Ada's locker is 7318042." },
    { role: 'assistant', content: 'I will remember.' },
    { role: 'user', content: "What is the secret code of Ada's locker?" },
];

check('models', async () => {
    const got = await client.models.retrieve(model);
    assert.equal(got.id, model);
    assert.equal(got.object, 'model');
    await assert.rejects(client.models.retrieve('gpt-4'), OpenAI.NotFoundError);
});

check('chat', async () => {
    const answer = await client.chat.completions.create({
        model, messages, temperature: 0, max_completion_tokens: 24, seed: 7 });
    assert.match(answer.id, /^chatcmpl-/);
    assert.equal(answer.object, 'chat.completion');
    assert.equal(answer.choices.length, 1);
    assert.equal(answer.choices[0].message.role, 'assistant');
    assert.equal(typeof answer.choices[0].message.content, 'string');
    assert.ok(['stop', 'length'].includes(answer.choices[0].finish_reason));
    assert.equal(answer.usage.total_tokens,
        answer.usage.prompt_tokens + answer.usage.completion_tokens);
    assert.ok(answer._request_id);
    assert.ok(answer.system_fingerprint);
});

check('chat, streamed', async () => {
    const body = { model, messages, temperature: 0, max_tokens: 24, seed: 7 };
    const whole = await client.chat.completions.create(body);
    const stream = await client.chat.completions.create({
        ...body, stream: true, stream_options: { include_usage: true } });
    let text = '', role, reason, usage, ids = new Set();
    for await (const chunk of stream) {
        ids.add(`${chunk.id} ${chunk.created}`);
        if (chunk.usage) usage = chunk.usage;
        if (!chunk.choices.length) continue;
        role ??= chunk.choices[0].delta.role;
        text += chunk.choices[0].delta.content ?? '';
        reason = chunk.choices[0].finish_reason ?? reason;
    }
    assert.equal(ids.size, 1);
    assert.equal(role, 'assistant');
    assert.equal(text, whole.choices[0].message.content);
    assert.equal(reason, whole.choices[0].finish_reason);
    assert.equal(usage.completion_tokens, whole.usage.completion_tokens);
    assert.equal(usage.prompt_tokens, whole.usage.prompt_tokens);
});

check('chat, the runner with events', async () => {
    const runner = client.chat.completions.stream({ model, messages, temperature: 0, max_tokens: 8 });
    let deltas = '';
    runner.on('content', (delta) => (deltas += delta));
    const last = await runner.finalChatCompletion();
    assert.equal(deltas, last.choices[0].message.content);
});

check('chat, several choices with log probabilities', async () => {
    const answer = await client.chat.completions.create({
        model, messages, max_tokens: 5, n: 2, seed: 1, logprobs: true, top_logprobs: 3 });
    assert.deepEqual(answer.choices.map((c) => c.index), [0, 1]);
    for (const choice of answer.choices)
        for (const token of choice.logprobs.content) {
            assert.ok(token.logprob <= 0);
            assert.equal(token.top_logprobs.length, 3);
        }
});

check('completions', async () => {
    const body = { model, prompt: ['Once upon a time', 'The raven'], max_tokens: 6, temperature: 0 };
    const answer = await client.completions.create({ ...body, logprobs: 2, echo: true });
    assert.equal(answer.object, 'text_completion');
    assert.equal(answer.choices.length, 2);
    assert.ok(answer.choices[0].text.startsWith('Once upon a time'));
    assert.equal(answer.choices[0].logprobs.token_logprobs[0], null);
    const plain = await client.completions.create(body);
    const texts = ['', ''];
    for await (const chunk of await client.completions.create({ ...body, stream: true }))
        texts[chunk.choices[0].index] += chunk.choices[0].text;
    assert.deepEqual(texts, plain.choices.map((c) => c.text));
});

check('tokens come one by one', async () => {
    const stream = await fake.completions.create({
        model, prompt: 'x', max_tokens: streamTokens, stream: true });
    const arrivals = new Arrivals();
    for await (const chunk of stream) arrivals.take(chunk.choices[0].text);
    arrivals.finish(streamTokens);
});

check('abort', async () => {
    const before = await metric('rambad_disconnects_total');
    const stream = await client.chat.completions.create({
        model, messages, max_tokens: 1000000, ignore_eos: true, stream: true });
    let chunks = 0;
    for await (const chunk of stream) if (chunk.choices[0] && ++chunks === 3) break;
    assert.ok(stream.controller.signal.aborted);
    await until('the stream is over', async () => await metric('rambad_jobs_running') === 0);
    const controller = new AbortController();
    const call = client.completions.create(
        { model, prompt: 'x', max_tokens: 1000000, ignore_eos: true }, { signal: controller.signal });
    await until('the request runs', async () => await metric('rambad_jobs_running') > 0);
    controller.abort();
    await assert.rejects(call, OpenAI.APIUserAbortError);
    await until('the other is over', async () => await metric('rambad_jobs_running') === 0);
    assert.equal(await metric('rambad_disconnects_total'), before + 2);
});

check('errors', async () => {
    const wrong = new OpenAI({ baseURL: `${url}/v1`, apiKey: 'wrong', maxRetries: 0 });
    await assert.rejects(wrong.models.list(), OpenAI.AuthenticationError);
    await assert.rejects(client.chat.completions.create({ model: 'gpt-4', messages }),
        (e) => e instanceof OpenAI.NotFoundError && e.param === 'model' && e.code === 'not_found');
    await assert.rejects(client.chat.completions.create({ model, messages, temperature: 9 }),
        (e) => e instanceof OpenAI.BadRequestError && e.param === 'temperature' && !!e.requestID);
    await assert.rejects(client.chat.completions.create({ model, messages, tools: [] }),
        (e) => e instanceof OpenAI.BadRequestError && e.code === 'unsupported' && e.param === 'tools');
    await assert.rejects(client.completions.create({ model, prompt: 'x', memory: 'mem_none' }),
        OpenAI.NotFoundError);
    await assert.rejects(client.post('/nothing', { body: {} }), OpenAI.NotFoundError);
});

// The queue holds two and one runs (see tests/e2e/clients): more at once are asked to come again.
check('retries', async () => {
    if (url !== metricsUrl) return; // nothing of it is a proxy's
    const name = 'rambad_requests_total{handler="completions",status="429"}';
    const refused = await metric(name);
    const patient = new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 20 });
    const ask = (from) => from.completions.create({
        model, prompt: 'x', max_tokens: 300, ignore_eos: true });
    const answers = await Promise.all(Array.from({ length: 5 }, () => ask(patient)));
    for (const answer of answers) assert.equal(answer.usage.completion_tokens, 300);
    assert.ok(await metric(name) > refused);
    const results = await Promise.allSettled(Array.from({ length: 5 }, () => ask(client)));
    const rejected = results.filter((r) => r.status === 'rejected').map((r) => r.reason);
    assert.ok(rejected.length > 0 && rejected.length < 5);
    for (const error of rejected) {
        assert.ok(error instanceof OpenAI.RateLimitError);
        assert.ok(Number(error.headers.get('retry-after')) > 0);
    }
});

check('a memory through the same client', async () => {
    const memory = await client.post('/memories', { body: { metadata: { name: 'notes' } } });
    const told = await client.post(`/memories/${memory.id}/append`, {
        body: Buffer.from("\nThe secret code of Ada's locker is 7318042.\n".repeat(4)),
        headers: { 'content-type': 'text/plain' } });
    assert.ok(told.tokens > 0);
    const body = { model, prompt: "Question: What is the secret code of Ada's locker?\nAnswer:",
        max_tokens: 16, temperature: 0, memory: memory.id };
    const options = { headers: { 'idempotency-key': `key-${memory.id}` } };
    const first = await client.completions.create(body, options);
    const again = await client.completions.create(body, options);
    assert.equal(again.id, first.id);
    assert.equal(again.choices[0].text, first.choices[0].text);
    assert.ok(first.usage.prompt_tokens_details.cached_tokens >= told.tokens);
    const now = await client.get(`/memories/${memory.id}`);
    assert.ok(now.token_count > told.position);
    await client.delete(`/memories/${memory.id}`);
    await assert.rejects(client.get(`/memories/${memory.id}`), OpenAI.NotFoundError);
});

await run();
