// What users of E2B's SDK for JavaScript do, against E2B's API of a host. Arguments: the key of another user, a key that
// only reads, a template. Older SDKs have fewer methods: a part whose method is missing is named, and left out.
import assert from 'node:assert'
import { setTimeout as sleep } from 'node:timers/promises'

import { AuthenticationError, CommandExitError, NotFoundError, Sandbox, SandboxError, TimeoutError } from 'e2b'

const [other, reader, template] = process.argv.slice(2)
// The SDK gives a request and a command a minute, which a busy machine may take for one.
const patient = { requestTimeoutMs: 3_600_000 }
const long = { ...patient, timeoutMs: 7_200_000 }

/** Runs a command for as long as it takes. */
const run = (box, command, options) => box.commands.run(command, { timeoutMs: 0, ...patient, ...options })

/** Waits until `look` returns something true. */
async function until(what, look) {
  for (let looks = 0; looks < 3000; looks++) {
    const found = await look()
    if (found) return found
    await sleep(200)
  }
  throw new Error(`${what} did not come`)
}

async function items(paginator) {
  const found = []
  while (paginator.hasNext) found.push(...(await paginator.nextItems()))
  return found
}
const ids = async options => (await items(Sandbox.list({ ...patient, ...options }))).map(one => one.sandboxId)

async function keys() {
  const unknown = `e2b_${'0'.repeat(40)}`
  await assert.rejects(Sandbox.create(template, { ...patient, apiKey: unknown }), error => {
    assert(error instanceof AuthenticationError && error.message.includes('no such API key'), error)
    return true
  })
  await assert.rejects(Sandbox.create(template, { ...patient, apiKey: reader }), /change nothing/)
  await assert.rejects(Sandbox.create('nothing', patient), /nothing/)
  await assert.rejects(Sandbox.create(template, { ...patient, timeoutMs: 100_000_000 }), /100000/)
}

async function commands(box) {
  const done = await run(box, 'echo out; echo err >&2; echo $OWN $ALSO; pwd', { cwd: '/tmp', envs: { ALSO: '3' } })
  assert.deepEqual([done.stdout, done.stderr, done.exitCode], ['out\n1 2 3\n/tmp\n', 'err\n', 0])
  await assert.rejects(run(box, 'echo no >&2; exit 3'), error => {
    assert(error instanceof CommandExitError, error)
    assert.deepEqual([error.exitCode, error.stderr, error.error], [3, 'no\n', 'exit status 3'])
    return true
  })
  const pieces = []
  await run(box, 'for i in 1 2 3; do echo $i; sleep 0.1; done', { onStdout: piece => void pieces.push(piece) })
  assert.equal(pieces.join(''), '1\n2\n3\n')
  assert.equal((await run(box, 'seq 1 30000')).stdout.length, 168_894)
  await assert.rejects(run(box, 'sleep 100000', { timeoutMs: 1000 }), TimeoutError)
}

async function background(box) {
  const reading = await run(box, 'head -n 2; echo end', { background: true, stdin: true })
  assert((await box.commands.list(patient)).some(one => one.pid === reading.pid))
  await box.commands.sendStdin(reading.pid, 'one\n', patient)
  await box.commands.sendStdin(reading.pid, 'two\n', patient)
  assert.equal((await reading.wait()).stdout, 'one\ntwo\nend\n')
  const closed = await run(box, 'cat; echo end', { background: true, stdin: true })
  if (closed.closeStdin) {
    await closed.sendStdin('one\n', patient)
    await closed.closeStdin(patient)
    assert.equal((await closed.wait()).stdout, 'one\nend\n')
  } else {
    await closed.kill()
  }
  const sleeping = await run(box, 'sleep 600', { background: true })
  await sleeping.disconnect()
  const again = await box.commands.connect(sleeping.pid, { timeoutMs: 0, ...patient })
  assert.equal(await again.kill(), true)
  await assert.rejects(again.wait(), error => {
    assert.deepEqual([error.exitCode, error.error], [-1, 'signal: killed'])
    return true
  })
  assert.equal(await box.commands.kill(sleeping.pid, patient), false)
}

async function terminals(box) {
  const text = []
  const size = { cols: 90, rows: 30 }
  const handle = await box.pty.create({ ...size, timeoutMs: 0, ...patient, onData: data => void text.push(Buffer.from(data)) })
  await box.pty.resize(handle.pid, { cols: 91, rows: 31 }, patient)
  await box.pty.sendInput(handle.pid, new TextEncoder().encode('stty size; exit 4\n'), patient)
  await assert.rejects(handle.wait(), error => error.exitCode === 4)
  assert(Buffer.concat(text).toString().includes('31 91'), Buffer.concat(text).toString())
}

