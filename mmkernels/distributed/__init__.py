"""Ops over a batch that is spread over the ranks of a ``torch.distributed`` group: what ``group=`` leads to.

Imported by the first call that has a group.
"""
