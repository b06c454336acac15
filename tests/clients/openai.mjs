// The official openai package, unmodified, against the server: see check.mjs.
import assert from 'node:assert/strict';
import OpenAI from 'openai';
import {
    Arrivals,
    check,
    fakeUrl,
    key,
    metric,
    metricsUrl,
    run,
    streamTokens,
    until,
    url,
} from './check.mjs';

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
        model,
        messages,
        temperature: 0,
        max_completion_tokens: 24,
        seed: 7,
    });
    assert.match(answer.id, /^chatcmpl-/);
    assert.equal(answer.object, 'chat.completion');
    assert.equal(answer.choices.length, 1);
    assert.equal(answer.choices[0].message.role, 'assistant');
    assert.equal(typeof answer.choices[0].message.content, 'string');
    assert.ok(['stop', 'length'].includes(answer.choices[0].finish_reason));
    assert.equal(
        answer.usage.total_tokens,
        answer.usage.prompt_tokens + answer.usage.completion_tokens,
    );
    assert.ok(answer._request_id);
    assert.ok(answer.system_fingerprint);
});

check('chat, streamed', async () => {
    const body = { model, messages, temperature: 0, max_tokens: 24, seed: 7 };
    const whole = await client.chat.completions.create(body);
    const stream = await client.chat.completions.create({
        ...body,
        stream: true,
        stream_options: { include_usage: true },
    });
    let text = '',
        role,
        reason,
        usage,
        ids = new Set();
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
    const runner = client.chat.completions.stream({
        model,
        messages,
        temperature: 0,
        max_tokens: 8,
    });
    let deltas = '';
    runner.on('content', (delta) => (deltas += delta));
    const last = await runner.finalChatCompletion();
    assert.equal(deltas, last.choices[0].message.content);
});

check('chat, several choices with log probabilities', async () => {
    const answer = await client.chat.completions.create({
        model,
        messages,
        max_tokens: 5,
        n: 2,
        seed: 1,
        logprobs: true,
        top_logprobs: 3,
    });
    assert.deepEqual(
        answer.choices.map((c) => c.index),
        [0, 1],
    );
    for (const choice of answer.choices)
        for (const token of choice.logprobs.content) {
            assert.ok(token.logprob <= 0);
            assert.equal(token.top_logprobs.length, 3);
        }
});

check('completions', async () => {
    const body = {
        model,
        prompt: ['Once upon a time', 'The raven'],
        max_tokens: 6,
        temperature: 0,
    };
    const answer = await client.completions.create({ ...body, logprobs: 2, echo: true });
    assert.equal(answer.object, 'text_completion');
    assert.equal(answer.choices.length, 2);
    assert.ok(answer.choices[0].text.startsWith('Once upon a time'));
    assert.equal(answer.choices[0].logprobs.token_logprobs[0], null);
    const plain = await client.completions.create(body);
    const texts = ['', ''];
    for await (const chunk of await client.completions.create({ ...body, stream: true }))
        texts[chunk.choices[0].index] += chunk.choices[0].text;
    assert.deepEqual(
        texts,
        plain.choices.map((c) => c.text),
    );
});

check('tokens come one by one', async () => {
    const stream = await fake.completions.create({
        model,
        prompt: 'x',
        max_tokens: streamTokens,
        stream: true,
    });
    const arrivals = new Arrivals();
    for await (const chunk of stream) arrivals.take(chunk.choices[0].text);
    arrivals.finish(streamTokens);
});

check('abort', async () => {
    const before = await metric('rambad_disconnects_total');
    const stream = await client.chat.completions.create({
        model,
        messages,
        max_tokens: 1000000,
        ignore_eos: true,
        stream: true,
    });
    let chunks = 0;
    for await (const chunk of stream) if (chunk.choices[0] && ++chunks === 3) break;
    assert.ok(stream.controller.signal.aborted);
    await until('the stream is over', async () => (await metric('rambad_jobs_running')) === 0);
    const controller = new AbortController();
    const call = client.completions.create(
        { model, prompt: 'x', max_tokens: 1000000, ignore_eos: true },
        { signal: controller.signal },
    );
    await until('the request runs', async () => (await metric('rambad_jobs_running')) > 0);
    controller.abort();
    await assert.rejects(call, OpenAI.APIUserAbortError);
    await until('the other is over', async () => (await metric('rambad_jobs_running')) === 0);
    assert.equal(await metric('rambad_disconnects_total'), before + 2);
});

