#!/usr/bin/env node
// A worker in Node: serves HTTP over the connections that a dispatcher hands to it. WebSockets work
// too: `server` below is an ordinary http.Server, with its 'upgrade' events.
//
// It needs nothing but Node 18 or later, and speaks the hand-off protocol of
// src/handoff/protocol.md. The comments name the rules of the protocol, such as W-ADOPTED. The
// dispatcher starts the worker, with the socket as its standard input. The socket has to be of kind
// STREAM:
//
//     let worker = WorkerCommand::from(Command::new("examples/foreign_workers/worker.mjs"));
//     dispatcher.spawn_worker(worker.socket_kind(SocketKind::Stream))?;
//
// This runs two workers of the crate and two of these, which are killed at random under load:
//
//     cargo run --example accept_handoff -- --demo 5000 --kill-every 500 --socket stream \
//         --also examples/foreign_workers/worker.mjs --also examples/foreign_workers/worker.mjs
//
// Three things are special to Node:
//
// - It receives descriptors only in the channel of its own child_process module, which is a pipe of
//   libuv with `ipc` set. `process.binding` makes such a pipe. That API is deprecated (DEP0111),
//   but there is no other one. The pipe takes one descriptor out of each read, so this worker never
//   has more than one offer on its way.
// - It has no getsockopt, so the client's address is compared instead of the cookie (D-COOKIE).
// - It registers a connection only when it reads from it, so it does not keep W-REGISTER.

import fs from 'node:fs';
import http from 'node:http';
import net from 'node:net';
import { parseArgs } from 'node:util';

const { Pipe, constants } = process.binding('pipe_wrap');
const { ShutdownWrap, WriteWrap, streamBaseState, ...stream } = process.binding('stream_wrap');
process.binding('tcp_wrap'); // makes handles of TCP sockets

const [HELLO, DEMAND, ADOPTED, REJECTED, LOAD, PONG, DRAINING, GOODBYE] = [1, 2, 3, 4, 5, 6, 7, 8];
const [WELCOME, OFFER, RECALL, PING, DRAIN, FENCED] = [0x81, 0x82, 0x83, 0x84, 0x85, 0x86];
const [REASON_DRAINING, REASON_UNUSABLE] = [2, 4];
const UNKNOWN_MAY_BE_SKIPPED = 0x40;

const u8 = number => Buffer.from([number]);
const u64 = number => {
    const field = Buffer.alloc(8);
    field.writeBigUInt64BE(BigInt(number));
    return field;
};
const u32 = number => u64(number).subarray(4);

// Returns an address in the one form that can be compared.
const canonical = address => {
    if (!address.includes(':')) return address;
    return new URL(`http://[${address.split('%')[0]}]/`).hostname.slice(1, -1);
};

// The fields of a message from the dispatcher.
class Fields {
    constructor(payload) { this.rest = payload; }
    bytes(length) {
        if (length > this.rest.length) throw new Error('a message is too short');
        const field = this.rest.subarray(0, length);
        this.rest = this.rest.subarray(length);
        return field;
    }
    u8() { return this.bytes(1).readUInt8(); }
    u16() { return this.bytes(2).readUInt16BE(); }
    u32() { return this.bytes(4).readUInt32BE(); }
    u64() { return this.bytes(8).readBigUInt64BE(); }
    address() {
        switch (this.u8()) {
            case 0: return { address: '' };
            case 1: case 2: return { address: this.bytes(this.u16()).toString() };
            case 4: return { address: [...this.bytes(4)].join('.'), port: this.u16() };
            case 6: {
                const words = this.bytes(16).toString('hex').match(/.{4}/g).join(':');
                const address = { address: canonical(words), port: this.u16() };
                this.bytes(8); // flow information and scope
                return address;
            }
            default: throw new Error('an unknown kind of address');
        }
    }
}

const fail = message => {
    console.error(`worker.mjs: ${message}`);
    process.exit(1);
};

