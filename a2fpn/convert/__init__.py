"""State dicts in, state dicts out: foreign checkpoints to ours, and an FPN detector to an A2-FPN detector."""

from a2fpn.convert.graft import TARGETS, graft, graft_model

__all__ = ["TARGETS", "graft", "graft_model"]
