#!/usr/bin/env python3
"""A worker in Python: serves HTTP over the connections that a dispatcher hands to it.

It needs nothing but Python 3.9, and speaks the hand-off protocol of src/handoff/protocol.md. The
comments name the rules of the protocol, such as W-ADOPTED. The dispatcher starts the worker, with
the socket as its standard input:

    dispatcher.spawn_worker(Command::new("examples/foreign_workers/worker.py"))?;

This runs two workers of the crate and two of these, which are killed at random under load:

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
import sys
import threading

HELLO, DEMAND, ADOPTED, REJECTED, LOAD, PONG, DRAINING, GOODBYE = range(0x01, 0x09)
WELCOME, OFFER, RECALL, PING, DRAIN, FENCED = range(0x81, 0x87)
UNUSABLE, UNKNOWN_MAY_BE_SKIPPED = 4, 0x40
SO_COOKIE = getattr(socket, "SO_COOKIE", 57)


class Breach(Exception):
    """The dispatcher has broken the protocol."""


class Frames:
    """Frames over a Unix socket of either kind."""

    def __init__(self, peer):
        self.peer, self.data, self.fds = peer, b"", []

    def missing(self):
        """Returns how many bytes the first frame lacks, or None if its header is incomplete."""
        if len(self.data) < 8:
            return None
        magic, version, _, length = struct.unpack_from(">BBHI", self.data)
        if (magic, version) != (0xFD, 0x10) or length > 1 << 20:
            raise Breach("these bytes are no frame")
        return max(0, 8 + length - len(self.data))

    def receive(self):
        """Returns the next payload and its descriptors, or None at the end of the stream."""
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
            raise Breach("a frame came without its descriptors")
        return payload, fds

    def send(self, layout, *fields):
        payload = struct.pack(">" + layout, *fields)
        # On STREAM, one send may take a part of the frame. sendall sends the rest too.
        self.peer.sendall(struct.pack(">BBHI", 0xFD, 0x10, 0, len(payload)) + payload)


class Offer:
    """A connection, and what the dispatcher says about it."""

    def __init__(self, payload, fds):
        self.rest, self.fd, self.bundle = payload, fds[0], fds[1:]
        _, self.number, self.cookie, self.transport = self.take("BQQB")
        self.peer, self.local = self.address(), self.address()
        self.prefix = self.bytes("I")  # what was read from the connection before
        self.metadata = self.bytes("I")

    def take(self, layout):
        return struct.unpack(">" + layout, self.cut(struct.calcsize(">" + layout)))

    def bytes(self, length):
        return self.cut(*self.take(length))

    def cut(self, length):
        if length > len(self.rest):
            raise Breach("a message is too short")
        field, self.rest = self.rest[:length], self.rest[length:]
        return field

    def address(self):
        """Returns host and port, as http.server wants them."""
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
        families = {1: (socket.AF_INET, socket.AF_INET6), 2: (socket.AF_UNIX,)}
        is_stream = (
            connection.family in families.get(self.transport, ())
            and connection.type == socket.SOCK_STREAM
        )
        return is_stream and not os.get_blocking(self.fd)

    def close(self):
        for fd in [self.fd, *self.bundle]:
            os.close(fd)  # not shut down: another worker may be serving it (W-TOUCH)


class Worker:
    """Adopts each connection at once, and serves it in a thread of its own."""

    def __init__(self, peer, serve, limit=64):
        self.frames, self.serve, self.limit = Frames(peer), serve, limit
        self.lock = threading.Lock()
        self.offered = self.adopted = self.rejected = self.finished = 0
        self.demand = 0
        self.is_draining = self.has_left = False

    def run(self):
        """Serves until GOODBYE or the dispatcher's end, and until all connections have ended."""
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
            pass  # this worker is cut off, or the dispatcher is gone: adopt no more (W-END)
        finally:
            self.is_draining = True
            self.frames.peer.close()
            for thread in threads:
                thread.join()

    def has_welcome(self):
        message = self.frames.receive()
        if message and (message[0][:2] != bytes([WELCOME, 1]) or message[1]):
            raise Breach("the first message is no WELCOME")
        return message is not None

    def on_message(self, payload, fds):
        """Acts on a message. Returns the threads that serve the connections of it."""
        kind = payload[0] if payload else None
        if kind == OFFER and fds:
            return self.on_offer(Offer(payload, fds))
        with self.lock:
            if fds:
                raise Breach("a descriptor came with a message other than OFFER")
            if kind == PING:
                self.frames.send("B8s", PONG, payload[1:9])
            elif kind == DRAIN and not self.is_draining:
                self.is_draining = True
                self.frames.send("B", DRAINING)
                self.leave()
            elif kind in (DRAIN, RECALL):
                pass  # every offer is answered at once, so there is none to give back
            elif kind == FENCED:
                raise OSError("the dispatcher has cut this worker off")
            elif kind is None or not kind & UNKNOWN_MAY_BE_SKIPPED:
                raise Breach("the type of a message is unknown")
        return []

    def on_offer(self, offer):
        connection = socket.socket(fileno=offer.fd)
        cookie = connection.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8)
        if offer.number != self.offered or struct.unpack("=Q", cookie) != (offer.cookie,):
            raise Breach("an offer is missing, or came with another connection")
        if self.offered == self.demand:
            raise Breach("there are more offers than this worker has asked for")
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
            connection.setblocking(True)  # allowed, because the connection is adopted (W-TOUCH)
            self.serve(self, connection, offer)
        except OSError:
            pass  # the client is gone
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
                    pass  # the main thread notices that too

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
    """Reads first what the dispatcher had read from a connection, then the connection itself."""

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
    """Is the application. `self.server` is the worker."""

    protocol_version = "HTTP/1.1"
    timeout = 2  # seconds until an idle connection ends, so that a drain ends too

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
    about = "Serves HTTP for the dispatcher at the standard input."
    arguments = argparse.ArgumentParser(description=about)
    arguments.add_argument("--worker", metavar="N", help="the number of this worker in the journal")
    arguments.add_argument("--journal", metavar="PATH", help="the file to list connections in")
    arguments = arguments.parse_args()
    journal = arguments.journal and os.open(arguments.journal, os.O_WRONLY | os.O_APPEND)

    def serve(worker, connection, offer):
        if journal:
            os.write(journal, f"{offer.peer[0]} {arguments.worker} {os.getpid()}\n".encode())
        Handler(worker, connection, offer)

    # Ctrl-C goes to all processes of a terminal. The dispatcher acts on it, and drains its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Otherwise the socket would be the standard input of each child process (W-STDIN).
    try:
        peer = socket.socket(fileno=os.dup(0))
    except OSError as error:
        sys.exit(f"worker.py: standard input is not the socket of a dispatcher: {error}")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    peer.setblocking(True)
    try:
        Worker(peer, serve).run()
    except Breach as breach:
        sys.exit(f"worker {os.getpid()}: the dispatcher has broken the protocol: {breach}")


if __name__ == "__main__":
    main()
