"""What can be said of a token reduction: the rows of the check matrix.

A method says of itself, in its class variable `properties`, which of these hold; the tests show each that it names and
refute each that it does not.  They speak of the parameters' defaults, of the last layer of the model and of tokens
without ties.  What every method must do (a plan that keeps its promises, protected tokens untouched, rows that do not
depend on their batch, numbers whatever the keys) is asked of all and has no name.
"""

from __future__ import annotations

EXACT_COUNT = "exact_count"  # every row of n tokens has as many after as the count rule says, not at most as many
KEEPS_SURVIVORS = "keeps_survivors"  # a token alone in its slot is bitwise what it was
CONSERVES_MASS = "conserves_mass"  # sum of sizes, and sum of size times hidden state, are those before
MERGES_DUPLICATES = "merges_duplicates"  # merging pairs of equal tokens leaves later attention what it was
ORDER_FREE = "order_free"  # tokens in another order give the same slots in the same order
SET_FREE = "set_free"  # tokens in another order give the same groups, in some order of slots
SCALE_FREE = "scale_free"  # keys multiplied by positive numbers, one per token, give the same slots

PRUNING = frozenset({EXACT_COUNT, KEEPS_SURVIVORS, SET_FREE})  # by a score of each token
MERGING = frozenset({EXACT_COUNT, KEEPS_SURVIVORS, CONSERVES_MASS, MERGES_DUPLICATES, SCALE_FREE})  # by cosine of keys

PROPERTIES = PRUNING | MERGING | {ORDER_FREE}