check('errors', async () => {
    const wrong = new OpenAI({ baseURL: `${url}/v1`, apiKey: 'wrong', maxRetries: 0 });
    await assert.rejects(wrong.models.list(), OpenAI.AuthenticationError);
    await assert.rejects(
        client.chat.completions.create({ model: 'gpt-4', messages }),
        (e) => e instanceof OpenAI.NotFoundError && e.param === 'model' && e.code === 'not_found',
    );
    await assert.rejects(
        client.chat.completions.create({ model, messages, temperature: 9 }),
        (e) => e instanceof OpenAI.BadRequestError && e.param === 'temperature' && !!e.requestID,
    );
    await assert.rejects(
        client.chat.completions.create({ model, messages, functions: [] }),
        (e) =>
            e instanceof OpenAI.BadRequestError &&
            e.code === 'unsupported' &&
            e.param === 'functions',
    );
    await assert.rejects(
        client.completions.create({ model, prompt: 'x', memory: 'mem_none' }),
        OpenAI.NotFoundError,
    );
    await assert.rejects(client.post('/nothing', { body: {} }), OpenAI.NotFoundError);
});

// The queue holds two and one runs (see tests/e2e/clients): more at once are asked to come again.
check('retries', async () => {
    if (url !== metricsUrl) return; // nothing of it is a proxy's
    const name = 'rambad_requests_total{handler="completions",status="429"}';
    const refused = await metric(name);
    const patient = new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 10 });
    const ask = (from) =>
        from.completions.create({
            model,
            prompt: 'x',
            max_tokens: 100,
            ignore_eos: true,
        });
    const answers = await Promise.all(Array.from({ length: 5 }, () => ask(patient)));
    for (const answer of answers) assert.equal(answer.usage.completion_tokens, 100);
    assert.ok((await metric(name)) > refused);
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
        headers: { 'content-type': 'text/plain' },
    });
    assert.ok(told.tokens > 0);
    const body = {
        model,
        prompt: "Question: What is the secret code of Ada's locker?\nAnswer:",
        max_tokens: 16,
        temperature: 0,
        memory: memory.id,
    };
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

const brief = { model, temperature: 0, max_output_tokens: 12 };

check('responses, gone on from and forked', async () => {
    const first = await client.responses.create({
        ...brief,
        input: "The secret code of Ada's locker is 7318042.",
        metadata: { topic: 'lockers' },
    });
    assert.match(first.id, /^resp_/);
    assert.equal(first.object, 'response');
    assert.ok(['completed', 'incomplete'].includes(first.status));
    assert.equal(first.output_text, first.output[0].content[0].text);
    assert.equal(first.metadata.topic, 'lockers');
    const ask = (previous) =>
        client.responses.create({
            ...brief,
            input: "What is the secret code of Ada's locker?",
            previous_response_id: previous,
        });
    const second = await ask(first.id);
    assert.equal(second.previous_response_id, first.id);
    assert.ok(second.usage.input_tokens_details.cached_tokens >= first.usage.total_tokens - 1);
    await client.responses.create({ ...brief, input: 'And now?', previous_response_id: second.id });
    const fork = await ask(first.id); // an old one, again
    assert.equal(fork.output_text, second.output_text);
    assert.equal(fork.usage.input_tokens, second.usage.input_tokens);

    const again = await client.responses.retrieve(second.id);
    assert.equal(again.output_text, second.output_text);
    const items = await client.responses.inputItems.list(second.id);
    assert.equal(items.data[0].content[0].text, "What is the secret code of Ada's locker?");
    const count = await client.responses.inputTokens.count({ model, input: 'How many?' });
    assert.ok(count.input_tokens > 0);
    await client.responses.delete(second.id);
    await assert.rejects(client.responses.retrieve(second.id), OpenAI.NotFoundError);
    await assert.rejects(ask(second.id), OpenAI.NotFoundError);
});

