"""Lifelines: how the processes of a training know of each other's end, whatever they are doing.

    process r ------ a connection on which nothing is said ------ process 0

The system closes a connection when its process ends, for whatever reason, and probes it for when a machine is gone.  So
the first process knows of every end at once, and tells the others; nobody waits for half an hour in an exchange that
will never come.  Who ends in order says so first, and waits for the others: no process takes a group of others with it.
"""

from __future__ import annotations

import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch.distributed as dist

from logsnr.errors import LogsnrError, one_line
from logsnr.interrupts import Interrupted

GRACE = 20.0
"""Seconds for an exchange to fail by itself once a process is gone; then this one is ended."""
MEET = 60.0
"""Seconds for all to connect."""
BYE = b"."
PROBES = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
"""Seconds of silence before a machine is asked whether it is there, between questions, and how many go unanswered."""


@contextmanager
def together(rank: int, world: int) -> Iterator[None]:
    """Train beside the other processes of a group: this one ends soon after any of them does.

    Raises:
        LogsnrError: if another one ended.
    """
    if world == 1:
        yield
        return
    line = Lifeline(rank, world)
    try:
        yield
    except Interrupted:
        line.leave()  # what all agreed on
        raise
    except RuntimeError as error:  # as an exchange that failed; the news of why comes by another way
        gone = line.gone(wait=2.0)
        line.close()
        if gone is None:
            raise
        raise LogsnrError(f"{gone}: {one_line(error)[:200]}") from error
    except BaseException:
        line.close()
        raise
    line.leave()


class Lifeline:
    """This process's end of the connections.

    Args:
        rank: number of this process,
        world: of so many, all of which make theirs at the same time.
    """

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self._gone: int | None = None
        self._news, self._left, self._closed = threading.Event(), threading.Event(), False
        self._peers: dict[int, socket.socket] = {}
        server = socket.create_server(("", 0), backlog=world) if rank == 0 else None
        told: list[Any] = [(server.getsockname()[1], secrets.token_hex(8)) if server else None]
        dist.broadcast_object_list(told, src=0)
        port, word = told[0]
        if server:
            with server:
                server.settimeout(MEET)
                while len(self._peers) < world - 1:
                    peer, _ = server.accept()
                    peer.settimeout(MEET)
                    with suppress(OSError, ValueError):  # a stranger knows no word
                        said, _, number = peer.recv(64).decode().partition(" ")
                        if said == word:
                            self._peers[int(number)] = peer
        else:
            peer = socket.create_connection((os.environ.get("MASTER_ADDR", "127.0.0.1"), port), timeout=MEET)
            peer.sendall(f"{word} {rank}".encode())
            self._peers[0] = peer
        for peer in self._peers.values():
            peer.settimeout(None)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in PROBES.items():
                if hasattr(socket, name):
                    peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        threading.Thread(target=self._watch, daemon=True, name="lifeline").start()

    def gone(self, wait: float = 0.0) -> str | None:
        """Which process ended out of order, in words; None where none is known to have."""
        self._news.wait(wait)
        if self._gone is None:
            return None
        return (
            f"process {self._gone} of {self.world} ended, so process {self.rank} ends too "
            "(--resume goes on from the last checkpoint)"
        )

    def leave(self) -> None:
        """Wait until every process is here, and part."""
        if self.rank:
            self._say(BYE)
        if not self._left.wait(MEET) and self._gone is None:
            self._gone = 0
        if self.rank == 0:
            self._say(BYE)
        self.close()

    def close(self) -> None:
        """Part at once: the others are told of an end out of order, unless all had said that they leave."""
        self._closed = True
        for peer in self._peers.values():
            with suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)
            peer.close()

    def _say(self, word: bytes) -> None:
        for peer in self._peers.values():
            with suppress(OSError):
                peer.sendall(word)

    def _watch(self) -> None:
        leaving: set[int] = set()
        with selectors.DefaultSelector() as selector:
            for number, peer in self._peers.items():
                selector.register(peer, selectors.EVENT_READ, number)
            while len(leaving) < len(self._peers) and not self._closed:
                for key, _ in selector.select():
                    try:
                        said = self._peers[key.data].recv(64)
                    except OSError:
                        said = b""
                    if said == BYE:
                        leaving.add(key.data)
                        selector.unregister(key.fileobj)
                    elif not self._closed:
                        self._lost(int(said) if said.isdigit() else key.data)
                        return
        self._left.set()

    def _lost(self, number: int) -> None:
        self._gone = number
        if self.rank == 0:
            self._say(str(number).encode())
        self._news.set()
        self._left.set()
        end = time.monotonic() + GRACE
        while time.monotonic() < end:
            if self._closed:
                return
            time.sleep(0.1)
        # An exchange that nobody answers holds the main thread, where no exception would reach it.
        print(f"logsnr: error: {self.gone()}", file=sys.stderr, flush=True)
        os._exit(2)
