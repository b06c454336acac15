// @langchain/openai, unmodified, against the server: see check.mjs.
import assert from 'node:assert/strict';
import { ChatOpenAI, OpenAI } from '@langchain/openai';
import { AIMessage, HumanMessage, SystemMessage } from '@langchain/core/messages';
import { ChatPromptTemplate } from '@langchain/core/prompts';
import { StringOutputParser } from '@langchain/core/output_parsers';
import { Arrivals, check, fakeUrl, key, metric, run, streamTokens, until, url } from './check.mjs';

const at = (base) => ({ apiKey: key, maxRetries: 0, configuration: { baseURL: `${base}/v1` } });
const list = await fetch(`${url}/v1/models`, { headers: { authorization: `Bearer ${key}` } });
const model = (await list.json()).data[0].id;
const chat = new ChatOpenAI({ ...at(url), model, temperature: 0, maxTokens: 16 });
const messages = [
    new SystemMessage('You answer questions about what you were told.'),
    new HumanMessage("The secret code of Ada's locker is 7318042."),
    new AIMessage('I will remember.'),
    new HumanMessage("What is the secret code of Ada's locker?"),
];

check('invoke and stream', async () => {
    const whole = await chat.invoke(messages);
    assert.equal(typeof whole.content, 'string');
    assert.ok(whole.usage_metadata.output_tokens > 0);
    let text = '';
    for await (const chunk of await chat.stream(messages)) text += chunk.content;
    assert.equal(text, whole.content);
});

check('a chain', async () => {
    const chain = ChatPromptTemplate.fromMessages([['human', 'What is {thing}?']])
        .pipe(chat)
        .pipe(new StringOutputParser());
    assert.equal(typeof (await chain.invoke({ thing: 'a raven' })), 'string');
    const both = await chain.batch([{ thing: 'one' }, { thing: 'two' }], { maxConcurrency: 2 });
    assert.equal(both.length, 2);
});

check('completions', async () => {
    const llm = new OpenAI({ ...at(url), model, temperature: 0, maxTokens: 8 });
    const whole = await llm.invoke('Once upon a time');
    let text = '';
    for await (const part of await llm.stream('Once upon a time')) text += part;
    assert.equal(text, whole);
});

check('tokens come one by one', async () => {
    const slow = new ChatOpenAI({ ...at(fakeUrl), model, maxTokens: streamTokens });
    const arrivals = new Arrivals();
    for await (const chunk of await slow.stream('x')) arrivals.take(chunk.content);
    arrivals.finish(streamTokens);
});

check('abort', async () => {
    const before = await metric('rambad_disconnects_total');
    const controller = new AbortController();
    const endless = new ChatOpenAI({
        ...at(url),
        model,
        maxTokens: 1000000,
        modelKwargs: { ignore_eos: true },
    });
    await assert.rejects(async () => {
        for await (const chunk of await endless.stream('x', { signal: controller.signal }))
            if (chunk.content) controller.abort();
    });
    await until('it is over', async () => (await metric('rambad_jobs_running')) === 0);
    assert.equal(await metric('rambad_disconnects_total'), before + 1);
});

check('responses', async () => {
    const responses = new ChatOpenAI({
        ...at(url),
        model,
        temperature: 0,
        maxTokens: 12,
        useResponsesApi: true,
    });
    const first = await responses.invoke("The secret code of Ada's locker is 7318042.");
    const id = first.response_metadata.id;
    assert.match(id, /^resp_/);
    const question = "What is the secret code of Ada's locker?";
    const second = await responses.invoke(question, { previous_response_id: id });
    assert.ok(second.usage_metadata.input_token_details.cache_read > 0);
    let text = '';
    for await (const chunk of await responses.stream(question, { previous_response_id: id }))
        text += chunk.text;
    assert.equal(text, second.text);
});

check('responses with the whole history', async () => {
    const responses = new ChatOpenAI({
        ...at(url),
        model,
        temperature: 0,
        maxTokens: 12,
        useResponsesApi: true,
    });
    const history = [
        new SystemMessage(
            'You keep the lighthouse of Marrow and answer in few words what you were told. '.repeat(4),
        ),
        new HumanMessage("The secret code of Ada's locker is 7318042."),
    ];
    const first = await responses.invoke(history);
    history.push(first, new HumanMessage("What is the secret code of Ada's locker?"));
    const second = await responses.invoke(history);
    const known = second.usage_metadata.input_token_details.cache_read;
    assert.ok(known >= first.usage_metadata.input_tokens, `${known} were known`);
});

check('a conversation', async () => {
    const call = (method, path, body) =>
        fetch(`${url}/v1${path}`, {
            method,
            headers: { authorization: `Bearer ${key}`, 'content-type': 'application/json' },
            body: body && JSON.stringify(body),
        }).then((answer) => answer.json());
    const conversation = await call('POST', '/conversations', {});
    const talk = new ChatOpenAI({
        ...at(url),
        model,
        temperature: 0,
        maxTokens: 12,
        useResponsesApi: true,
        modelKwargs: { conversation: conversation.id },
    });
    await talk.invoke("The secret code of Ada's locker is 7318042.");
    const answer = await talk.invoke("What is the secret code of Ada's locker?");
    const items = await call('GET', `/conversations/${conversation.id}/items`);
    assert.equal(items.data.length, 4);
    assert.equal(items.data[0].content[0].text, answer.text);
});

check('errors', async () => {
    const wrong = new ChatOpenAI({ ...at(url), model: 'gpt-4' });
    await assert.rejects(wrong.invoke('x'), (e) => e.status === 404 || /gpt-4/.test(e.message));
});

await run();
