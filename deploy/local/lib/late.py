"""What a dead router's connections still carry to the store, read from the wire in its network namespace.

    late.py HOST:PORT,… KEYSPACE SHARDS FILE     the CQL nodes; how many shards the cluster has; lines "shard epoch": which writes count

Says "watching", and when its input ends in one line how much the nodes acknowledged, how many rows of the log (CQL protocol 4) that was, how
many of them count, and how many of these are another message than the one that stands in the log now. Called by late.sh.
"""

import select
import socket
import struct
import sys
import typing

ALL_PROTOCOLS = 3
QUERY_VALUES = 1
STARTUP, QUERY, RESULT, EXECUTE, BATCH = 1, 7, 8, 10, 13
QUORUM = 4
# Of Append in storage/src/scylla/query.rs.
APPEND_COLUMNS = 13


def main():
    nodes, keyspace, shards = set(sys.argv[1].split(",")), sys.argv[2], int(sys.argv[3])
    with open(sys.argv[4]) as file:
        twice = {int(shard): int(epoch) for shard, epoch in map(str.split, file)}
    packets = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.ntohs(ALL_PROTOCOLS))
    packets.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 23)
    print("watching", flush=True)
    streams = {}
    while True:
        ready, _, _ = select.select([packets, sys.stdin], [], [])
        if packets in ready:
            take(packets.recv(1 << 17), nodes, streams)
        elif not sys.stdin.buffer.read1():
            break
    surfaced = [stream.acknowledged() for stream in streams.values()]
    surfaced = [data for data in surfaced if data]
    # What the router sent again itself is one row.
    rows = {row for data in surfaced for row in rows_of(data)}
    counted = [row for row in rows if twice.get(hash_of(row.conversation) % shards) == row.epoch]
    others = len(counted) - standing(counted, keyspace, min(nodes))
    print(f"{sum(map(len, surfaced))} bytes on {len(surfaced)} connections, {len(rows)} rows, of them {len(counted)} in shards taken over twice, "
          f"where {others} would have replaced another message")


class Row(typing.NamedTuple):
    conversation: bytes
    bucket: int
    seq: int
    message: bytes
    epoch: int


def standing(rows, keyspace, node):
    """How many of the rows have the message that the log has at their place now."""
    if not rows:
        return 0
    host, port = node.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        pair = [len(text).to_bytes(2, "big") + text for text in (b"CQL_VERSION", b"3.0.0")]
        call(connection, STARTUP, b"\0\1" + b"".join(pair))
        found = 0
        for row in rows:
            text = (f"SELECT client_message_id FROM {keyspace}.messages WHERE conversation_id = 0x{row.conversation.hex()} "
                    f"AND bucket = {row.bucket} AND seq = {row.seq}").encode()
            opcode, body = call(connection, QUERY, struct.pack(">I", len(text)) + text + struct.pack(">HB", QUORUM, 0))
            if opcode != RESULT:
                sys.exit(f"late.py: {node} answers {body!r}")
            found += row.message in body
        return found


def call(connection, opcode, body):
    connection.sendall(struct.pack(">BBHBI", 4, 0, 0, opcode, len(body)) + body)
    head = exactly(connection, 9)
    return head[4], exactly(connection, struct.unpack_from(">I", head, 5)[0])


def exactly(connection, count):
    data = b""
    while len(data) < count:
        more = connection.recv(count - len(data))
        if not more:
            sys.exit("late.py: the CQL node has closed the connection")
        data += more
    return data


class Stream:
    """One direction of a connection: what was sent from the first packet on, and how far it was acknowledged."""

    def __init__(self, first):
        self.first, self.sent, self.through = first, {}, 0

    def place(self, number):
        # Numbers wrap, and what is repeated may begin before the first.
        return ((number - self.first + (1 << 31)) & 0xFFFFFFFF) - (1 << 31)

    def acknowledged(self):
        data = b""
        for place, payload in sorted(self.sent.items()):
            if place <= len(data) < place + len(payload):
                data += payload[len(data) - place:]
        return data[:max(self.through, 0)]


def take(packet, nodes, streams):
    if len(packet) < 40 or packet[0] >> 4 != 4 or packet[9] != socket.IPPROTO_TCP:
        return
    head = 4 * (packet[0] & 15)
    from_port, to_port, number, confirmed, offset, flags = struct.unpack_from(">HHIIBB", packet, head)
    payload = packet[head + 4 * (offset >> 4):struct.unpack_from(">H", packet, 2)[0]]
    source, target = (socket.inet_ntoa(packet[at:at + 4]) for at in (12, 16))
    if f"{target}:{to_port}" in nodes and payload:
        stream = streams.setdefault((from_port, target), Stream(number))
        place = stream.place(number)
        if len(payload) > len(stream.sent.get(place, b"")):
            stream.sent[place] = payload
    elif f"{source}:{from_port}" in nodes and (to_port, source) in streams and flags & 16:
        stream = streams[to_port, source]
        stream.through = max(stream.through, stream.place(confirmed))


def rows_of(data):
    """The rows of the log in whole frames."""
    at = 0
    while at + 9 <= len(data):
        opcode, length = data[at + 4], struct.unpack_from(">I", data, at + 5)[0]
        body = data[at + 9:at + 9 + length]
        at += 9 + length
        if len(body) < length:
            return
        statements = []
        if opcode == EXECUTE:
            after = 2 + struct.unpack_from(">H", body)[0] + 2
            if body[after] & QUERY_VALUES:
                statements = [values(body, after + 1)[0]]
        elif opcode == BATCH:
            count, after = struct.unpack_from(">H", body, 1)[0], 3
            for _ in range(count):
                # Prepared statements, each with its id.
                after += 3 + struct.unpack_from(">H", body, after + 1)[0]
                statement, after = values(body, after)
                statements.append(statement)
        for statement in statements:
            if len(statement) == APPEND_COLUMNS and len(statement[0]) == 16 and len(statement[-1]) == 8:
                bucket, seq, epoch = (int.from_bytes(statement[column], "big") for column in (1, 2, -1))
                yield Row(statement[0], bucket, seq, statement[6], epoch)


def values(body, at):
    found = []
    count, at = struct.unpack_from(">H", body, at)[0], at + 2
    for _ in range(count):
        length, at = struct.unpack_from(">i", body, at)[0], at + 4
        found.append(body[at:at + max(length, 0)])
        at += max(length, 0)
    return found, at


def hash_of(conversation):
    """XXH3-64 of 16 bytes; modulo the number of shards it is the shard (proto/SPEC.md)."""
    mask = (1 << 64) - 1
    low, high = struct.unpack("<QQ", conversation)
    low ^= FLIPS[0]
    high ^= FLIPS[1]
    product = low * high
    hashed = (16 + int.from_bytes(struct.pack("<Q", low), "big") + high + ((product & mask) ^ (product >> 64))) & mask
    hashed ^= hashed >> 37
    hashed = hashed * 0x165667919E3779F9 & mask
    return hashed ^ hashed >> 32


# From the secret of XXH3, bytes 24 to 55.
SECRET = struct.unpack("<QQQQ", bytes.fromhex("7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221b8084674f743248e"))
FLIPS = SECRET[0] ^ SECRET[1], SECRET[2] ^ SECRET[3]

if __name__ == "__main__":
    main()
