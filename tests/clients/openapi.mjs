// proto/openapi.yaml is a valid OpenAPI document, and what the server answers is what it says,
// field by field: node openapi.mjs URL. The key is in RAMBAD_API_KEY. Whether every route and
// request field is in it, and every status, is for tests/e2e/test_openapi.c.
import assert from 'node:assert/strict';
import Ajv2020 from 'ajv/dist/2020.js';
import { Validator } from '@seriousme/openapi-schema-validator';
import { check, key, run, url } from './check.mjs';

const validator = new Validator();
const result = await validator.validate('proto/openapi.yaml');
const specification = validator.specification;
const document = result.valid ? structuredClone(specification) : null;

// A field of an answer that is not documented is an error, here alone: to clients it is not.
function close(schema, inside = false) {
    if (Array.isArray(schema)) schema.forEach((s) => close(s));
    if (!schema || typeof schema !== 'object') return;
    if (
        schema.properties &&
        !inside &&
        schema.additionalProperties === undefined &&
        schema.unevaluatedProperties === undefined
    )
        schema[schema.allOf ? 'unevaluatedProperties' : 'additionalProperties'] = false;
    for (const [name, value] of Object.entries(schema))
        if (name === 'allOf') value.forEach((s) => close(s, true));
        else close(value);
}

const ajv = new Ajv2020({ strict: false, allErrors: true });
if (document) {
    for (const schema of Object.values(document.components.schemas)) close(schema);
    ajv.addSchema(document, 'api');
}

function follow(node) {
    while (node?.$ref)
        node = node.$ref
            .slice(2)
            .split('/')
            .reduce((at, part) => at[part], specification);
    return node;
}

// The place of a schema in the document, for ajv, which follows the references itself.
function pointer(...parts) {
    return (
        'api#/' +
        parts
            .map((p) => encodeURIComponent(p.replaceAll('~', '~0').replaceAll('/', '~1')))
            .join('/')
    );
}

function conforms(where, response, type, value) {
    let at = ['paths', where.path, where.method, 'responses', String(response)];
    let node = specification.paths[where.path][where.method].responses[response];
    assert.ok(node, `${where.method} ${where.path} answers ${response}, which is not documented`);
    if (node.$ref) at = node.$ref.slice(2).split('/');
    node = follow(node);
    assert.ok(node.content?.[type], `${where.method} ${where.path} ${response} is ${type}`);
    const fits = ajv.getSchema(pointer(...at, 'content', type, 'schema'));
    assert.ok(
        fits(value),
        `${where.method} ${where.path} ${response}: ` +
            `${ajv.errorsText(fits.errors)} in ${JSON.stringify(value).slice(0, 400)}`,
    );
}

// A call whose answer must be as documented; `path` is the document's, {id} filled from `id`.
async function ask(
    method,
    path,
    { id, item, query = '', body, type = 'application/json', status = 200 } = {},
) {
    const answer = await fetch(url + path.replace('{id}', id).replace('{item_id}', item) + query, {
        method: method.toUpperCase(),
        headers: {
            authorization: `Bearer ${key}`,
            ...(body !== undefined && { 'content-type': type }),
        },
        body:
            body === undefined ? undefined : typeof body === 'string' ? body : JSON.stringify(body),
    });
    const text = await answer.text();
    const got = answer.headers.get('content-type').split(';')[0];
    assert.equal(answer.status, status, `${method} ${path}: ${text.slice(0, 300)}`);
    const where = { path, method };
    if (got === 'text/event-stream') {
        const events = text
            .split('\n')
            .filter((l) => l.startsWith('data: '))
            .map((l) => l.slice(6));
        assert.ok(events.length > 1, `${method} ${path}: ${text.slice(0, 300)}`);
        for (const event of events)
            if (event !== '[DONE]') conforms(where, status, got, JSON.parse(event));
        return events;
    }
    const value = got === 'application/json' ? JSON.parse(text) : text;
    conforms(where, status, got, value);
    return value;
}

check('the document', async () => {
    assert.ok(result.valid, JSON.stringify(result.errors, null, 2));
    assert.equal(validator.version, '3.1');
});

check('models, health, metrics', async () => {
    const models = await ask('get', '/v1/models');
    await ask('get', '/v1/models/{id}', { id: models.data[0].id });
    await ask('get', '/v1/models/{id}', { id: 'none', status: 404 });
    for (const path of ['/health', '/health/live', '/health/ready', '/metrics'])
        await ask('get', path);
});