check('responses, streamed and taken up again', async () => {
    const body = { ...brief, input: 'Once upon a time' };
    const whole = await client.responses.create({ ...body, store: false });
    const events = [];
    for await (const event of await client.responses.create({ ...body, stream: true }))
        events.push(event);
    events.forEach((event, i) => assert.equal(event.sequence_number, i));
    const types = events.map((e) => e.type).filter((t, i, all) => t !== all[i - 1]);
    assert.deepEqual(types.slice(0, 5), [
        'response.created',
        'response.in_progress',
        'response.output_item.added',
        'response.content_part.added',
        'response.output_text.delta',
    ]);
    assert.deepEqual(types.slice(5, 8), [
        'response.output_text.done',
        'response.content_part.done',
        'response.output_item.done',
    ]);
    assert.equal(types[8], `response.${whole.status}`);
    const deltas = events
        .filter((e) => e.type === 'response.output_text.delta')
        .map((e) => e.delta);
    assert.equal(deltas.join(''), whole.output_text);
    const { response } = events.at(-1);
    assert.equal(response.usage.output_tokens, whole.usage.output_tokens);

    const rest = [];
    for await (const event of await client.responses.retrieve(response.id, {
        stream: true,
        starting_after: 4,
    }))
        rest.push(event);
    assert.deepEqual(rest, events.slice(5));
    const last = await client.responses.stream(body).finalResponse(); // the package's own helper
    assert.equal(last.output_text, whole.output_text);
});

check('responses in the background, cancelled', async () => {
    const begun = await client.responses.create({
        ...brief,
        input: 'x',
        max_output_tokens: 12,
        background: true,
    });
    assert.ok(['queued', 'in_progress', 'completed', 'incomplete'].includes(begun.status));
    await until('it is complete', async () =>
        ['completed', 'incomplete'].includes((await client.responses.retrieve(begun.id)).status),
    );
    const endless = await client.responses.create({
        ...brief,
        input: 'x',
        max_output_tokens: 1000000,
        ignore_eos: true,
        background: true,
    });
    await until('it runs', async () => (await metric('rambad_jobs_running')) > 0);
    const cancelled = await client.responses.cancel(endless.id);
    assert.equal(cancelled.status, 'cancelled');
    await until('it is over', async () => (await metric('rambad_jobs_running')) === 0);
    await assert.rejects(
        client.responses.create({ ...brief, input: 'x', tools: [{ type: 'web_search' }] }),
        (e) => e instanceof OpenAI.BadRequestError && e.param.startsWith('tools'),
    );
});

check('responses, aborted', async () => {
    const before = await metric('rambad_disconnects_total');
    const stream = await client.responses.create({
        ...brief,
        input: 'x',
        max_output_tokens: 1000000,
        ignore_eos: true,
        store: false,
        stream: true,
    });
    for await (const event of stream) if (event.type === 'response.output_text.delta') break;
    await until('it is over', async () => (await metric('rambad_jobs_running')) === 0);
    assert.equal(await metric('rambad_disconnects_total'), before + 1);
});

check('conversations', async () => {
    const conversation = await client.conversations.create({
        metadata: { topic: 'lockers' },
        items: [
            {
                type: 'message',
                role: 'user',
                content: "The secret code of Ada's locker is 7318042.",
            },
        ],
    });
    assert.match(conversation.id, /^conv_/);
    const answer = await client.responses.create({
        ...brief,
        input: "What is the secret code of Ada's locker?",
        conversation: conversation.id,
    });
    assert.equal(answer.conversation.id, conversation.id);
    const texts = [];
    for await (const item of client.conversations.items.list(conversation.id, {
        limit: 2,
        order: 'asc',
    }))
        texts.push(item.content[0].text); // over two pages
    assert.deepEqual(texts, [
        "The secret code of Ada's locker is 7318042.",
        "What is the secret code of Ada's locker?",
        answer.output_text,
    ]);
    const added = await client.conversations.items.create(conversation.id, {
        items: [{ type: 'message', role: 'user', content: 'It was changed.' }],
    });
    const item = await client.conversations.items.retrieve(added.data[0].id, {
        conversation_id: conversation.id,
    });
    assert.equal(item.content[0].text, 'It was changed.');
    await client.conversations.items.delete(item.id, { conversation_id: conversation.id });
    const changed = await client.conversations.update(conversation.id, {
        metadata: { topic: 'other' },
    });
    assert.equal(changed.metadata.topic, 'other');
    await assert.rejects(
        client.responses.create({
            ...brief,
            input: 'x',
            conversation: conversation.id,
            previous_response_id: answer.id,
        }),
        OpenAI.BadRequestError,
    );
    const deleted = await client.conversations.delete(conversation.id);
    assert.equal(deleted.object, 'conversation.deleted');
    await assert.rejects(client.conversations.retrieve(conversation.id), OpenAI.NotFoundError);
});

await run();