// One link to a dispatcher. `give(socket, offer)` is the application.
class Worker {
    constructor(fd, give, limit = 1000) {
        Object.assign(this, { give, limit, data: Buffer.alloc(0), handles: [] });
        this.isDraining = this.hasLeft = this.isOver = false;
        this.demand = this.offered = this.answered = this.adopted = this.finished = 0;
        this.pipe = new Pipe(constants.IPC);
        const error = this.pipe.open(fd);
        if (error) fail(`standard input is not a dispatcher's socket of kind STREAM (${error})`);
        this.pipe.onread = bytes => this.onRead(bytes);
        this.pipe.readStart();
        this.send([u8(HELLO), Buffer.from('FDHO'), u8(1), u8(1), u8(1)]);
    }

    onRead(bytes) {
        if (this.pipe.pendingHandle) this.handles.push(this.pipe.pendingHandle);
        this.pipe.pendingHandle = null;
        const count = streamBaseState[stream.kReadBytesOrError];
        if (count < 0) return this.end(); // this worker is cut off, or the dispatcher is gone
        if (count === 0) return;
        const offset = streamBaseState[stream.kArrayBufferOffset];
        this.data = Buffer.concat([this.data, Buffer.from(bytes, offset, count)]);
        try {
            while (!this.isOver && this.nextMessage());
        } catch (error) {
            this.end();
            const who = `worker ${process.pid}`;
            console.error(`${who}: the dispatcher has broken the protocol: ${error.message}`);
        }
    }

    nextMessage() {
        if (this.data.length < 8) return false;
        if (this.data.readUInt16BE(0) !== 0xFD10) throw new Error('these bytes are no frame');
        const [fds, length] = [this.data.readUInt16BE(2), this.data.readUInt32BE(4)];
        if (length > 1 << 20) throw new Error('a frame is too long');
        if (this.data.length < 8 + length) return false;
        const payload = this.data.subarray(8, 8 + length);
        this.data = this.data.subarray(8 + length);
        if (fds > this.handles.length) throw new Error('a descriptor is missing, or is no socket');
        this.onMessage(payload, this.handles.splice(0, fds));
        return true;
    }

    onMessage(payload, handles) {
        const fields = new Fields(payload);
        const type = fields.u8();
        if (!this.isWelcome) {
            const isWelcome = type === WELCOME && fields.u8() === 1;
            if (!isWelcome) throw new Error('the first message is no WELCOME');
            this.isWelcome = true;
            return this.ask();
        }
        if (type === OFFER && handles.length === 1) return this.onOffer(fields, handles[0]);
        if (handles.length) throw new Error('a descriptor came with a message other than OFFER');
        if (type === PING) this.send([u8(PONG), u64(fields.u64())]);
        else if (type === DRAIN) this.drain();
        else if (type === RECALL) return; // every offer is answered at once
        else if (type === FENCED) this.end(); // adopt no more (W-END)
        else if (!(type & UNKNOWN_MAY_BE_SKIPPED)) throw new Error(`unknown type ${type}`);
    }

    onOffer(fields, handle) {
        const [number, , transport] = [fields.u64(), fields.u64(), fields.u8()];
        const offer = { peer: fields.address(), local: fields.address() };
        offer.prefix = fields.bytes(fields.u32()); // what was read from the connection before
        offer.metadata = fields.bytes(fields.u32());
        if (this.offered === this.demand) throw new Error('there are more offers than asked for');
        if (number !== BigInt(this.offered)) throw new Error('an offer is missing');
        this.offered += 1;
        const peer = {};
        const isTcp = handle.getpeername !== undefined;
        // The kernel has no address for a client that is gone.
        const isKnown = isTcp && handle.getpeername(peer) === 0 && offer.peer.port !== undefined;
        const { port, address = '' } = peer;
        if (isKnown && (port !== offer.peer.port || canonical(address) !== offer.peer.address)) {
            throw new Error('an offer came with the connection of another client');
        }
        let reason = isTcp === (transport === 1) ? 0 : REASON_UNUSABLE;
        if (this.isDraining) reason = REASON_DRAINING;
        const first = u64(this.answered++);
        if (reason) {
            handle.close(); // no shutdown: another worker may be serving it (W-TOUCH)
            this.send([u8(REJECTED), first, u32(1), u8(reason)]);
        } else {
            this.adopted += 1;
            // The application gets the connection when the whole answer is sent (W-ADOPTED), and
            // does not get it if that fails (W-NOT-SENT).
            const decide = isSent => (isSent ? this.serve(handle, offer) : handle.close());
            this.send([u8(ADOPTED), first, u32(1)], decide);
        }
        this.ask();
    }