check('completions and chats', async () => {
    const messages = [{ role: 'user', content: 'Where is the key?' }];
    for (const stream of [false, true]) {
        for (const more of [
            {},
            { logprobs: 2, n: 2 },
            { echo: true, logprobs: 1 },
            { retrieval: true },
            ...(stream ? [{ stream_options: { include_usage: true } }] : [{ best_of: 2 }]),
        ])
            await ask('post', '/v1/completions', {
                body: { prompt: 'Once upon a time', max_tokens: 4, stream, ...more },
            });
        for (const more of [
            {},
            { logprobs: true, top_logprobs: 2, n: 2 },
            { retrieval: true },
            ...(stream ? [{ stream_options: { include_usage: true } }] : []),
        ])
            await ask('post', '/v1/chat/completions', {
                body: { messages, max_tokens: 4, stream, ...more },
            });
    }
    await ask('post', '/v1/chat/completions', {
        body: { messages, max_tokens: 1, tools: [], response_format: { type: 'text' } },
    });
    await ask('post', '/v1/completions', { body: {}, status: 400 });
    await ask('post', '/v1/chat/completions', { body: { messages, functions: [] }, status: 400 });
});

check('memories', async () => {
    const memory = await ask('post', '/v1/memories', {
        body: { metadata: { name: 'n' } },
        status: 201,
    });
    const of = { id: memory.id };
    const text = 'The raven sat on the bust of Pallas. '.repeat(60);
    const told = await ask('post', '/v1/memories/{id}/append', {
        ...of,
        body: text,
        type: 'text/plain',
    });
    await ask('post', '/v1/memories/{id}/append', {
        ...of,
        query: '?offset=1',
        body: 'x',
        type: 'text/plain',
        status: 409,
    });
    const fork = await ask('post', '/v1/memories', { body: { from: memory.id }, status: 201 });
    for (const stream of [false, true])
        await ask('post', '/v1/completions', {
            body: { prompt: 'Where?', memory: memory.id, retrieval: true, max_tokens: 4, stream },
        });
    await ask('get', '/v1/memories', { query: '?limit=1' });
    await ask('get', '/v1/memories/{id}', of);
    await ask('get', '/v1/memories/{id}/chunks', of);
    await ask('post', '/v1/memories/{id}/turns', {
        ...of,
        body: { position: told.position, bookmark: 'b' },
    });
    await ask('get', '/v1/memories/{id}/turns', of);
    await ask('post', '/v1/memories/{id}/rewind', { ...of, body: { to: told.position } });
    await ask('delete', '/v1/memories/{id}', { id: fork.id });
    await ask('delete', '/v1/memories/{id}', of);
    await ask('get', '/v1/memories/{id}', { ...of, status: 404 });
});

check('responses and conversations', async () => {
    const brief = { max_output_tokens: 4, temperature: 0 };
    const conversation = await ask('post', '/v1/conversations', {
        body: {
            metadata: { a: 'b' },
            items: [{ role: 'user', content: 'The raven is black. '.repeat(40) }],
        },
    });
    const of = { id: conversation.id };
    const first = await ask('post', '/v1/responses', {
        body: { ...brief, input: 'x', ...{ conversation: of.id } },
    });
    for (const more of [
        {},
        { store: false },
        { previous_response_id: first.id },
        { top_logprobs: 2, include: ['message.output_text.logprobs'] },
        { conversation: of.id, include: ['memory.retrieval'] },
        { instructions: 'Be brief.', metadata: { c: 'd' } },
    ])
        for (const stream of [false, true])
            await ask('post', '/v1/responses', {
                body: { ...brief, input: 'Where is it?', stream, ...more },
            });
    await ask('post', '/v1/responses', { body: { ...brief, input: 'x', background: true } });
    await ask('post', '/v1/responses', { body: { ...brief, input: 'x', tools: [1] }, status: 400 });
    await ask('post', '/v1/responses/input_tokens', { body: { input: 'x' } });
    await ask('get', '/v1/responses/{id}', { id: first.id });
    await ask('get', '/v1/responses/{id}', { id: first.id, query: '?stream=true' });
    await ask('get', '/v1/responses/{id}/input_items', { id: first.id });
    await ask('delete', '/v1/responses/{id}', { id: first.id });
    await ask('get', '/v1/responses/{id}', { id: first.id, status: 404 });
    await ask('get', '/v1/conversations/{id}', of);
    await ask('post', '/v1/conversations/{id}', { ...of, body: { metadata: {} } });
    const items = await ask('post', '/v1/conversations/{id}/items', {
        ...of,
        body: { items: [{ role: 'user', content: 'y' }] },
    });
    const item = items.data[0].id;
    await ask('get', '/v1/conversations/{id}/items', { ...of, query: '?limit=2' });
    await ask('get', '/v1/conversations/{id}/items/{item_id}', { ...of, item });
    await ask('delete', '/v1/conversations/{id}/items/{item_id}', { ...of, item });
    await ask('delete', '/v1/conversations/{id}', of);
});

await run();
