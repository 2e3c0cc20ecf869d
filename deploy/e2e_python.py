"""The client of proto/examples, which knows nothing but SPEC.md and the .proto files, against a real server. Run by e2e-python.sh.

    e2e_python.py IMD IM DATA
"""

import json
import os
import signal
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "../proto/examples"))
from client import Client, Refusal  # noqa: E402
from im.v1 import body_pb2  # noqa: E402

IMD, IM, DATA = sys.argv[1:]
PORTS = ("tcp", "tls", "quic", "api", "http")


class Server:
    """`imd up` on any free ports, and on the same ones when it is started again."""

    ready = {name: "127.0.0.1:0" for name in PORTS}

    def start(self):
        options = [option for name in PORTS for option in (f"--{name}", self.ready[name])]
        log = open(os.path.join(DATA, "..", "server.log"), "a")
        command = [IMD, "up", "--data", DATA, "--set", "gateway.outbox_bytes_max=64KiB", *options]
        self.process = subprocess.Popen(command, stdout=log, stderr=log)
        while self.ready.get("pid") != self.process.pid:
            assert self.process.poll() is None, "the server did not start"
            time.sleep(0.02)
            try:
                self.ready = json.load(open(os.path.join(DATA, "ready.json")))
            except FileNotFoundError:
                pass

    def end(self, how):
        self.process.send_signal(how)
        return self.process.wait(timeout=30)


def run(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def client(server, user, transport):
    got = []
    token = run(IMD, "token", "--user", user, "--data", DATA).strip()
    address = f"{transport}://{server.ready[transport]}"
    ca = server.ready["ca"] if transport == "tls" else None
    one = Client(address, token, ca, lambda entry: entry.kind == 1 and got.append(entry))
    one.connect()
    return one, got


def until(one, condition):
    """Lets a client do its work, over new connections if the old one breaks."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it takes too long"
        try:
            one.step(0.05)
        except (OSError, EOFError):
            one.connect()


def texts(entries):
    return [body_pb2.Body.FromString(entry.body).text.text for entry in entries]


def main():
    server = Server()
    server.start()
    alice, alice_got = client(server, "alice", "tls")
    bob, bob_got = client(server, "bob", "tcp")
    alice.ping()
    bob.ping()

    # More than a window at once: numbered in order, and pushed live in that order.
    sent = [f"line {n} 💬" for n in range(300)]
    outs = [alice.send("bob", text) for text in sent]
    alice.wait()
    assert [out.seq for out in outs] == list(range(1, 301)), "acks in order"
    until(bob, lambda: len(bob_got) == 300)
    assert texts(bob_got) == sent and [entry.seq for entry in bob_got] == list(range(1, 301)), "live in order"
    print("ok: 300 messages in order, over TLS with a pinned CA and over TCP")

    # The same id again is the same message; with another body it is refused.
    again = outs[6]
    again.seq = None
    alice.pending.append(again)
    alice._send_again()
    alice.wait()
    assert again.seq == 7, again.seq
    again.seq, again.body = None, outs[7].body
    alice.pending.append(again)
    alice._send_again()
    try:
        alice.wait()
        raise AssertionError("another body was taken")
    except Refusal as refusal:
        assert refusal.code == 15, refusal
    print("ok: a repeat stays single, and another body is refused")

    # With the project's own client, both ways.
    assert run(IM, "history", "@alice", "--as", "bob", "--data", DATA).splitlines() == sent, "im reads what was sent"
    run(IM, "send", "@alice", "hello from im", "--as", "bob/other", "--data", DATA)
    until(alice, lambda: alice_got)
    assert texts(alice_got) == ["hello from im"] and alice_got[0].seq == 301
    # Bytes and envelope are the same from history as live, in as many answers as it takes.
    direct = alice.direct["bob"]
    history = [entry.message for entry in alice.history(direct, 1, 300).entries]
    assert history == bob_got[:300], "history is what came live"
    assert len(alice.history(direct, 1, 10**9).entries) == 301 and not alice.history(direct, 10**9).entries
    for wrong in ((-1, 5), (5, 4)):
        try:
            alice.history(direct, *wrong)
            raise AssertionError(f"history {wrong} was answered")
        except Refusal as refusal:
            assert refusal.code == 1, refusal
    print("ok: history, and the project's own client")

    # Bob does not read for a while: what does not fit is dropped, he is told, and fetches it.
    large = [f"{n} " + "x" * 40_000 for n in range(700)]
    for text in large:
        alice.send("bob", text)
    alice.wait()
    until(bob, lambda: len(bob_got) >= 301 + 700)
    assert bob.resyncs > 0, "no Resync came"
    assert texts(bob_got)[301:] == large and [entry.seq for entry in bob_got] == list(range(1, 1002)), "nothing is missing"
    print(f"ok: {bob.resyncs} Resync after a pause in reading, nothing missing")

    # Killed in mid-flow: what was not acknowledged is sent again, and everything is there once.
    outs = [alice.send("bob", f"mid-flow {n}") for n in range(250)]
    server.end(signal.SIGKILL)
    server.start()
    until(alice, lambda: not alice.pending or any(out.status for out in alice.pending))
    alice.wait()
    assert [out.seq for out in outs] == list(range(1002, 1252)), [out.seq for out in outs]
    until(bob, lambda: len(bob_got) == 1251)
    assert texts(bob_got)[1001:] == [f"mid-flow {n}" for n in range(250)]
    print("ok: killed in mid-flow, each message once and in order")
    assert server.end(signal.SIGTERM) == 0, "a clean end"


main()
