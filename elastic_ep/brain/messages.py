"""What controller and ranks say to each other over the control channel. Frozen records: the shell encodes them, the simulator does not.

Every message that belongs to a membership carries its epoch; the receiver drops what is older than what it knows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# ---- parts


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to pick a token from logits. A pure function of (seed, position, logits): a replay picks the same.

    Attributes:
        temperature: 0 is greedy (lowest id among ties).
        top_p: nucleus mass in (0, 1].
        seed: 64-bit; the controller draws one when the client gave none.
        top_logprobs: None returns no logprobs; n >= 0 returns the sampled token's and the n best.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    top_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class SequenceWork:
    """What one sequence does in one step on its home rank.

    Attributes:
        seq_id: names the sequence's KV on the rank; a rank that does not know it starts a new one (then start is 0).
        start: position of the first token of `tokens`; KV at and after it is overwritten.
        tokens: token ids at positions start, start + 1, … (one for a decode, a chunk for a prefill).
        sample: how to sample the token that follows the last one; None for a prefill chunk that is not the last.
    """

    seq_id: int
    start: int
    tokens: tuple[int, ...]
    sample: SamplingParams | None


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The token that follows the work of one sequence. `top` holds (token id, logprob) pairs, best first."""

    seq_id: int
    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class LoadOrder:
    """Fill slot (layer, slot) with `expert`; slot is the physical id, always one of the receiver's own.

    Attributes:
        source: where to read it from first, a `SourceKind` value; if that fails, from the host's backup, then from the checkpoint.
        peer: the rank to read from, for a source on another rank.
        digest: of the expert's bytes as first read; None when nobody has read it yet.
    """

    layer: int
    slot: int
    expert: int
    source: str = "checkpoint"
    peer: int = -1
    digest: int | None = None


@dataclass(frozen=True, slots=True)
class LoadedSlot:
    """A slot that was filled and verified."""

    layer: int
    slot: int
    expert: int
    digest: int


# ---- rank -> controller


@dataclass(frozen=True, slots=True)
class Hello:
    """First message on a control channel. `incarnation` counts the processes that sat in this seat."""

    rank: int
    incarnation: int
    pid: int
    host: str
    token: str
    address: str
    """where peers dial this rank"""
    weights_address: str = ""
    """where they ask for experts that it holds"""


@dataclass(frozen=True, slots=True)
class DenseLoaded:
    """Dense weights are in place; the rank can take an Install.

    Attributes:
        digest: of the configuration and the dense weights as they were read.
    """

    digest: int
    load_ms: float


@dataclass(frozen=True, slots=True)
class Installed:
    """The epoch's tables are in force here and every ordered load is verified.

    Attributes:
        bytes_read: by source: "peer", "host", "checkpoint".
        source_errors: sources that failed and were passed over, and why.
    """

    epoch: int
    loaded: tuple[LoadedSlot, ...]
    bytes_read: dict[str, int]
    move_ms: float
    source_errors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class InstallFailed:
    """The epoch could not be installed: peers that were unreachable, or a checkpoint that could not be read. What did load is listed."""

    epoch: int
    loaded: tuple[LoadedSlot, ...]
    failed_peers: dict[int, str]
    error: str


@dataclass(frozen=True, slots=True)
class Staged:
    """Everything that a Stage ordered lies verified beside the live slots; an Install may name it. Attributes as in Installed."""

    change: int
    bytes_read: dict[str, int]
    source_errors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StageFailed:
    change: int
    error: str


@dataclass(frozen=True, slots=True)
class StepDone:
    epoch: int
    step: int
    tokens: tuple[SampledToken, ...]
    compute_ms: float
    expert_counts: bytes | None = None
    """uint32 [L, E]: what this rank's own tokens asked of each expert since it last reported; every few steps"""


@dataclass(frozen=True, slots=True)
class StepFailed:
    """The step is void here: peers failed (rank -> FailureKind value). An interrupted rank sends nothing."""

    epoch: int
    step: int
    failed_peers: dict[int, str]


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Sent by a thread of its own: it proves that the process runs, not that it makes progress."""

    sequence: int


@dataclass(frozen=True, slots=True)
class RankFatal:
    """The rank cannot go on (bad checkpoint, wrong expert, a bug) and exits after this."""

    error: str


# ---- controller -> rank


@dataclass(frozen=True, slots=True)
class Install:
    """Enter a new epoch: drop any step in progress, match the mesh to `peers`, load, swap tables, answer Installed.

    Attributes:
        active_ranks: 1 = alive, [ep_size].
        peers: rank -> address, the active ranks (the receiver among them).
        physical_to_logical_map: int32 [num_layers, P] as bytes (little-endian, C order), -1 empty.
        quotas: float64 [num_layers, P] as bytes, or None for an even split.
        streamed: [layer, expert, rank] triples for experts without a slot; `streamed_digests` are those of their first reading.
        loads: slots of the receiver to fill first; what was staged for them is used.
    """

    epoch: int
    active_ranks: tuple[int, ...]
    slots_per_rank: tuple[int, ...]
    num_layers: int
    num_experts: int
    peers: dict[int, str]
    physical_to_logical_map: bytes
    quotas: bytes | None
    streamed: tuple[tuple[int, int, int], ...]
    loads: tuple[LoadOrder, ...]
    deadline_s: float
    streamed_digests: tuple[int | None, ...] = ()


@dataclass(frozen=True, slots=True)
class Stage:
    """Read these experts beside what is served, and keep them apart until an Install puts them into their slots. A newer Stage, and
    any Install, ends an older one.

    Attributes:
        bytes_per_s: how fast at most; 0 is as fast as it goes.
        weights: rank -> where to ask for experts that it holds.
        ahead: the Install that will follow, without loads and peers, so that its tables are built by then.
    """

    change: int
    loads: tuple[LoadOrder, ...]
    bytes_per_s: float
    weights: dict[int, str] = field(default_factory=dict)
    ahead: Install | None = None


@dataclass(frozen=True, slots=True)
class RunStep:
    epoch: int
    step: int
    work: tuple[SequenceWork, ...]
    release: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Finish nothing, free everything, exit 0."""

    reason: str = field(default="server is stopping")


@dataclass(frozen=True, slots=True)
class StartOver:
    """The answer to a hello, or to what a process says, that was given up: exit; the seat gets a new process, with a new incarnation."""

    reason: str


RankMessage = Hello | DenseLoaded | Installed | InstallFailed | Staged | StageFailed | StepDone | StepFailed | Heartbeat | RankFatal
ControllerMessage = Install | Stage | RunStep | Shutdown | StartOver
