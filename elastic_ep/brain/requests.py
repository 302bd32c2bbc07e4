"""The controller's record of each request: all that is needed to continue it on any rank."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from elastic_ep.brain.events import Finish, GenerationRequest, TokenEvent
from elastic_ep.brain.messages import SampledToken, SequenceWork


@dataclass
class Sequence:
    """A request being served.

    Attributes:
        tokens: prompt and committed tokens.
        home: the rank that holds its KV, or None while it waits for one.
        seq_id: names its KV on the home rank; a new one for each home, so that stale KV can never be taken for it.
        computed: how many positions have KV on the home rank, by committed steps.
    """

    request: GenerationRequest
    tokens: list[int]
    arrival: int
    home: int | None = None
    seq_id: int = -1
    computed: int = 0

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt_ids)

    @property
    def max_length(self) -> int:
        """Positions that KV has to be reserved for. The last token is never fed back."""
        return len(self.request.prompt_ids) + self.request.max_tokens

    @property
    def is_decoding(self) -> bool:
        """Only the newest token lacks KV."""
        return len(self.tokens) - self.computed == 1

    def next_work(self, max_tokens: int) -> SequenceWork:
        """The next positions to compute, at most `max_tokens` of them; the last position samples."""
        end = min(len(self.tokens), self.computed + max_tokens)
        sample = self.request.sampling if end == len(self.tokens) else None
        return SequenceWork(self.seq_id, self.computed, tuple(self.tokens[self.computed : end]), sample)

    def commit(self, work: SequenceWork, token: SampledToken | None) -> TokenEvent | None:
        """Take the result of a step that every rank finished. Returns what the client sees, if a token was sampled."""
        assert work.start == self.computed, f"work from {work.start} committed at {self.computed}"
        self.computed += len(work.tokens)
        if token is None:
            return None
        self.tokens.append(token.token)
        finish: Finish | None = None
        if token.token in self.request.eos_ids:
            finish = "stop"
        elif self.num_generated >= self.request.max_tokens:
            finish = "length"
        return TokenEvent(token, self.num_generated - 1, finish)

    def leave_home(self) -> None:
        """Its KV is lost (or given up): everything is computed again elsewhere."""
        self.home, self.seq_id, self.computed = None, -1, 0


@dataclass
class RequestTable:
    """Waiting and running sequences, in order of arrival. Finished ones leave it; only counts stay."""

    waiting: OrderedDict[str, Sequence] = field(default_factory=OrderedDict)
    running: dict[str, Sequence] = field(default_factory=dict)
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    arrivals: int = 0
    next_seq_id: int = 0

    def add(self, request: GenerationRequest) -> Sequence:
        assert self.find(request.request_id) is None, request.request_id
        sequence = Sequence(request, list(request.prompt_ids), self.arrivals)
        self.arrivals += 1
        self.waiting[request.request_id] = sequence
        return sequence

    def find(self, request_id: str) -> Sequence | None:
        return self.waiting.get(request_id) or self.running.get(request_id)

    def place(self, sequence: Sequence, rank: int) -> None:
        """Give a waiting sequence a home."""
        del self.waiting[sequence.request.request_id]
        sequence.home, sequence.seq_id, sequence.computed = rank, self.next_seq_id, 0
        self.next_seq_id += 1
        self.running[sequence.request.request_id] = sequence

    def evict_rank(self, rank: int) -> list[str]:
        """Sequences of a lost home wait again, before everything that arrived after them. Returns their ids."""
        moved = [s for s in self.running.values() if s.home == rank]
        for sequence in moved:
            del self.running[sequence.request.request_id]
            sequence.leave_home()
            self.waiting[sequence.request.request_id] = sequence
        if moved:
            self.waiting = OrderedDict(sorted(self.waiting.items(), key=lambda item: item[1].arrival))
        return [s.request.request_id for s in moved]

    def remove(self, request_id: str) -> Sequence | None:
        return self.waiting.pop(request_id, None) or self.running.pop(request_id, None)
