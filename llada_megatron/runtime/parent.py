"""Imported last by the parent of ranks (runtime/launch.py): what it has imported stays, in every rank.

Frozen, it is left alone by the collections of a rank, each of which would look at a million objects and,
because it writes into them, copy the memory that the ranks share.
"""

import gc

gc.collect()
gc.freeze()
