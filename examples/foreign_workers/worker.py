#!/usr/bin/env python3
"""A worker in Python: serves HTTP over the connections that a dispatcher hands to it.

Needs nothing but Python 3.9 and speaks the hand-off protocol of src/handoff/protocol.md. The names
of its rules, such as W-ADOPTED, are in the comments. The dispatcher starts it, with the socket as
standard input:

    dispatcher.spawn_worker(Command::new("examples/foreign_workers/worker.py"))?;

Two of this crate's own workers and two of these, killed at random while clients come:

    cargo run --example accept_handoff -- --demo 5000 --kill-every 100 \\
        --also examples/foreign_workers/worker.py --also examples/foreign_workers/worker.py
"""

import argparse
import array
import http.server
import io
import os
import signal
import socket
import struct
import threading

HELLO, DEMAND, ADOPTED, REJECTED, LOAD, PONG, DRAINING, GOODBYE = range(0x01, 0x09)
WELCOME, OFFER, RECALL, PING, DRAIN = range(0x81, 0x86)
UNUSABLE, UNKNOWN_MAY_BE_SKIPPED = 4, 0x40
SO_COOKIE = getattr(socket, "SO_COOKIE", 57)


class Breach(Exception):
    """The dispatcher has broken the protocol."""


class Frames:
    """Frames over a Unix socket of either kind."""

    def __init__(self, peer):
        self.peer, self.data, self.fds = peer, b"", []

    def missing(self):
        """Bytes that are missing of the frame that has begun, if its header is complete."""
        if len(self.data) < 8:
            return None
        magic, version, _, length = struct.unpack_from(">BBHI", self.data)
        if (magic, version) != (0xFD, 0x10) or length > 1 << 20:
            raise Breach("no frame")
        return max(0, 8 + length - len(self.data))

    def receive(self):
        """The next payload and its descriptors; None at the end."""
        while self.missing() != 0:
            room = max(65_600, self.missing() or 0)  # P-ROOM
            flags = socket.MSG_CMSG_CLOEXEC
            data, control, flags, _ = self.peer.recvmsg(room, socket.CMSG_SPACE(4 * 253), flags)
            for level, kind, value in control:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    fds = array.array("i")
                    fds.frombytes(value[: len(value) - len(value) % fds.itemsize])
                    self.fds.extend(fds)
            if flags & socket.MSG_CTRUNC:
                raise Breach("descriptors were lost")  # W-CTRUNC
            if not data:
                return None
            self.data += data
        count, length = struct.unpack_from(">HI", self.data, 2)
        payload, self.data = self.data[8 : 8 + length], self.data[8 + length :]
        fds, self.fds = self.fds[:count], self.fds[count:]
        if len(fds) < count:
            raise Breach("a frame without its descriptors")
        return payload, fds

    def send(self, layout, *fields):
        payload = struct.pack(">" + layout, *fields)
        # On STREAM, sendall goes on until the whole frame is sent.
        self.peer.sendall(struct.pack(">BBHI", 0xFD, 0x10, 0, len(payload)) + payload)


class Offer:
    """A connection, and what the dispatcher says about it."""

    def __init__(self, payload, fds):
        self.rest, self.fd, self.bundle = payload, fds[0], fds[1:]
        _, self.number, self.cookie, self.transport = self.take("BQQB")
        self.peer, self.local = self.address(), self.address()
        self.prefix = self.bytes("I")  # read from the connection already
        self.metadata = self.bytes("I")

    def take(self, layout):
        fields = struct.unpack_from(">" + layout, self.rest)
        self.rest = self.rest[struct.calcsize(">" + layout) :]
        return fields

    def bytes(self, length):
        (length,) = self.take(length)
        if length > len(self.rest):
            raise Breach("a message is too short")
        field, self.rest = self.rest[:length], self.rest[length:]
        return field

    def address(self):
        """Host and port, as http.server has it."""
        (kind,) = self.take("B")
        if kind in (1, 2):
            return (os.fsdecode(self.bytes("H")), 0)
        if kind == 4:
            ip, port = self.take("4sH")
            return (socket.inet_ntop(socket.AF_INET, ip), port)
        if kind == 6:
            ip, port, _flow, _scope = self.take("16sHII")
            return (socket.inet_ntop(socket.AF_INET6, ip), port)
        if kind == 0:
            return ("", 0)
        raise Breach("an unknown kind of address")

    def is_usable(self, connection):
        family = {1: (socket.AF_INET, socket.AF_INET6), 2: (socket.AF_UNIX,)}[self.transport]
        is_stream = connection.family in family and connection.type == socket.SOCK_STREAM
        return is_stream and not os.get_blocking(self.fd)

    def close(self):
        for fd in [self.fd, *self.bundle]:
            os.close(fd)  # only closed: it is another worker's (W-TOUCH)


