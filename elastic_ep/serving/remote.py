"""Which ranks live on other hosts, and how their agents reach this one. Checked once."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from elastic_ep.core.errors import InvalidInputError
from elastic_ep.runtime.control.address import parse_address

WILDCARDS = ("0.0.0.0", "::")


@dataclass(frozen=True)
class RemoteRanks:
    """Seats for other hosts: the last ones, node by node in the order given.

    Attributes:
        nodes: (label, number of ranks) of each other node.
        control_listen: `tcp:HOST:PORT` where agents and their ranks dial.
        token: what agents must know.
        node: label of this host.
        mesh_host: address of this host at which remote ranks reach its ranks; "" takes the host of `control_listen`.
        wait_s: how long the start waits for agents before it serves without them.
    """

    nodes: tuple[tuple[str, int], ...]
    control_listen: str
    token: str = field(repr=False)
    node: str
    mesh_host: str = ""
    wait_s: float = 60.0

    def __post_init__(self) -> None:
        labels = [self.node, *(label for label, _ in self.nodes)]
        for label in labels:
            if labels.count(label) > 1:
                raise InvalidInputError(f"node {label!r} is named twice by --node and --remote-ranks; give each host one label of its own")
        for label, count in self.nodes:
            if count < 1:
                raise InvalidInputError(f"--remote-ranks {label}={count}: give at least 1 rank")
        host, port = self.listen_address
        if not 0 < port < 65536:
            raise InvalidInputError(f"--control-listen {self.control_listen!r}: give a port that agents can be told, 1 to 65535")
        if host in WILDCARDS and not self.mesh_host:
            raise InvalidInputError(
                f"--control-listen {self.control_listen!r} listens on every address: say by --mesh-host at which one other hosts reach "
                f"the ranks of this host"
            )
        if not 0 <= self.wait_s < float("inf"):
            raise InvalidInputError(f"--remote-wait is {self.wait_s:g}; give 0 seconds or more")

    @property
    def num_ranks(self) -> int:
        return sum(count for _, count in self.nodes)

    @property
    def listen_address(self) -> tuple[str, int]:
        address = parse_address(self.control_listen)[1]
        if isinstance(address, str):
            raise InvalidInputError(f"--control-listen is {self.control_listen!r}; give tcp://HOST:PORT")
        return address

    @property
    def host(self) -> str:
        """Where remote ranks dial the ranks of this host."""
        return self.mesh_host or self.listen_address[0]

    def labels(self, ep_size: int) -> tuple[str, ...]:
        """The node of each rank. Raises InvalidInputError if there are fewer ranks than remote ones."""
        if self.num_ranks > ep_size:
            raise InvalidInputError(f"--remote-ranks gives {self.num_ranks} ranks to other hosts, --ep-size is {ep_size}; give more ranks")
        remote = [label for label, count in self.nodes for _ in range(count)]
        return (*[self.node] * (ep_size - len(remote)), *remote)


def parse_nodes(texts: list[str]) -> tuple[tuple[str, int], ...]:
    """`NODE=COUNT`, each possibly several with commas. Raises InvalidInputError."""
    nodes = []
    for text in ",".join(texts).split(","):
        match = re.fullmatch(r"([^=\s]+)=(\d+)", text)
        if match is None:
            raise InvalidInputError(f"--remote-ranks {text!r}: give NODE=COUNT, as hostb=2 (NODE is what its agent says by --node)")
        nodes.append((match[1], int(match[2])))
    return tuple(nodes)
