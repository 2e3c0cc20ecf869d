#!/usr/bin/env python3
"""Lists the live gateways of a cluster, as they stand in etcd, with nothing but the standard library.

    registry/examples/gateways.py --etcd http://127.0.0.1:2379 --cluster CLUSTER            once
    registry/examples/gateways.py --etcd http://127.0.0.1:2379 --cluster CLUSTER --watch    and then each change

CLUSTER is `cluster_id` in the cluster's cluster.json. One line a gateway: its id, "draining" or "live", its zone, and its endpoints
as transport=host:port. It speaks to etcd's JSON gateway (etcd 3.4 or later), in which keys and values are base64 and 64-bit numbers
are texts. registry/README.md describes the keys.
"""

import argparse
import base64
import json
import sys
import urllib.error
import urllib.request


def encoded(text):
    return base64.b64encode(text.encode()).decode()


def decoded(text):
    return base64.b64decode(text).decode()


def range_of(prefix):
    """All keys that begin with a prefix which ends with a slash: up to the same prefix with the next character."""
    return {"key": encoded(prefix), "range_end": encoded(prefix[:-1] + chr(ord(prefix[-1]) + 1))}


def ask(etcd, path, body, timeout=None):
    request = urllib.request.Request(etcd.rstrip("/") + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=timeout)


def describe(value):
    gateway = json.loads(value)
    state = "draining" if gateway["draining"] else "live"
    endpoints = " ".join(f"{endpoint['transport']}={endpoint['address']}" for endpoint in gateway["endpoints"])
    return f"{gateway['id']}\t{state}\t{gateway['zone'] or '-'}\t{endpoints}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--etcd", default="http://127.0.0.1:2379", help="a member of etcd")
    parser.add_argument("--cluster", required=True, help="the id of the cluster: cluster_id in its cluster.json")
    parser.add_argument("--watch", action="store_true", help="go on with each change")
    arguments = parser.parse_args()
    prefix = f"/im/{arguments.cluster}/v1/instances/gateway/"

    with ask(arguments.etcd, "/v3/kv/range", range_of(prefix), timeout=5) as answer:
        found = json.load(answer)
    for entry in found.get("kvs", []):
        print(describe(decoded(entry["value"])), flush=True)
    if not arguments.watch:
        return

    # From the revision after the one that was read: nothing is missed and nothing is told twice. If etcd ends this with
    # "compact_revision", what was missed is gone and everything has to be read again.
    after = int(found["header"]["revision"]) + 1
    create = {"create_request": {**range_of(prefix), "start_revision": str(after)}}
    with ask(arguments.etcd, "/v3/watch", create) as stream:
        for line in stream:
            result = json.loads(line).get("result", {})
            if result.get("canceled"):
                sys.exit("the watch was ended by etcd: read everything again")
            for event in result.get("events", []):
                # A put has no type: it is the first of the enumeration.
                if event.get("type") == "DELETE":
                    print(f"{decoded(event['kv']['key'])[len(prefix):]}\tgone", flush=True)
                else:
                    print(describe(decoded(event["kv"]["value"])), flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        pass
    except (urllib.error.URLError, OSError) as error:
        sys.exit(f"etcd does not answer: {error}")
