"""Names of the parts of a round, as `torch.profiler.record_function` marks them in the loops and a profile lists them.

They do not nest: together they are nearly all of a round.
"""

PREPARE = "FTS: prepare the attacker"
BATCH = "FTS: draw a batch"
ATTACKER_PASS = "FTS: attacker's pass"
ATTACKER_STEP = "FTS: attacker's step"
QUERY_PASS = "FTS: query pass"
META_STEP = "FTS: meta step"
NTR_PASS = "NTR: pass"
NTR_STEP = "NTR: step"
REDUCE = "reduce over ranks"
GUARD = "guard"
REGIONS = (
    PREPARE,
    BATCH,
    ATTACKER_PASS,
    ATTACKER_STEP,
    QUERY_PASS,
    META_STEP,
    NTR_PASS,
    NTR_STEP,
    REDUCE,
    GUARD,
)
