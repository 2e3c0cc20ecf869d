#!/usr/bin/env python3
"""A client in Python: protobuf and the standard library alone, written from proto/SPEC.md and the .proto files.

    python3 -m venv venv && venv/bin/pip install protobuf grpcio-tools         # grpcio-tools only to translate the .proto files
    mkdir -p pb && venv/bin/python -m grpc_tools.protoc -I proto/defs --python_out pb proto/defs/im/v1/*.proto
    PYTHONPATH=pb venv/bin/python proto/examples/client.py --server tls://127.0.0.1:7101 --ca data/ca.pem \
        --token "$(imd token --user alice)" send bob 'Hello, Bob'
    … --token "$(imd token --user bob)" tail alice                             # over tcp://127.0.0.1:7100 without --ca

The numbers in brackets are the sections of SPEC.md. `deploy/e2e-python.sh` tries it against a server that is killed.
"""

import argparse
import os
import random
import select
import socket
import ssl
import struct
import sys
import time
import urllib.parse

from im.v1 import api_pb2, body_pb2, client_pb2

SEND, HISTORY, SYNC = 257, 258, 513  # numbers of methods [7]
OUT_OF_ORDER, SYNC_FIRST, RETRY_LATER = 16, 17, {19, 20, 21, 22, 23}  # statuses [10]


class Refusal(Exception):
    """A status that the caller has to look at."""

    def __init__(self, status):
        super().__init__(f"{status.text} ({status.code})")
        self.code = status.code


class Outgoing:
    """A send that has no seq yet. Its id, body and known_seq stay as they are however often it is sent [5]."""

    def __init__(self, peer, body, known_seq):
        self.peer, self.body, self.known_seq = peer, body, known_seq
        self.id = os.urandom(16)
        self.seq = None
        self.status = None  # of the last try


def tls_context(ca):
    context = ssl.create_default_context(cafile=ca)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["im/1"])
    return context