class Worker:
    """Adopts each connection at once, and serves it with a thread of its own."""

    def __init__(self, peer, serve, limit=64):
        self.frames, self.serve, self.limit = Frames(peer), serve, limit
        self.lock = threading.Lock()
        self.offered = self.adopted = self.rejected = self.finished = 0
        self.demand = 0
        self.is_draining = self.has_left = False

    def run(self):
        """Returns after GOODBYE or the dispatcher's end, when all connections have ended."""
        threads = []
        try:
            self.frames.send("B4sBBB", HELLO, b"FDHO", 1, 1, 1)
            if not self.has_welcome():
                return
            self.ask()
            while not self.has_left and (message := self.frames.receive()):
                threads = [thread for thread in threads if thread.is_alive()]
                threads.extend(self.on_message(*message))
        except OSError:
            pass  # cut off, or the dispatcher is gone: nothing more is adopted (W-END)
        finally:
            self.is_draining = True
            self.frames.peer.close()
            for thread in threads:
                thread.join()

    def has_welcome(self):
        message = self.frames.receive()
        if message and (message[0][:2] != bytes([WELCOME, 1]) or message[1]):
            raise Breach("no WELCOME")
        return message is not None

    def on_message(self, payload, fds):
        """Returns the threads that it has started."""
        kind = payload[0] if payload else None
        if kind == OFFER and fds:
            return self.on_offer(Offer(payload, fds))
        with self.lock:
            if fds:
                raise Breach("a descriptor with another message than OFFER")
            if kind == PING:
                (nonce,) = struct.unpack_from(">Q", payload, 1)
                self.frames.send("BQ", PONG, nonce)
            elif kind == DRAIN and not self.is_draining:
                self.is_draining = True
                self.frames.send("B", DRAINING)
                self.leave()
            elif kind in (DRAIN, RECALL):
                pass  # no offer is unanswered here
            elif kind is None or not kind & UNKNOWN_MAY_BE_SKIPPED:
                raise Breach("a message that is none")
        return []

    def on_offer(self, offer):
        connection = socket.socket(fileno=offer.fd)
        cookie = connection.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8)
        if offer.number != self.offered or struct.unpack("=Q", cookie) != (offer.cookie,):
            raise Breach("an offer is missing, or has the wrong descriptor")
        if self.offered == self.demand:
            raise Breach("more offers than were asked for")
        self.offered += 1
        first = self.adopted + self.rejected
        with self.lock:
            if not offer.is_usable(connection) or self.is_draining:
                reason = 2 if self.is_draining else UNUSABLE
                self.rejected += 1
                self.frames.send("BQIB", REJECTED, first, 1, reason)
                connection.detach()
                offer.close()
                return []
            self.adopted += 1
            self.frames.send("BQI", ADOPTED, first, 1)  # before the application gets it (W-ADOPTED)
        thread = threading.Thread(target=self.serve_one, args=(connection, offer))
        thread.start()
        return [thread]

    def serve_one(self, connection, offer):
        try:
            connection.setblocking(True)  # it is ours now
            self.serve(self, connection, offer)
        except OSError:
            pass  # the client has gone
        finally:
            try:
                connection.shutdown(socket.SHUT_RDWR)  # others may have a copy (W-SHUTDOWN)
            except OSError:
                pass
            connection.close()
            with self.lock:
                self.finished += 1
                try:
                    self.frames.send("BQ", LOAD, self.finished)
                    self.ask()
                    self.leave()
                except OSError:
                    pass  # the main thread sees it too

    def ask(self):
        demand = self.finished + self.rejected + self.limit
        if demand > self.demand and not self.is_draining:
            self.demand = demand
            self.frames.send("BQ", DEMAND, demand)

    def leave(self):
        if self.is_draining and self.finished == self.adopted and not self.has_left:
            self.has_left = True
            self.frames.send("B", GOODBYE)
            self.frames.peer.shutdown(socket.SHUT_RDWR)  # wakes the main thread


class Prefixed(io.RawIOBase):
    """What was read from a connection already, then the rest of it."""

    def __init__(self, prefix, connection):
        self.prefix, self.connection = prefix, connection

    def readable(self):
        return True

    def readinto(self, buffer):
        if not self.prefix:
            return self.connection.recv_into(buffer)
        count = min(len(buffer), len(self.prefix))
        buffer[:count], self.prefix = self.prefix[:count], self.prefix[count:]
        return count


class Handler(http.server.BaseHTTPRequestHandler):
    """The application. `self.server` is the worker."""

    protocol_version = "HTTP/1.1"
    timeout = 2  # seconds until an idle connection ends, also while this worker drains

    def __init__(self, worker, connection, offer):
        self.prefix = offer.prefix
        super().__init__(connection, offer.peer, worker)

    def setup(self):
        super().setup()
        self.rfile = io.BufferedReader(Prefixed(self.prefix, self.connection))

    def do_GET(self):
        answer = f"worker {os.getpid()} answers {self.client_address[0]}\n".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        if self.server.is_draining:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


def main():
    arguments = argparse.ArgumentParser(description="Serves HTTP for a dispatcher at stdin.")
    arguments.add_argument("--worker", metavar="N", help="its number in the journal")
    arguments.add_argument("--journal", metavar="PATH", help="writes there what it was given")
    arguments = arguments.parse_args()
    journal = arguments.journal and os.open(arguments.journal, os.O_WRONLY | os.O_APPEND)

    def serve(worker, connection, offer):
        if journal:
            os.write(journal, f"{offer.peer[0]} {arguments.worker} {os.getpid()}\n".encode())
        Handler(worker, connection, offer)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # reaches all; the dispatcher says when to stop
    # A child process would find the socket as its standard input (W-STDIN).
    peer = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    peer.setblocking(True)
    Worker(peer, serve).run()


if __name__ == "__main__":
    main()