async function files(box) {
  await box.files.write('/tmp/a/b c/ä.txt', 'hällo', patient)
  assert.equal(await box.files.read('/tmp/a/b c/ä.txt', patient), 'hällo')
  const data = new Uint8Array(1 << 20).map((_, at) => at * 7 + (at >> 8))
  await box.files.write('/tmp/bin', data.buffer, patient)
  assert(Buffer.from(await box.files.read('/tmp/bin', { ...patient, format: 'bytes' })).equals(Buffer.from(data)))
  const parts = []
  for await (const part of await box.files.read('/tmp/bin', { ...patient, format: 'stream' })) parts.push(part)
  assert(Buffer.concat(parts).equals(Buffer.from(data)))
  const many = [0, 1, 2].map(n => ({ path: `/tmp/m/${n}`, data: String(n) }))
  assert.deepEqual((await box.files.write(many, patient)).map(one => one.name), ['0', '1', '2'])
  const listed = await box.files.list('/tmp/m', patient)
  assert.deepEqual(listed.map(one => [one.name, one.type]), ['0', '1', '2'].map(name => [name, 'file']))
  assert.equal((await box.files.rename('/tmp/m/0', '/tmp/m/moved', patient)).path, '/tmp/m/moved')
  assert.deepEqual([await box.files.exists('/tmp/m/0', patient), await box.files.exists('/tmp/m/moved', patient)], [false, true])
  assert.deepEqual([await box.files.makeDir('/tmp/new/dir', patient), await box.files.makeDir('/tmp/new/dir', patient)], [true, false])
  const info = await box.files.getInfo('/tmp/a/b c/ä.txt', patient)
  assert.deepEqual([info.size, info.permissions, info.owner], [6, '-rw-r--r--', 'root'])
  await box.files.remove('/tmp/new', patient)
  assert.equal(await box.files.exists('/tmp/new', patient), false)
  await assert.rejects(box.files.read('/tmp/nothing', patient), NotFoundError)
}

async function watches(box) {
  const seen = []
  const watch = await box.files.watchDir('/tmp/m', event => void seen.push(`${event.type} ${event.name}`), { timeoutMs: 0, ...patient })
  await box.files.write('/tmp/m/watched', 'x', patient)
  await until('the event of a write', () => seen.includes('write watched'))
  assert(seen.includes('create watched'), seen.join())
  await watch.stop()
}

async function isKnown(box) {
  assert.equal(await box.isRunning(patient), true)
  const info = await box.getInfo(patient)
  assert.deepEqual([info.sandboxId, info.templateId, info.metadata], [box.sandboxId, template, { who: 'me & you' }])
  assert.equal(info.state, 'running')
  const left = (info.endAt - info.startedAt) / 1000
  assert(599 < left && left < 601, `${left}`)
  if (box.updateNetwork) {
    await box.updateNetwork({ allowInternetAccess: false }, patient)
    await assert.rejects(box.updateNetwork({ denyOut: ['10.0.0.1/8'] }, patient), /10\.0\.0\.1\/8/)
    const closed = await box.getInfo(patient)
    if ('allowInternetAccess' in closed) assert.equal(closed.allowInternetAccess, false)
    await box.updateNetwork({ denyOut: ['10.0.0.0/8'], allowOut: ['10.0.0.1'] }, patient)
    const { network } = await box.getInfo(patient)
    if (network) assert.deepEqual([network.allowOut, network.denyOut], [['10.0.0.1'], ['10.0.0.0/8']])
  }
  const before = Date.now()
  await box.setTimeout(long.timeoutMs, patient)
  const end = (await box.getInfo(patient)).endAt - long.timeoutMs
  assert(before - 2000 <= end && end <= Date.now() + 2000, `${before} ${end}`)
  const [load] = await box.getMetrics(patient)
  assert(load.cpuCount === 1 && load.memUsed > 0 && load.memUsed < load.memTotal, JSON.stringify(load))
  assert.deepEqual(await ids({ query: { metadata: { who: 'me & you' } } }), [box.sandboxId])
  assert.deepEqual(await ids({ query: { metadata: { who: 'me' } } }), [])
  assert.deepEqual(await ids({ query: { state: ['paused'] } }), [])
  assert.deepEqual(await ids({ apiKey: other }), [])
  const foreign = { ...patient, apiKey: other }
  await assert.rejects(Sandbox.getInfo(box.sandboxId, foreign), SandboxError)
  await assert.rejects(Sandbox.connect(box.sandboxId, foreign), SandboxError)
  assert.equal(await Sandbox.kill(box.sandboxId, foreign), false)
}

