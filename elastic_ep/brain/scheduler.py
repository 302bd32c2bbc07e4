"""Which sequences get a home, and what each rank computes in the next step: decodes first, then prefill chunks in order of arrival."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from elastic_ep.brain.messages import SequenceWork
from elastic_ep.brain.requests import RequestTable, Sequence


@dataclass(frozen=True)
class SchedulerLimits:
    """Per rank.

    Attributes:
        kv_tokens: positions of KV a rank can hold. A sequence reserves its whole possible length, so nothing is ever evicted for room.
        page_tokens: KV is reserved in pages of this many positions.
        max_sequences: sequences at home on one rank at once.
        max_batch_tokens: positions one rank computes in one step.
        prefill_chunk: positions of one sequence computed in one step.
    """

    kv_tokens: int
    max_sequences: int = 64
    max_batch_tokens: int = 512
    prefill_chunk: int = 128
    page_tokens: int = 1

    def reserved(self, num_tokens: int) -> int:
        """Positions that a sequence of `num_tokens` takes: whole pages."""
        return -(-num_tokens // self.page_tokens) * self.page_tokens


def place_waiting(table: RequestTable, ranks: Iterable[int], limits: SchedulerLimits) -> list[Sequence]:
    """Give homes to waiting sequences, first come first served: the rank with the fewest sequences, then least reserved KV, then the
    lowest id. Stops at the first that fits nowhere, so a long one is not overtaken for ever."""
    count = dict.fromkeys(ranks, 0)
    reserved = dict.fromkeys(count, 0)
    for sequence in table.running.values():
        if sequence.home in count:  # not one that is leaving
            count[sequence.home] += 1
            reserved[sequence.home] += limits.reserved(sequence.max_length)
    placed = []
    for sequence in list(table.waiting.values()):
        need = limits.reserved(sequence.max_length)
        fits = [r for r in count if count[r] < limits.max_sequences and reserved[r] + need <= limits.kv_tokens]
        if not fits:
            break
        rank = min(fits, key=lambda r: (count[r], reserved[r], r))
        table.place(sequence, rank)
        count[rank] += 1
        reserved[rank] += need
        placed.append(sequence)
    return placed


StepWork = dict[int, list[tuple[Sequence, SequenceWork]]]
"""rank -> what it computes in one step; nothing for a rank that only serves its experts"""


def decode_work(table: RequestTable, ranks: Iterable[int], limits: SchedulerLimits) -> StepWork:
    """The next token of each sequence that needs no prefill."""
    work: StepWork = {rank: [] for rank in ranks}
    for sequence in table.running.values():
        home = sequence.home
        assert home is not None
        if sequence.is_decoding and len(work[home]) < limits.max_batch_tokens:
            work[home].append((sequence, sequence.next_work(1)))
    return work


def step_work(table: RequestTable, ranks: Iterable[int], limits: SchedulerLimits) -> StepWork:
    """The work of each rank in one step."""
    work = decode_work(table, ranks, limits)
    budget = {rank: limits.max_batch_tokens - len(items) for rank, items in work.items()}
    for sequence in sorted((s for s in table.running.values() if not s.is_decoding), key=lambda s: s.arrival):
        home = sequence.home
        assert home is not None
        room = min(budget[home], limits.prefill_chunk)
        if room > 0:
            chunk = sequence.next_work(room)
            work[home].append((sequence, chunk))
            budget[home] -= len(chunk.tokens)
    return work
