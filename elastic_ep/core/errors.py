"""Whose fault it is: one base class, one class per kind of fault. Messages give the values and the cure."""


class ElasticEPError(Exception):
    """Base of every error this project raises on purpose."""


class InvalidInputError(ElasticEPError, ValueError):
    """The caller's fault: a value that cannot be served. The message names the value and the cure."""


class InsufficientSlotsError(ElasticEPError):
    """The world's fault: too few live slots to hold every expert.

    Attributes:
        missing: how many slots are missing (per layer).
        num_live_slots, num_logical_experts: the two numbers compared.
    """

    def __init__(self, num_live_slots: int, num_logical_experts: int):
        self.num_live_slots = num_live_slots
        self.num_logical_experts = num_logical_experts
        self.missing = num_logical_experts - num_live_slots
        super().__init__(
            f"{num_live_slots} live slots cannot hold {num_logical_experts} experts: {self.missing} missing per layer; "
            f"add ranks or redundant experts, or let the rest be streamed"
        )


class IllegalTransitionError(ElasticEPError):
    """Our fault or a peer's: an event that the state machine does not allow here. Nothing was changed."""


class CheckpointError(ElasticEPError):
    """The checkpoint's fault: missing, truncated or mis-shaped. The message names the file or tensor."""


class WrongExpertError(ElasticEPError):
    """A slot holds other bytes than it should. Fatal for the rank: it must stop rather than serve them."""