async function forks(box) {
  await box.files.write('/tmp/own', 'parent', patient)
  const children = await box.fork({ ...long, count: 2 })
  for (const [number, child] of children.entries()) {
    assert.equal(await child.files.read('/tmp/own', patient), 'parent')
    await child.files.write('/tmp/own', String(number), patient)
    await run(child, 'test "$OWN" = "1 2"')
  }
  const texts = await Promise.all([box, ...children].map(one => one.files.read('/tmp/own', patient)))
  assert.deepEqual(texts, ['parent', '0', '1'])
  assert.deepEqual(new Set(await ids()), new Set([box, ...children].map(one => one.sandboxId)))
  assert.equal((await ids({ limit: 1 })).length, 3)
  for (const child of children) assert.deepEqual([await child.kill(patient), await child.kill(patient)], [true, false])
  assert.equal(await children[0].isRunning(patient), false)
}

/** By the name of a port, which only a domain's clients can resolve. */
async function ports(box) {
  if (!process.env.E2B_DOMAIN) return
  await run(box, 'mkdir -p /tmp/www && echo here >/tmp/www/own && busybox httpd -p 127.0.0.1:8080 -h /tmp/www')
  const url = port => `https://${box.getHost(port)}/own`
  const answer = await fetch(url(8080))
  assert.deepEqual([answer.status, await answer.text()], [200, 'here\n'])
  const closed = await fetch(url(8081))
  assert.equal(closed.status, 502)
  assert((await closed.json()).message.includes('8081'))
}

async function sleeps(box) {
  await box.files.write('/tmp/own', 'parent', patient)
  const pause = () => (box.pause ? box.pause(patient) : box.betaPause(patient))
  assert.equal(await pause(), true)
  // Older SDKs do not tell whether it was paused before.
  const twice = await pause()
  if (box.fork) assert.equal(twice, false)
  assert.equal(await box.isRunning(patient), false)
  assert.deepEqual(await ids({ query: { state: ['paused'] } }), [box.sandboxId])
  const again = await Sandbox.connect(box.sandboxId, long)
  assert.equal(await again.files.read('/tmp/own', patient), 'parent')
  assert.equal(await again.isRunning(patient), true)
}

async function snapshots(box) {
  await box.files.write('/tmp/own', 'parent', patient)
  const kept = await box.createSnapshot(patient)
  const names = async options => (await items(Sandbox.listSnapshots({ ...patient, ...options }))).map(one => one.snapshotId)
  assert.deepEqual(await names({ sandboxId: box.sandboxId }), [kept.snapshotId])
  assert.deepEqual(await names({ apiKey: other }), [])
  const foreign = { ...patient, apiKey: other }
  await assert.rejects(Sandbox.create(kept.snapshotId, foreign), SandboxError)
  await box.files.write('/tmp/own', 'later', patient)
  const made = await Sandbox.create(kept.snapshotId, long)
  assert.equal(await made.files.read('/tmp/own', patient), 'parent')
  await made.kill(patient)
  assert.equal(await Sandbox.deleteSnapshot(kept.snapshotId, foreign), false)
  assert.equal(await Sandbox.deleteSnapshot(kept.snapshotId, patient), true)
  assert.equal(await Sandbox.deleteSnapshot(kept.snapshotId, patient), false)
  await assert.rejects(Sandbox.create(kept.snapshotId, patient), SandboxError)
}

await keys()
const box = await Sandbox.create(template, { ...patient, timeoutMs: 600_000, metadata: { who: 'me & you' }, envs: { OWN: '1 2' } })
// First what gives the sandbox a longer life.
const parts = [
  [isKnown, 'getInfo'],
  [commands, 'commands'],
  [background, 'commands'],
  [terminals, 'pty'],
  [files, 'files'],
  [watches, 'files'],
  [forks, 'fork'],
  [ports, 'getHost'],
  [sleeps, 'getInfo'],
  [snapshots, 'createSnapshot'],
]
for (const [part, needed] of parts) {
  if (!(needed in box)) {
    console.log('the SDK for JavaScript has no', needed)
    continue
  }
  await part(box)
  console.log('the SDK for JavaScript:', part.name)
}
assert.equal(await Sandbox.kill(box.sandboxId, patient), true)
const brief = await Sandbox.create(template, { ...patient, timeoutMs: 2000 })
await until('its end', async () => !(await brief.isRunning(patient)))
console.log('the SDK for JavaScript: ends')
