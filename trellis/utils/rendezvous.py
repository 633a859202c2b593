"""Where ranks meet before they train: a store of keys at one host and port, at which every rank reports.

torch's own rendezvous waits without a word and takes any process that knows the address. Here somebody says who is
awaited, the wait ends, and ranks that belong to different runs are told so.
"""

import datetime
import json
import os
import socket
import sys
import time
from typing import Any

import torch.distributed as dist

from .errors import ConfigError

SAY_AFTER, SAY_EVERY = 10.0, 60.0  # seconds
# An answer of a store that is there takes milliseconds; a host that has vanished gives none.
ANSWER = datetime.timedelta(seconds=60)
ENDED = "ended"  # the key that says that this attempt is over, and why


def host_store(port: int) -> dist.TCPStore:
    """Return a store that listens on all interfaces of this machine; port 0: any free one, see `store.port`.

    Raise ConfigError if the port cannot be used.
    """
    try:
        return dist.TCPStore("localhost", port, is_master=True, wait_for_workers=False, timeout=ANSWER)
    except dist.DistNetworkError as error:
        reason = "is in use by another program" if "EADDRINUSE" in str(error) else "cannot be opened"
        raise ConfigError(
            f"--master_port {port} {reason} on {socket.gethostname()}; give another number, on every node the same"
        ) from error


def join_store(address: str, port: int, attempt: int, minutes: float, *, speak: bool) -> dist.Store:
    """Return a connection to the store at this address, once one is there. Raise ConfigError after `minutes`.

    attempt: number of the restart, if the store outlives it.
    speak: whether this rank says that it waits.
    """
    wait, reason = Wait(minutes, speak), "no answer"
    while True:
        try:
            # torch retries by itself, but prints a page about each failure.
            socket.create_connection((address, port), timeout=5).close()
            store = _connect(address, port, attempt)
            if not store.check([ENDED]):  # else: the store of an attempt before this one
                return store
        except OSError as error:
            reason = error.strerror or str(error)
        except dist.DistError as error:
            reason = str(error).splitlines()[0]
        if not wait.on(f"for rank 0 at {address}:{port}"):
            raise ConfigError(
                f"rank 0 cannot be reached at {address}:{port} after {minutes:g} minutes ({reason}). Is the first node "
                "started? Check --master_addr, --master_port and the firewall; --timeout sets the minutes"
            )


def _connect(address: str, port: int, attempt: int = 0) -> dist.Store:
    return dist.PrefixStore(f"trellis {attempt}", dist.TCPStore(address, port, is_master=False, timeout=ANSWER))


def end_all(address: str, port: int, reason: str) -> None:
    """Let the ranks of all nodes end, for this reason. Do nothing if the store has gone: then they notice that."""
    try:
        socket.create_connection((address, port), timeout=5).close()
        _connect(address, port).compare_set(ENDED, "", json.dumps({"reason": reason, "code": 1}))
    except (OSError, dist.DistError):
        pass


def where_all(store: dist.TCPStore, world: int) -> str:
    """Return where the ranks have been, in words. store: of `host_store`."""
    view, parts = dist.PrefixStore("trellis 0", store), []
    for rank in range(world):
        report = json.loads(view.get(f"where {rank}")) if view.check([f"where {rank}"]) else None
        parts.append(f"rank {rank} {describe(report)}")
    return "; ".join(parts)


def describe(report: dict[str, Any] | None) -> str:
    """Return a rank's report (see `watch`) in words."""
    if report is None:
        return "starting"
    return f"on {report['host']} at step {report['step']}, {report['place'] or 'outside of training'}"


def check_in(store: dist.Store, rank: int, world: int, minutes: float, *, speak: bool, gpu: str = "") -> None:
    """Report at the store and wait until every rank has. Raise ConfigError for ranks that do not come or do not fit.

    gpu: what identifies this rank's GPU, if it has one.
    speak: whether this rank says that it waits.
    """
    me = {"host": socket.gethostname(), "pid": os.getpid(), "world": world, "gpu": gpu}
    number = store.add(f"reports of rank {rank}", 1)
    store.set(f"rank {rank}, report {number}", json.dumps(me))
    if rank > 0:
        wait = Wait(minutes + 0.5, speak)  # rank 0 says who is missing, a little earlier
        while not store.check(["verdict"]):
            if not wait.on("for the other ranks"):
                raise ConfigError(f"rank {rank} of {world}: rank 0 has not answered after {minutes:g} minutes")
        verdict = store.get("verdict").decode()
    else:
        verdict = _verdict(store, world, minutes, speak)
        store.set("verdict", verdict)
    if number > 1:
        # Rank 0 may have seen the first report only, and have let it pass.
        verdict = verdict or _twice(store, rank)
    if verdict:
        raise ConfigError(verdict)


def _verdict(store: dist.Store, world: int, minutes: float, speak: bool) -> str:
    """Wait for a report of every rank. Return what is wrong with them, or ""."""
    wait, missing = Wait(minutes, speak), list(range(world))
    while True:
        missing = [rank for rank in missing if not store.check([f"rank {rank}, report 1"])]
        gpus: dict[str, int] = {}
        for rank in range(world):
            if rank not in missing:
                report = json.loads(store.get(f"rank {rank}, report 1"))
                if report["world"] != world:
                    return (
                        f"rank {rank} on {report['host']} was started as one of {report['world']}, rank 0 on "
                        f"{socket.gethostname()} as one of {world}; start all with the same --num_nodes and --num_gpus"
                    )
                if store.check([f"rank {rank}, report 2"]):
                    return _twice(store, rank)
                other = gpus.setdefault(report["gpu"] or f"none {rank}", rank)
                if other != rank:
                    return (
                        f"ranks {other} and {rank} take the same GPU of {report['host']}; start one process per GPU, "
                        "each with its own LOCAL_RANK"
                    )
        if not missing:
            return ""
        if not wait.on(f"for {_ranks(missing)} of {world}"):
            return (
                f"{_ranks(missing)} of {world} did not come within {minutes:g} minutes; start them, or look at their "
                "output. --timeout sets the minutes"
            )


def _twice(store: dist.Store, rank: int) -> str:
    first, second = (json.loads(store.get(f"rank {rank}, report {number}")) for number in (1, 2))
    return (
        f"two processes are rank {rank}: {first['pid']} on {first['host']} and {second['pid']} on {second['host']}; "
        "give every node its own --node_rank, and every job its own --master_port"
    )


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:16]))}{' …' if len(ranks) > 16 else ''}"


class Wait:
    """A wait that says what it is for, after 10 seconds and then every minute, until it has lasted `minutes`."""

    def __init__(self, minutes: float, speak: bool):
        self.started = time.monotonic()
        self.end, self.speak = self.started + 60 * minutes, speak
        self.next = self.started + SAY_AFTER

    def on(self, what: str) -> bool:
        """Wait for a moment. Return whether time is left."""
        now = time.monotonic()
        if now >= self.end:
            return False
        if self.speak and now >= self.next:
            print(f"waiting {what} ({now - self.started:.0f} s)", file=sys.stderr, flush=True)
            self.next = now + SAY_EVERY
        time.sleep(min(0.5, 0.05 + (now - self.started) / 50))
        return True
