// What users of E2B's SDK for JavaScript do, against E2B's API of a host.
import assert from 'node:assert'

import { AuthenticationError, Sandbox } from 'e2b'

const kept = { timeoutMs: 300_000 }
const box = await Sandbox.create('base', { ...kept, metadata: { a: 'b' }, envs: { OWN: '1 2' } })
const done = await box.commands.run('echo $OWN; echo err >&2')
assert.deepEqual([done.stdout, done.stderr, done.exitCode], ['1 2\n', 'err\n', 0])
await box.files.write('/tmp/own', 'parent')
const children = await box.fork({ ...kept, count: 2 })
await children[0].files.write('/tmp/own', 'child')
const texts = await Promise.all([box, ...children].map(one => one.files.read('/tmp/own')))
assert.deepEqual(texts, ['parent', 'child', 'parent'])
const found = await Sandbox.list({ query: { metadata: { a: 'b' } } }).nextItems()
assert.equal(found.length, 3)
await box.pause()
assert.equal(await box.isRunning(), false)
const again = await Sandbox.connect(box.sandboxId)
assert.equal(await again.files.read('/tmp/own'), 'parent')
await assert.rejects(Sandbox.create('base', { apiKey: `e2b_${'0'.repeat(40)}` }), AuthenticationError)
for (const one of [box, ...children]) assert.equal(await one.kill(), true)
assert.equal(await children[0].isRunning(), false)
console.log("the SDK for JavaScript: commands, files, forks, lists, pause, kill")