class Client:
    """One session, with all that has to survive a connection: what was received, and what was not acknowledged."""

    def __init__(self, server, token, ca=None, on_entry=lambda entry: None):
        self.server, self.token, self.on_entry = server, token, on_entry
        # Read here: a file that cannot be read is no trouble of the connection, and no other try would mend it.
        self.tls = tls_context(ca) if urllib.parse.urlsplit(server).scheme == "tls" else None
        self.have, self.version, self.rows = {}, 0, {}  # conversation -> seq without a gap below; of the last sync [6]
        self.direct = {}  # peer -> conversation
        self.joins = []  # conversations that the own log named, to be read [6.6]
        self.acked = {}  # conversation -> seqs of own entries beyond `have`: no `Message` comes for these [5]
        self.pending = []  # in the order in which they were made
        self.resyncs = 0

    # -- frames [1] and connections [2, 4]

    def connect(self):
        """Connects and syncs, with jitter between the tries; then sends again what has no seq."""
        pause = 0.1
        while True:
            try:
                self._dial()
                self._sync()
                self._send_again()
                return
            except (OSError, EOFError) as error:
                print(f"connecting again: {error}", file=sys.stderr)
                time.sleep(random.uniform(0, pause))
                pause = min(pause * 2, 10)

    def _dial(self):
        url = urllib.parse.urlsplit(self.server)
        self.socket = socket.create_connection((url.hostname, url.port), timeout=10)
        if self.tls:
            self.socket = self.tls.wrap_socket(self.socket, server_hostname=url.hostname)
        self.input, self.pongs, self.replies, self.next_call, self.resync_at = bytearray(), set(), {}, 1, None
        self.syncing, self.live = False, []
        self.limits, self.heard, self.said, self.interval = None, time.monotonic(), time.monotonic(), 10
        hello = client_pb2.Hello(version_min=1, version_max=1, token=self.token, client_name="client.py", client_version="1")
        hello.opened_at_ms = int(time.time() * 1000)
        self._write(hello=hello)
        while self.limits is None:
            self.step()

    def _write(self, **frame):
        data = client_pb2.ClientFrame(**frame).SerializeToString()
        self.socket.sendall(struct.pack(">I", len(data)) + data)
        self.said = time.monotonic()

    def step(self, timeout=1.0):
        """Handles one frame, or what is due by the clock. Everything that waits calls this."""
        now = time.monotonic()
        if now - self.heard > 2.5 * self.interval:
            raise EOFError("the server is silent")
        if self.limits is not None and now - self.said > self.interval:
            self._write(ping=client_pb2.Ping(echo=b"still here"))
        if self.resync_at is not None and now >= self.resync_at and not self.syncing:
            self.resync_at = None
            self._sync()
        if len(self.input) < 4 or len(self.input) < 4 + struct.unpack(">I", self.input[:4])[0]:
            has_more = isinstance(self.socket, ssl.SSLSocket) and self.socket.pending()
            if not has_more and not select.select([self.socket], [], [], timeout)[0]:
                return
            data = self.socket.recv(65536)
            if not data:
                raise EOFError("the connection ended")
            self.input += data
            self.heard = time.monotonic()
            return
        length = struct.unpack(">I", self.input[:4])[0]
        if length == 0 or length > 1 << 20:
            raise EOFError("no frame of ours")
        frame = client_pb2.ServerFrame.FromString(bytes(self.input[4 : 4 + length]))
        del self.input[: 4 + length]
        kind = frame.WhichOneof("frame")
        if kind is not None:  # else: a frame newer than this client
            getattr(self, "_on_" + kind, lambda _: None)(getattr(frame, kind))

    def _on_welcome(self, welcome):
        self.user, self.own_log, self.limits = welcome.user_id, welcome.self_conversation_id, welcome.limits
        self.interval = welcome.heartbeat_interval_ms / 1000

    def _on_ping(self, ping):
        self._write(pong=client_pb2.Pong(echo=ping.echo))

    def _on_pong(self, pong):
        self.pongs.add(pong.echo)

    def _on_close(self, close):
        raise (EOFError if close.status.code in RETRY_LATER else Refusal)(close.status)

    def _on_resync(self, resync):
        """Live messages may be missing: sync after a random part of the spread [6.5]."""
        self.resyncs += 1
        self.resync_at = time.monotonic() + random.uniform(0, resync.spread_ms / 1000)

    def ping(self):
        echo = os.urandom(8)
        self._write(ping=client_pb2.Ping(echo=echo))
        while echo not in self.pongs:
            self.step()
        self.pongs.discard(echo)

    # -- calls [7]

    def call(self, method, request, reply):
        number, self.next_call = self.next_call, self.next_call + 1
        self.replies[number] = [b"", None]
        self._write(call=client_pb2.Call(request_id=number, method=method, request=request.SerializeToString()))
        while self.replies[number][1] is None:
            self.step()
        payload, end = self.replies.pop(number)
        if end.status.code != 0:
            raise Refusal(end.status)
        return reply.FromString(payload)

    def _on_reply(self, part):
        waiting = self.replies[part.request_id]
        waiting[0] += part.payload
        if part.last or part.status.code != 0:
            waiting[1] = part

    # -- receiving [6]

    def _sync(self):
        """Duty 4. What comes live meanwhile is looked at afterwards: it may lie behind a gap that is being filled."""
        self.syncing, page, first = True, b"", None
        have = [api_pb2.SyncHave(conversation_id=id, seq=seq) for id, seq in self.have.items()]
        while True:
            try:
                request = api_pb2.SyncRequest(version=self.version, have=have[:10000], page=page)
                answer = self.call(SYNC, request, api_pb2.SyncReply)
            except Refusal as refusal:
                if refusal.code not in RETRY_LATER:
                    raise
                time.sleep(0.2)
                continue
            first = answer.version if first is None else first
            for row in answer.conversations:
                self.rows[row.conversation_id] = row
                if row.peer_user_id:
                    self.direct[row.peer_user_id] = row.conversation_id
                if not row.left:
                    self._fetch(row.conversation_id, row.head)
            page = answer.next
            if not page:
                break
        self.version, self.syncing = first, False
        waiting, self.live = self.live, []
        for entry in waiting:
            self._on_message(entry)

    def history(self, conversation, first, last=0, limit=0):
        target = api_pb2.Target(conversation_id=conversation)
        # 64-bit signed, so that a server can refuse what is negative.
        request = api_pb2.HistoryRequest(target=target, limit=limit, to=last, **{"from": first})
        return self.call(HISTORY, request, api_pb2.HistoryReply)

    def _fetch(self, conversation, head):
        """Duty 3: asks as often as answers are shorter than asked."""
        while self.have.get(conversation, 0) < head:
            answer = self.history(conversation, self.have.get(conversation, 0) + 1, head)
            if not answer.entries:  # what is below first_seq is no longer kept
                self.have[conversation] = max(self.have.get(conversation, 0), answer.first_seq - 1)
                return
            for entry in answer.entries:
                self._take(entry.message)

    def _catch_up(self, conversation):
        """Duty 6: what came before a sync that did not know of the conversation may be lost, and only its head tells."""
        while True:
            try:
                head = self.history(conversation, self.have.get(conversation, 0) + 1, limit=1).head
                return self._fetch(conversation, head)
            except Refusal as refusal:
                if refusal.code not in RETRY_LATER:
                    return  # no longer in it
                time.sleep(0.2)

    def _on_message(self, entry):
        if self.syncing:
            return self.live.append(entry)
        if entry.seq > self.have.get(entry.conversation_id, 0) + 1:
            self.syncing = True  # so that what comes live waits for its turn
            self._fetch(entry.conversation_id, entry.seq - 1)
            self.syncing = False
        self._take(entry)
        while self.joins and not self.syncing:
            self.syncing = True
            self._catch_up(self.joins.pop(0))
            self.syncing = False
        while self.live and not self.syncing:
            self._on_message(self.live.pop(0))

    def _take(self, entry):
        """Duty 2: each entry once. One's own may be the answer to a send whose ack was lost [5, sync before resend]."""
        if entry.seq > self.have.get(entry.conversation_id, 0):
            if entry.sender == self.user:
                self._stored(entry.client_message_id, entry.seq)
            if entry.conversation_id == self.own_log and entry.seq > self.version:
                event = body_pb2.Body.FromString(entry.body).event
                if event.WhichOneof("event") == "conversation_joined":
                    self.joins.append(event.conversation_joined.conversation_id)
            self.on_entry(entry)
            self._received(entry.conversation_id, entry.seq)

    def _received(self, conversation, seq):
        own = self.acked.setdefault(conversation, set())
        while seq + 1 in own:
            seq += 1
        self.have[conversation] = seq
        own.difference_update([acked for acked in own if acked <= seq])

    # -- sending [5]

    def send(self, peer, text):
        """Sends a text to a user, without waiting for the ack: see `wait`."""
        body = body_pb2.Body(text=body_pb2.Text(text=text)).SerializeToString()
        known = self.have.get(self.direct.get(peer), 0)
        row = self.rows.get(self.direct.get(peer))
        out = Outgoing(peer, body, max(known, row.head if row else 0))
        while len(self.pending) >= self.limits.pending_sends:
            self.step()
        self._write_send(out)
        self.pending.append(out)
        return out

    def _write_send(self, out, first=False):
        before = [other for other in self.pending if other.peer == out.peer and other is not out]
        after = b"" if first or not before else before[-1].id
        frame = client_pb2.Send(peer_user_id=out.peer, client_message_id=out.id, body=out.body, after=after)
        frame.known_seq = out.known_seq
        self._write(send=frame)

    def _send_again(self):
        """Oldest first, the oldest of each conversation with an empty `after`."""
        waiting, self.pending = self.pending, []
        for out in waiting:
            out.status = None
            self._write_send(out)
            self.pending.append(out)

    def _stored(self, id, seq):
        for out in self.pending:
            if out.id == id:
                out.seq = seq
        self.pending = [out for out in self.pending if out.seq is None]

    def _on_send_ack(self, ack):
        if ack.status.code == 0:
            for out in self.pending:
                if out.id == ack.client_message_id:
                    self.direct[out.peer] = ack.conversation_id
            have = self.have.setdefault(ack.conversation_id, 0)
            if ack.seq > have:
                self.acked.setdefault(ack.conversation_id, set()).add(ack.seq)
                self._received(ack.conversation_id, have)
            return self._stored(ack.client_message_id, ack.seq)
        for out in self.pending:
            if out.id == ack.client_message_id:
                out.status = ack.status

    def wait(self):
        """Until all that was sent has a seq. Raises the status of one that will never have one."""
        while self.pending:
            self.step()
            if not self.pending or any(out.status is None for out in self.pending):
                continue
            # All are answered: those that were refused only because of one before them, or for a while, go again.
            for out in self.pending:
                if out.status.code == SYNC_FIRST:
                    # The log was read up to here, and the message is not in it [5, sync first].
                    self._sync()
                    out.known_seq = self.have.get(self.direct.get(out.peer), 0)
                elif out.status.code != OUT_OF_ORDER and out.status.code not in RETRY_LATER:
                    self.pending.remove(out)
                    raise Refusal(out.status)
            time.sleep(max(out.status.retry_after_ms for out in self.pending) / 1000 if self.pending else 0)
            self._send_again()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", required=True, help="tls://host:port or tcp://host:port")
    parser.add_argument("--ca", help="the certificate to trust; else those of the system")
    parser.add_argument("--token", required=True)
    commands = parser.add_subparsers(dest="command", required=True)
    send = commands.add_parser("send")
    send.add_argument("peer")
    send.add_argument("text")
    commands.add_parser("tail").add_argument("peer")
    arguments = parser.parse_args()

    def show(entry):
        if client.direct.get(arguments.peer, entry.conversation_id) == entry.conversation_id and entry.kind == 1:
            print(entry.seq, entry.sender, body_pb2.Body.FromString(entry.body).text.text, sep="\t", flush=True)

    try:
        on_entry = show if arguments.command == "tail" else lambda _: None
        client = Client(arguments.server, arguments.token, arguments.ca, on_entry)
    except OSError as error:
        sys.exit(f"--ca {arguments.ca}: {error}")
    client.connect()
    if arguments.command == "send":
        out = client.send(arguments.peer, arguments.text)
        while client.pending:
            try:
                client.wait()
            except (OSError, EOFError):
                client.connect()
        return print(out.seq)
    while True:
        try:
            client.step()
        except (OSError, EOFError) as error:
            print(f"the connection broke: {error}", file=sys.stderr)
            client.connect()


if __name__ == "__main__":
    main()
