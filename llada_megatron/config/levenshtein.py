"""Drafts that a model learns to revise by orders (docs/levenshtein.md)."""

from __future__ import annotations

from dataclasses import dataclass

from llada_megatron.config.ranges import Amount, Extent, Share


@dataclass
class LevenshteinConfig:
    """Levenshtein labels (LLaDA2.2): objective `levenshtein`; what is not published is ours."""

    delete_token_id: Extent = 0
    """The row of the vocabulary that says: drop this token. LLaDA2.2's tokenizer has 156930. Text never holds
    it."""
    split_token_id: Extent = 0
    """The row that says: put a mask before this token; 156931 there. Both 0: a model without such rows."""
    deleted: Share = 0.05
    """Share of the target's visible tokens that a draft lacks."""
    inserted: Share = 0.05
    """Share of the target's tokens that have a wrong one before them in a draft."""
    substituted: Share = 0.05
    """Share of the target's visible tokens that a draft has a wrong one for."""
    visible_weight: Amount = 1.0
    """Of a position that holds a token in the draft, beside the weight of a masked one."""

    @property
    def orders(self) -> dict[str, int]:
        """Both rows by the names that rule `indel` has for them; empty for a model without."""
        if not self.delete_token_id and not self.split_token_id:
            return {}
        return {"delete_id": self.delete_token_id, "split_id": self.split_token_id}