    serve(handle, offer) {
        handle.setBlocking(false); // allowed, because the connection is adopted (W-TOUCH)
        const socket = new net.Socket({ handle, readable: true, writable: true });
        // Node would only close the socket, and another process may have a copy (W-SHUTDOWN).
        const destroy = socket._destroy;
        socket._destroy = (error, done) => {
            const request = new ShutdownWrap();
            request.oncomplete = () => destroy.call(socket, error, done);
            if (handle.shutdown(request)) request.oncomplete();
        };
        socket.once('close', () => {
            this.finished += 1;
            this.send([u8(LOAD), u64(this.finished)]);
            this.ask();
            this.leave();
        });
        if (offer.prefix.length) socket.unshift(offer.prefix);
        this.give(socket, offer);
    }

    // Asks for one offer at a time, and for no more than `limit` connections.
    ask() {
        const mayAsk = this.demand === this.answered && this.adopted - this.finished < this.limit;
        if (mayAsk && !this.isDraining) this.send([u8(DEMAND), u64(++this.demand)]);
    }

    drain() {
        if (this.isDraining) return;
        this.isDraining = true;
        this.send([u8(DRAINING)]);
        this.onDrain?.();
        this.leave();
    }

    leave() {
        if (!this.isDraining || this.finished < this.adopted || this.hasLeft) return;
        this.send([u8(GOODBYE)], () => this.end());
        this.hasLeft = true; // nothing follows (W-LAST)
    }

    send(fields, done = () => {}) {
        const payload = Buffer.concat(fields);
        if (this.isOver || this.hasLeft) return done(false);
        const request = new WriteWrap();
        request.oncomplete = status => {
            if (status) this.end();
            done(status === 0);
        };
        const header = Buffer.concat([Buffer.from([0xFD, 0x10, 0, 0]), u32(payload.length)]);
        const error = this.pipe.writeBuffer(request, Buffer.concat([header, payload]));
        if (error || !streamBaseState[stream.kLastWriteWasAsync]) request.oncomplete(error);
    }

    // Ends the link. Adopted connections go on.
    end() {
        if (this.isOver) return;
        this.isOver = this.isDraining = true;
        this.pipe.close();
        this.handles.forEach(handle => handle.close());
        this.onDrain?.();
    }
}

const USAGE = 'usage: worker.mjs [--worker N] [--journal PATH]';
const { help, worker: number, journal } = (() => {
    const text = { type: 'string' };
    try {
        const options = { help: { type: 'boolean', short: 'h' }, worker: text, journal: text };
        return parseArgs({ options }).values;
    } catch (error) {
        return fail(`${error.message}\n${USAGE}`);
    }
})();
if (help) {
    console.log(`${USAGE}\n\nServes HTTP for the dispatcher at the standard input.`);
    process.exit();
}
if (!fs.fstatSync(0).isSocket()) fail('standard input is not the socket of a dispatcher');
const lines = journal && fs.openSync(journal, 'a');
// Ctrl-C goes to all processes of a terminal. The dispatcher acts on it, and drains its workers.
process.on('SIGINT', () => {});

// The application, and which of its connections are between two requests.
const idle = new Set();
const server = http.createServer((request, response) => {
    idle.delete(request.socket);
    response.on('close', () => idle.add(request.socket));
    if (worker.isDraining) response.setHeader('Connection', 'close');
    response.end(`worker ${process.pid} answers ${request.socket.client}\n`);
});
const worker = new Worker(0, (socket, offer) => {
    if (lines) fs.writeSync(lines, `${offer.peer.address} ${number} ${process.pid}\n`);
    socket.client = offer.peer.address;
    idle.add(socket);
    socket.once('close', () => idle.delete(socket));
    server.emit('connection', socket);
});
// Requests may be on their way: so idle connections are ended a moment later.
worker.onDrain = () => setTimeout(() => idle.forEach(socket => socket.end()), 100);
